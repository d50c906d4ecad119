"""What ``import fxexpand`` promises: documented names, and nothing heavy loaded."""

from __future__ import annotations

import inspect
import subprocess
import sys

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


def test_the_import_loads_nothing_heavy() -> None:
    program = (
        "import sys, torch\nbefore = set(sys.modules)\nimport fxexpand\n"
        f"new = {{n.split('.')[0] for n in set(sys.modules) - before}} & set({HEAVY!r})\n"
        "assert not new, new"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
