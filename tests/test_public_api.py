"""What ``import fxexpand`` promises: documented names, and nothing heavy loaded."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxexpand
from tests.compare import assert_same

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
    """The stub imports every public name, re-exports it under its own name, and names each module once."""
    tree = ast.parse(Path(fxexpand.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    assert [f"fxexpand.{home}" for home in fxexpand.CONTENTS] == [node.module for node in imports]
    table = [name for names in fxexpand.CONTENTS.values() for name in names]
    assert {*table, "__version__"} == set(fxexpand.__all__)
    assert set(fxexpand.__all__) <= set(dir(fxexpand))
    assert {"expand", "fuse", "factorize", "report", "Chain", "checkpoint"} <= set(table)


def test_no_module_has_the_name_of_a_function() -> None:
    """So that ``fxexpand.passes.fuse`` can only be one of them, in every package."""
    for home in ("", *fxexpand.CONTENTS, "kernel", "layers", "tracing", "lowrank", "passes", "training.demo"):
        package = importlib.import_module(f"fxexpand.{home}".rstrip("."))
        modules = {module.name for module in pkgutil.iter_modules(getattr(package, "__path__", []))}
        shared = modules & {name for name in getattr(package, "__all__", ()) if name != "checkpoint"}
        assert not shared, f"{package.__name__}: {shared}"


def test_old_addresses_lead_to_what_moved() -> None:
    for old, homes in fxexpand.MOVED.items():
        module = importlib.import_module(f"fxexpand.{old}")
        for home in homes.split():
            there = importlib.import_module(f"fxexpand.{home}")
            own = [
                name
                for name, value in vars(there).items()
                if getattr(value, "__module__", "") == there.__name__
            ]
            assert own or home in ("lowrank", "deploy", "deploy.latency", "training.demo", "layers.sharding")
            assert all(hasattr(module, name) for name in own), old
        assert not hasattr(module, "nothing") and not hasattr(module, "__wrapped__")


def test_models_saved_before_the_move_load() -> None:
    """Whole models, pickled by version 0.1.0 before its files were put into rooms."""
    saved = torch.load(Path(__file__).parent / "saved" / "models.pt", weights_only=False)
    assert set(saved["models"]) == {"expanded", "factorized", "graph", "guarded", "fused", "fused graph"}
    for name, model in saved["models"].items():
        assert_same(model(saved["x"]), saved["outputs"][name], 1e-5)
    assert "3 expanded" in str(saved["reports"]["expanded"])
    small = fxexpand.fuse(saved["models"]["expanded"], scope="expanded")
    assert_same(small(saved["x"]), saved["outputs"]["expanded"], 1e-5)


@pytest.mark.parametrize(
    "program",
    [
        "import fxexpand.report",
        "from fxexpand.report import Report",
        "import fxexpand.pipeline; assert fxexpand.pipeline.expand is fxexpand.expand",
        "fxexpand.report; import fxexpand.report",
        "fxexpand.passes; from fxexpand import passes, kernel",
        "from fxexpand import *; assert report is fxexpand.report",
        "from fxexpand.kernel import Kernel, apply, compose, identity; from fxexpand.lower import to_module",
        "from fxexpand.tracing import regions, trace; from fxexpand.layers import Expanded",
        "from fxexpand.passes.operators import SYNONYMS; from fxexpand.passes.result import Result",
        "from fxexpand.zoo import load_model; from fxexpand.training import checkpoint; checkpoint.save",
        "from fxexpand.zoo import load_model; load_model('fxexpand.demo:Digits')",
        "import fxexpand.latency.page; assert fxexpand.latency.page.latency_page",
        "from fxexpand.rank import effective_rank; from fxexpand.compression import TrainedRankPruning",
    ],
)
def test_what_the_docs_import_stays(program: str) -> None:
    """And a public name hides a module that once had it."""
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
