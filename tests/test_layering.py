"""Imports point one way, from the last room to the first, and inside a room from the last file to the first.

``ORDER`` has the rooms and the two files beside them; ``INSIDE`` has the files of each room. Within its own
room a file imports from the file that defines a name, never from the room, whose ``__init__`` imports it.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ORDER = [
    "errors",
    "reporting",
    "kernel",
    "recipes",
    "running",
    "zoo",
    "layers",
    "tracing",
    "lowrank",
    "passes",
    "surgery",
    "deploy",
    "training",
    "cli",
]

INSIDE = {
    "reporting": ["options", "files", "table", "rows", "progress", "html", "figures"],
    "kernel": ["geometry", "alignment", "taps", "algebra", "library_layers", "modules", "lower"],
    "recipes": [
        *("recipe", "fixed", "structure", "factors", "parts"),
        *("chain", "expandnet", "branches", "doconv", "selection"),
    ],
    "running": ["finite", "inputs", "evaluation", "copying", "outputs", "flops", "verify"],
    "layers": [
        "sharding",
        "products",
        "effective",
        "rewritten",
        "expanded",
        "parametrized",
        "accumulation",
        "param_groups",
    ],
    "tracing": [
        *("example_values", "guards", "classes", "tracer", "stores", "recording", "export", "graphs"),
        *("paths", "submodules", "edit"),
    ],
    "lowrank": [
        *("measures", "sketch", "features", "model_ranks", "rank_plots", "tracker"),
        *("cuts", "projection", "lp", "factored", "allocation", "options", "criteria"),
        *("calibration", "costs", "factorize_report", "decisions", "trp"),
    ],
    "passes": [
        *("affine.maps", "affine.steps", "operators.sizes", "operators.table", "operators.layers"),
        *("operators.channels", "operators.arithmetic", "operators.layout", "operators.pooling", "operators"),
        *("affine.candidates", "affine.aliasing", "affine.writes", "affine.constants", "affine.shapes"),
        *("affine.module_maps", "affine.reader", "affine.layouts", "affine.interpretation"),
        "affine.extraction",
        *("affine", "result", "contract", "uses", "forward_code", "readings", "sites", "planner"),
        *("expand", "folding", "norms", "fusions", "fuse", "factorize"),
    ],
    "surgery": [
        *("transaction", "expand", "fold"),
        *("module_tree", "placement", "module_graphs", "other_calls", "graph_plan", "fuse_plan"),
        *("fuse", "factorize"),
    ],
    "deploy": [
        "options",
        *("sessions", "free_sizes", "onnx_files", "onnx_writing", "onnx_report"),
        *("onnx", "quantization"),
        *("latency.intervals", "latency.backends", "latency.timing", "latency.candidates"),
        *("latency.measure", "latency.plots", "latency.page", "latency"),
    ],
    "training": [
        *("options", "data", "loop", "average", "distributed", "checkpoint", "runs", "state", "train"),
        *("demo.network", "demo.findings", "demo.plots", "demo.page", "demo.experiment", "demo"),
    ],
    "cli": [
        *("dataclass_options", "failures", "files", "output", "options"),
        *("demo", "inspect", "fuse", "export", "bench", "train", "factorize", "rank"),
    ],
}


def name_of(path: Path) -> str:
    """The name inside fxexpand: ``zoo``, ``passes.fuse``; that of ``__init__`` is its room's, or ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inner = parts if parts[0] == "passes" else parts[1:]
    return ".".join(inner[:-1] if inner[-1] == "__init__" else inner)


def known() -> set[str]:
    """Every module and package of the order."""
    return {*ORDER, *(f"{room}.{file}" for room, files in INSIDE.items() for file in files)}


