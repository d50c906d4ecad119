"""Expand a network's layers into linear chains for training, and fuse them back exactly.

The contents page: what ``import fxexpand`` offers. Each name is documented where it is defined.
"""

from fxexpand.accumulation import accumulate
from fxexpand.errors import (
    FxExpandError,
    InexactError,
    RefusedError,
    SelectionError,
    UnusableWeightError,
    VerificationError,
)
from fxexpand.export import OnnxReport, export_onnx
from fxexpand.flops import FlopReport, count_flops
from fxexpand.latency import LatencyReport, measure_latency
from fxexpand.optim import param_groups
from fxexpand.pipeline import expand, fuse, fused_state_dict, report
from fxexpand.rank import effective_rank, rank_report
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

__version__ = "0.1.0"

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
    "Recipe",
    "RefusedError",
    "RepVGG",
    "Report",
    "SelectionError",
    "UnusableWeightError",
    "VerificationError",
    "__version__",
    "accumulate",
    "count_flops",
    "effective_rank",
    "expand",
    "export_onnx",
    "fuse",
    "fused_state_dict",
    "measure_latency",
    "param_groups",
    "rank_report",
    "report",
]
