"""Expand a network's layers into linear chains for training, and fuse them back exactly.

The contents page: what ``import fxexpand`` offers. Each name is documented where it is defined.
"""

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
from fxexpand.pipeline import expand, fuse, fused_state_dict, report
from fxexpand.rank import effective_rank, rank_report
from fxexpand.recipes import Chain, Recipe
from fxexpand.report import Report

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "FlopReport",
    "FxExpandError",
    "InexactError",
    "LatencyReport",
    "OnnxReport",
    "Recipe",
    "RefusedError",
    "Report",
    "SelectionError",
    "UnusableWeightError",
    "VerificationError",
    "__version__",
    "count_flops",
    "effective_rank",
    "expand",
    "export_onnx",
    "fuse",
    "fused_state_dict",
    "measure_latency",
    "rank_report",
    "report",
]
