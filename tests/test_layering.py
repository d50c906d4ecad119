"""Imports point one way: a module of fxexpand imports only from modules before it in ``ORDER``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ORDER = [
    "errors",
    "finite",
    "closest",
    "inputs",
    "evaluating",
    "outputs",
    "copying",
    "sharding",
    "table",
    "report",
    "geometry",
    "kernel",
    "ops",
    "lower",
    "recipes",
    "products",
    "cuts",
    "lowrank",
    "lp",
    "ranks",
    "factored",
    "layers",
    "weights",
    "accumulation",
    "optim",
    "tracer",
    "tracing",
    "calls",
    "graph",
    "uses",
    "selection",
    "sites",
    "verify",
    "surgery",
    "flops",
    "watching",
    "criteria",
    "costs",
    "compression",
    "passes",
    "pipeline",
    "factorize",
    "trp",
    "sessions",
    "free_sizes",
    "onnx_files",
    "export",
    "intervals",
    "quantization",
    "backends",
    "timing",
    "candidates",
    "latency",
    "spectra",
    "sketch",
    "feature_rank",
    "rank",
    "files",
    "rank_plots",
    "rank_tracker",
    "data",
    "training",
    "distributed",
    "checkpoint",
    "runs",
    "train",
    "findings",
    "plots",
    "markup",
    "page",
    "latency_page",
    "demo",
    "zoo",
    "cli",
]


def layer_of(path: Path) -> str:
    """The top-level module or package of fxexpand ``path`` belongs to; "" is ``fxexpand/__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inner = parts if parts[0] == "passes" else parts[1:]
    return "" if inner[0] == "__init__" else inner[0]


def imported_layers(source: str) -> list[tuple[int, str]]:
    """(line, layer) of each import from fxexpand, those inside functions and under TYPE_CHECKING too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
            if node.module == "fxexpand":  # `from fxexpand import kernel`
                names = [f"fxexpand.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "fxexpand":
                found.append((node.lineno, rest.split(".")[0]))
    return found


def source_files() -> list[Path]:
    link = ROOT / "fxexpand" / "passes"
    inner = [path for path in (ROOT / "fxexpand").rglob("*.py") if link not in path.parents]
    return sorted(inner + list((ROOT / "passes").rglob("*.py")))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_the_list(path: Path) -> None:
    layer = layer_of(path)
    if layer in ("", "__main__"):
        return  # the contents page may name everything
    assert layer in ORDER, f"{layer} has no place in ORDER; give it one"
    for line, other in imported_layers(path.read_text(encoding="utf-8")):
        where = f"{path.relative_to(ROOT)}:{line}"
        assert other != "", f"{where}: imports the contents page; import from the module itself"
        assert other in ORDER, f"{where}: fxexpand.{other} has no place in ORDER"
        assert ORDER.index(other) <= ORDER.index(layer), f"{where}: {layer} must not import {other}"


def test_the_reader_sees_every_form_of_import() -> None:
    source = (
        "import fxexpand.kernel as k\nfrom fxexpand.ops import table\nfrom fxexpand import lower\n"
        "import torch\ndef f():\n    from fxexpand.recipes.chain import Chain\n"
    )
    assert [layer for _, layer in imported_layers(source)] == ["kernel", "ops", "lower", "recipes"]
