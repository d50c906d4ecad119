"""Expand a network's layers into linear chains for training, and fuse them back exactly.

The contents page: what ``import fxexpand`` offers. Each name is documented where it is defined, and is loaded
when it is first used (PEP 562), so that ``import fxexpand`` alone does not load torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxexpand.accumulation import accumulate
    from fxexpand.compression import TrainedRankPruning
    from fxexpand.errors import (
        FxExpandError,
        InexactError,
        RefusedError,
        SelectionError,
        UnusableWeightError,
        VerificationError,
    )
    from fxexpand.export import OnnxReport, check_int8, export_onnx, weight_ranges
    from fxexpand.factorize import cuts, factorize
    from fxexpand.flops import FlopReport, count_flops
    from fxexpand.latency import LatencyReport, measure_latency
    from fxexpand.optim import param_groups
    from fxexpand.pipeline import expand, fuse, fused_state_dict, report
    from fxexpand.rank import RankTracker, effective_rank, kernel_rank, rank_report
    from fxexpand.recipes import (
        DBB,
        OREPA,
        ACNet,
        Chain,
        DOConv,
        ExpandNetCK,
        ExpandNetCL,
        ExpandNetFC,
        MobileOne,
        Recipe,
        RepVGG,
    )
    from fxexpand.report import Report
    from fxexpand.training import checkpoint

__version__ = "0.1.0"

# The module of each name: the imports above, for the interpreter. tests/test_public_api.py compares the two.
_HOMES = {
    "DBB": "recipes",
    "OREPA": "recipes",
    "ACNet": "recipes",
    "Chain": "recipes",
    "DOConv": "recipes",
    "ExpandNetCK": "recipes",
    "ExpandNetCL": "recipes",
    "ExpandNetFC": "recipes",
    "FlopReport": "flops",
    "FxExpandError": "errors",
    "InexactError": "errors",
    "LatencyReport": "latency",
    "MobileOne": "recipes",
    "OnnxReport": "export",
    "RankTracker": "rank",
    "Recipe": "recipes",
    "RefusedError": "errors",
    "RepVGG": "recipes",
    "Report": "report",
    "SelectionError": "errors",
    "TrainedRankPruning": "compression",
    "UnusableWeightError": "errors",
    "VerificationError": "errors",
    "accumulate": "accumulation",
    "check_int8": "export",
    "checkpoint": "training",
    "count_flops": "flops",
    "cuts": "factorize",
    "effective_rank": "rank",
    "expand": "pipeline",
    "export_onnx": "export",
    "factorize": "factorize",
    "fuse": "pipeline",
    "fused_state_dict": "pipeline",
    "kernel_rank": "rank",
    "measure_latency": "latency",
    "param_groups": "optim",
    "rank_report": "rank",
    "report": "pipeline",
    "weight_ranges": "export",
}

__all__ = [
    "DBB",
    "OREPA",
    "ACNet",
    "Chain",
    "DOConv",
    "ExpandNetCK",
    "ExpandNetCL",
    "ExpandNetFC",
    "FlopReport",
    "FxExpandError",
    "InexactError",
    "LatencyReport",
    "MobileOne",
    "OnnxReport",
    "RankTracker",
    "Recipe",
    "RefusedError",
    "RepVGG",
    "Report",
    "SelectionError",
    "TrainedRankPruning",
    "UnusableWeightError",
    "VerificationError",
    "__version__",
    "accumulate",
    "check_int8",
    "checkpoint",
    "count_flops",
    "cuts",
    "effective_rank",
    "expand",
    "export_onnx",
    "factorize",
    "fuse",
    "fused_state_dict",
    "kernel_rank",
    "measure_latency",
    "param_groups",
    "rank_report",
    "report",
    "weight_ranges",
]


if not TYPE_CHECKING:  # or type checkers would accept every name

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
            if not hasattr(home, name):  # a module of a package, which the package does not load: checkpoint
                importlib.import_module(f"{home.__name__}.{name}")
            value = getattr(home, name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            value = importlib.import_module(
                f"{__name__}.{name}"
            )  # fxexpand.passes, without importing it by name
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Contents(ModuleType):
    """Where a public name is that of a module too, it stays the public one.

    Python binds every submodule to its name in the package when it is imported: after ``import
    fxexpand.report``, the function ``fxexpand.report`` would be gone.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Contents
