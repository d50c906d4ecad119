"""Imports point one way: a module of fxexpand imports only from what is before it.

``ORDER`` has the modules and the packages; ``INSIDE`` has the modules of each package. Within its own package
a module imports from the module that defines a name, never from the package, whose ``__init__`` imports it.
"""

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
    "files",
    "sharding",
    "table",
    "markup",
    "figures",
    "progress",
    "report",
    "geometry",
    "kernel",
    "ops",
    "lower",
    "recipes",
    "products",
    "lowrank",
    "layers",
    "weights",
    "accumulation",
    "optim",
    "sizes",
    "tracer",
    "modes",
    "exported",
    "tracing",
    "paths",
    "calls",
    "graph",
    "uses",
    "selection",
    "sites",
    "verify",
    "surgery",
    "flops",
    "compression",
    "passes",
    "pipeline",
    "factorize",
    "export",
    "latency",
    "rank",
    "training",
    "demo",
    "zoo",
    "cli",
]

INSIDE = {
    "recipes": [
        "recipe",
        "fixed",
        "structure",
        "factors",
        "parts",
        "chain",
        "expandnet",
        "branches",
        "doconv",
    ],
    "lowrank": ["cuts", "projection", "lp", "factored"],
    "compression": ["allocation", "criteria", "watching", "costs", "report", "decisions", "trp"],
    "passes": [
        "operators",
        "result",
        "maps",
        "steps",
        "shapes",
        "module_maps",
        "memory",
        "constants",
        "reader",
        "form",
        "forms",
        "affine",
        "split",
        "fuse",
        "expand",
        "factorize",
        "tree",
        "placement",
    ],
    "export": ["sessions", "free_sizes", "files", "folding", "onnx", "quantization"],
    "latency": ["intervals", "backends", "timing", "candidates", "measure", "plots", "page"],
    "rank": ["spectra", "sketch", "features", "report", "plots", "tracker"],
    "training": ["data", "loop", "distributed", "checkpoint", "runs", "train"],
    "demo": ["network", "findings", "plots", "page", "experiment"],
    "cli": [
        "failures",
        "files",
        "output",
        "options",
        "demo",
        "inspect",
        "fuse",
        "export",
        "bench",
        "train",
        "factorize",
        "rank",
    ],
}


def name_of(path: Path) -> str:
    """The name inside fxexpand: ``kernel``, ``passes.fuse``; that of ``__init__`` is its package's, or ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inner = parts if parts[0] == "passes" else parts[1:]
    return ".".join(inner[:-1] if inner[-1] == "__init__" else inner)


def imported(source: str) -> list[tuple[int, str]]:
    """(line, name inside fxexpand) of each import, those inside functions and under TYPE_CHECKING too.

    ``from fxexpand.recipes import fixed`` imports a module if ``INSIDE`` has it, and from the package if not.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            _, _, package = node.module.partition(".")
            modules = ORDER if not package else INSIDE.get(package, [])
            names = [
                f"{node.module}.{alias.name}" if alias.name in modules else node.module
                for alias in node.names
                if alias.name != "__version__"  # which is there before anything is imported
            ]
        else:
            continue
        for name in dict.fromkeys(names):
            home, _, rest = name.partition(".")
            if home == "fxexpand":
                found.append((node.lineno, rest))
    return found


def place(name: str) -> tuple[int, int]:
    """Of a module or package in the order; a package, its ``__init__``, comes after what is inside."""
    package, _, module = name.partition(".")
    inside = INSIDE.get(package, [])
    return ORDER.index(package), inside.index(module) if module else len(inside)


def source_files() -> list[Path]:
    link = ROOT / "fxexpand" / "passes"
    inner = [path for path in (ROOT / "fxexpand").rglob("*.py") if link not in path.parents]
    return sorted(inner + list((ROOT / "passes").rglob("*.py")))


def faults(name: str, source: str) -> list[str]:
    """The imports of the module ``name`` that point upwards."""
    return [
        f"line {line}: fxexpand.{name} must not import fxexpand.{other}"
        for line, other in imported(source)
        if not other or place(other) > place(name) or (other == package_of(name) and other != name)
    ]


def package_of(name: str) -> str:
    return name.partition(".")[0]


def test_every_file_has_its_place() -> None:
    names = {name_of(path) for path in source_files()} - {"", "__main__"}
    listed = {*ORDER, *(f"{package}.{module}" for package, modules in INSIDE.items() for module in modules)}
    assert names == listed
    for order in (ORDER, *INSIDE.values()):
        assert len(order) == len(set(order))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_the_list(path: Path) -> None:
    name = name_of(path)
    if name in ("", "__main__"):
        return  # the contents page may name everything
    assert not faults(name, path.read_text(encoding="utf-8")), path


def test_the_reader_sees_every_form_of_import() -> None:
    source = (
        "import fxexpand.kernel as k\nfrom fxexpand.ops import table\nfrom fxexpand import lower\n"
        "import torch\ndef f():\n    from fxexpand.recipes.chain import Chain\n"
        "    from fxexpand.recipes import Recipe, Skip, fixed\n"
    )
    names = ["kernel", "ops", "lower", "recipes.chain", "recipes", "recipes.fixed"]
    assert [name for _, name in imported(source)] == names


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernel", "from fxexpand.ops import table"),
        ("kernel", "def f():\n    from fxexpand import pipeline"),
        ("ops", "from fxexpand.recipes.fixed import identity"),
        ("kernel", "from fxexpand import expand"),
        ("recipes.structure", "from fxexpand.recipes.chain import Chain"),
        ("recipes.structure", "from fxexpand.recipes import chain"),
        ("recipes.chain", "from fxexpand.recipes import Skip"),
        ("recipes", "from fxexpand.layers import Expanded"),
        ("export.sessions", "from fxexpand.latency import measure_latency"),
        ("rank.spectra", "from fxexpand.training.data import digits"),
        ("rank.spectra", "from fxexpand.rank import report"),
        ("sites", "from fxexpand import compression"),
    ],
)
def test_an_import_upwards_is_found(name: str, source: str) -> None:
    assert faults(name, source)


def test_an_import_downwards_is_none() -> None:
    source = "from fxexpand import ops\nfrom fxexpand.recipes import fixed\nimport fxexpand.recipes.structure"
    assert not faults("recipes.chain", source)
    assert not faults("layers", source)
    assert not faults("recipes", source)
