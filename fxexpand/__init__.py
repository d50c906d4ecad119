"""Expand a network's layers into linear chains for training, and fuse them back exactly.

The contents page: ``import fxexpand`` offers the names that the stub ``__init__.pyi`` imports. Each is
documented where it is defined, and is loaded when it is first used (PEP 562), so that ``import fxexpand``
alone does not load torch.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


def _contents() -> dict[str, tuple[str, ...]]:
    """The public names by the module that offers them, as the stub lists them for type checkers."""
    stub = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {str(node.module).partition(".")[2]: tuple(alias.name for alias in node.names) for node in imports}


CONTENTS = _contents()

# Where the contents of a module went that was here before. What was pickled, and code that imports the old
# names, finds them there; a package that keeps its name has them itself.
MOVED = {
    "accumulation": "layers.accumulation",
    "calls": "tracing.submodules",
    "closest": "errors",
    "compression": "lowrank",
    "compression.allocation": "lowrank.allocation",
    "compression.costs": "lowrank.costs",
    "compression.criteria": "lowrank.criteria",
    "compression.decisions": "lowrank.decisions",
    "compression.report": "lowrank.factorize_report",
    "compression.trp": "lowrank.trp",
    "compression.watching": "lowrank.calibration",
    "copying": "running.copying",
    "demo": "training.demo",
    "demo.experiment": "training.demo.experiment",
    "demo.findings": "training.demo.findings",
    "demo.network": "training.demo.network",
    "demo.page": "training.demo.page",
    "demo.plots": "training.demo.plots",
    "evaluating": "running.evaluation",
    "export": "deploy",
    "export.files": "deploy.onnx_files",
    "export.folding": "deploy.onnx",
    "export.free_sizes": "deploy.free_sizes",
    "export.onnx": "deploy.onnx",
    "export.quantization": "deploy.quantization",
    "export.sessions": "deploy.sessions",
    "exported": "tracing.export",
    "factorize": "surgery.factorize",
    "figures": "reporting.figures",
    "files": "reporting.files",
    "finite": "running.finite",
    "flops": "running.flops",
    "geometry": "kernel.geometry kernel.alignment",
    "graph": "tracing.edit",
    "inputs": "running.inputs",
    "latency": "deploy.latency",
    "latency.backends": "deploy.latency.backends",
    "latency.candidates": "deploy.latency.candidates",
    "latency.intervals": "deploy.latency.intervals",
    "latency.measure": "deploy.latency.measure",
    "latency.page": "deploy.latency.page",
    "latency.plots": "deploy.latency.plots",
    "latency.timing": "deploy.latency.timing",
    "lower": "kernel.lower",
    "markup": "reporting.html",
    "modes": "tracing.guards",
    "ops": "kernel.modules kernel.library_layers",
    "optim": "layers.param_groups",
    "outputs": "running.outputs",
    "passes.constants": "passes.affine.constants",
    "passes.form": "passes.affine.candidates",
    "passes.forms": "passes.affine.interpretation",
    "passes.maps": "passes.affine.maps",
    "passes.memory": "passes.affine.aliasing",
    "passes.module_maps": "passes.operators.layers",
    "passes.placement": "surgery.fuse_plan surgery.placement",
    "passes.reader": "passes.affine.reader",
    "passes.shapes": "passes.affine.shapes",
    "passes.split": "passes.norms",
    "passes.steps": "passes.affine.steps",
    "passes.tree": "surgery.module_tree surgery.placement",
    "paths": "tracing.paths",
    "pipeline": "surgery.expand surgery.fuse surgery.fold surgery.transaction",
    "products": "layers.products",
    "progress": "reporting.progress",
    "rank": "lowrank",
    "rank.features": "lowrank.features",
    "rank.plots": "lowrank.rank_plots",
    "rank.report": "lowrank.model_ranks",
    "rank.sketch": "lowrank.sketch",
    "rank.spectra": "lowrank.measures",
    "rank.tracker": "lowrank.tracker",
    "report": "reporting.rows",
    "selection": "recipes.selection",
    "sharding": "layers.sharding",
    "sites": "passes.sites kernel.algebra",
    "sizes": "tracing.example_values",
    "table": "reporting.table",
    "tracer": "tracing.guards tracing.tracer",
    "uses": "passes.uses",
    "verify": "running.verify",
    "weights": "layers.parametrized",
}

_HOMES = {name: home for home, names in CONTENTS.items() for name in names}
__all__ = ["__version__", *sorted(_HOMES)]


class _Moved(ModuleType):
    """An old address: a module that looks its names up where they are now."""

    def __init__(self, name: str, homes: str) -> None:
        super().__init__(name, f"Moved to {homes}.")
        self.__dict__.update(__path__=[], _homes=homes.split())

    def __getattr__(self, name: str) -> Any:
        if (inner := f"{self.__name__}.{name}") in sys.modules:
            return sys.modules[inner]
        if not name.startswith("__"):
            for home in self._homes:
                module = importlib.import_module(f"fxexpand.{home}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return [name for home in self._homes for name in dir(importlib.import_module(f"fxexpand.{home}"))]


# An entry of sys.modules is found before the folder is looked at, and is not bound to a name in this module,
# where ``report`` and ``factorize`` are functions.
sys.modules.update({f"{__name__}.{old}": _Moved(f"{__name__}.{old}", new) for old, new in MOVED.items()})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        if not hasattr(home, name):  # a module of a package, which the package does not load: checkpoint
            importlib.import_module(f"{home.__name__}.{name}")
        value = getattr(home, name)
    elif not name.startswith("_") and (
        name in MOVED or importlib.util.find_spec(f"{__name__}.{name}") is not None
    ):
        value = importlib.import_module(f"{__name__}.{name}")  # fxexpand.passes, without importing it by name
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
