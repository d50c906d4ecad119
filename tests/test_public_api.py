"""What ``import fxexpand`` promises: documented names, and nothing heavy loaded."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fxexpand

HEAVY = ("timm", "torchvision", "onnx", "onnxscript", "onnxruntime", "matplotlib", "sklearn", "typer")


@pytest.mark.parametrize("name", sorted(fxexpand.__all__))
def test_each_name_exists_and_is_documented(name: str) -> None:
    thing = getattr(fxexpand, name)
    if name.startswith("__"):
        return
    text = inspect.getdoc(thing)
    assert text, f"fxexpand.{name} has no docstring"
    # A dataclass without a docstring is given its signature; that is no documentation.
    assert not text.startswith(f"{name}("), f"fxexpand.{name} has no docstring of its own"


def test_all_is_free_of_repeats() -> None:
    assert len(fxexpand.__all__) == len(set(fxexpand.__all__))


def test_the_contents_page_is_that_of_the_type_checkers() -> None:
    """``import`` statements for type checkers, a table for the interpreter: the same names and modules."""
    tree = ast.parse(Path(fxexpand.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module.removeprefix("fxexpand.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module is not None
        and node.module.startswith("fxexpand.")
        for alias in node.names
    }
    assert imported == fxexpand._HOMES
    assert {*imported, "__version__"} == set(fxexpand.__all__)
    assert set(fxexpand.__all__) <= set(dir(fxexpand))


@pytest.mark.parametrize(
    "program",
    [
        "import fxexpand.report",
        "from fxexpand.report import Report",
        "import fxexpand.pipeline",
        "fxexpand.report; import fxexpand.report",
        "fxexpand.passes; from fxexpand import passes, kernel",
        "from fxexpand import *; assert report is fxexpand.report",
    ],
)
def test_a_public_name_hides_the_module_of_that_name(program: str) -> None:
    after = "assert inspect.isfunction(fxexpand.report) and fxexpand.report.__name__ == 'report'"
    modules = "assert fxexpand.passes.Fuse and fxexpand.kernel.compose and not hasattr(fxexpand, 'nothing')"
    lines = ["import inspect, fxexpand", program, after, modules]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_the_import_loads_nothing_heavy() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, fxexpand; assert 'torch' not in sys.modules"], check=True
    )
    program = (
        "import sys, torch\nbefore = set(sys.modules)\nimport fxexpand\n"
        "for name in fxexpand.__all__:\n    getattr(fxexpand, name)\n"
        f"new = {{n.split('.')[0] for n in set(sys.modules) - before}} & set({HEAVY!r})\n"
        "assert not new, new"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_version_is_that_of_the_package() -> None:
    """The library reads its own, so that a checkout that is not installed works too."""
    assert fxexpand.__version__ == importlib.metadata.version("fxexpand")