def imported(source: str) -> list[tuple[int, str]]:
    """(line, name inside fxexpand) of each import, those inside functions and under TYPE_CHECKING too.

    ``from fxexpand.recipes import fixed`` imports a module if ``INSIDE`` has it, and from the room if not.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = node.module.partition(".")[2]
            names = []
            for alias in node.names:
                module = f"{inner}.{alias.name}" if inner else alias.name
                if alias.name != "__version__":  # which is there before anything is imported
                    names.append(f"{node.module}.{alias.name}" if module in known() else node.module)
        else:
            continue
        for name in dict.fromkeys(names):
            home, _, rest = name.partition(".")
            if home == "fxexpand":
                found.append((node.lineno, rest))
    return found


def place(name: str) -> tuple[int, int]:
    """Of a module or package in the order; a room, its ``__init__``, comes after what is inside."""
    room, _, file = name.partition(".")
    inside = INSIDE.get(room, [])
    return ORDER.index(room), inside.index(file) if file else len(inside)


def source_files() -> list[Path]:
    link = ROOT / "fxexpand" / "passes"
    inner = [path for path in (ROOT / "fxexpand").rglob("*.py") if link not in path.parents]
    return sorted(inner + list((ROOT / "passes").rglob("*.py")))


def faults(name: str, source: str) -> list[str]:
    """The imports of the module ``name`` that point upwards."""
    return [
        f"line {line}: fxexpand.{name} must not import fxexpand.{other}"
        for line, other in imported(source)
        if not other or place(other) > place(name) or (other == room_of(name) and other != name)
    ]


def room_of(name: str) -> str:
    return name.partition(".")[0]


def test_every_file_has_its_place() -> None:
    names = {name_of(path) for path in source_files()} - {"", "__main__"}
    assert names == known()
    for order in (ORDER, *INSIDE.values()):
        assert len(order) == len(set(order))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_the_list(path: Path) -> None:
    name = name_of(path)
    if name in ("", "__main__"):
        return  # the contents page may name everything
    assert not faults(name, path.read_text(encoding="utf-8")), path


def test_benchmarks_import_in_no_circle() -> None:
    """Among themselves; ``graphlib`` raises ``CycleError`` with the circle."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "benchmarks").rglob("*.py")
        if path.name != "__init__.py"
    }
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
                named = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                graph[name] |= {str(each) for each in named if each in files}
    assert len(list(TopologicalSorter(graph).static_order())) == len(files) > 40


def test_the_reader_sees_every_form_of_import() -> None:
    source = (
        "import fxexpand.kernel as k\nfrom fxexpand.kernel.modules import table\nfrom fxexpand import zoo\n"
        "import torch\ndef f():\n    from fxexpand.recipes.chain import Chain\n"
        "    from fxexpand.recipes import Recipe, Skip, fixed\n    from fxexpand.deploy.latency import page\n"
    )
    names = ["kernel", "kernel.modules", "zoo", "recipes.chain", "recipes", "recipes.fixed"]
    assert [name for _, name in imported(source)] == [*names, "deploy.latency.page"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernel.algebra", "from fxexpand.kernel.modules import table"),
        ("kernel.algebra", "def f():\n    from fxexpand.surgery import fuse"),
        ("kernel.modules", "from fxexpand.recipes.fixed import identity"),
        ("kernel.algebra", "from fxexpand import expand"),
        ("kernel.algebra", "from fxexpand.kernel import modules"),
        ("recipes.structure", "from fxexpand.recipes.chain import Chain"),
        ("recipes.structure", "from fxexpand.recipes import chain"),
        ("recipes.chain", "from fxexpand.recipes import Skip"),
        ("recipes", "from fxexpand.layers import Expanded"),
        ("deploy.sessions", "from fxexpand.deploy.latency import measure_latency"),
        ("deploy.latency.backends", "from fxexpand.deploy import export_onnx"),
        ("lowrank.measures", "from fxexpand.training.data import digits"),
        ("lowrank.measures", "from fxexpand.lowrank import tracker"),
        ("tracing.tracer", "from fxexpand import lowrank"),
    ],
)
def test_an_import_upwards_is_found(name: str, source: str) -> None:
    assert faults(name, source)


def test_an_import_downwards_is_none() -> None:
    source = "from fxexpand import zoo\nfrom fxexpand.recipes import fixed\nimport fxexpand.recipes.structure"
    assert not faults("layers", source)
    source = "from fxexpand.recipes import fixed\nfrom fxexpand.recipes.structure import Skip"
    assert not faults("recipes.chain", source)
    assert not faults("recipes", source)
