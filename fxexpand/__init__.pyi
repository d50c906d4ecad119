"""The contents page: the public names by the module that offers them. ``__init__.py`` reads it too."""

# ruff: noqa: I001 (one import per module)

from fxexpand.deploy import (
    OnnxReport as OnnxReport,
    check_int8 as check_int8,
    export_onnx as export_onnx,
    weight_ranges as weight_ranges,
)
from fxexpand.deploy.latency import LatencyReport as LatencyReport, measure_latency as measure_latency
from fxexpand.errors import (
    FxExpandError as FxExpandError,
    InexactError as InexactError,
    RefusedError as RefusedError,
    SelectionError as SelectionError,
    UnusableWeightError as UnusableWeightError,
    VerificationError as VerificationError,
)
from fxexpand.layers.accumulation import accumulate as accumulate
from fxexpand.layers.param_groups import param_groups as param_groups
from fxexpand.lowrank import (
    RankTracker as RankTracker,
    TrainedRankPruning as TrainedRankPruning,
    effective_rank as effective_rank,
    kernel_rank as kernel_rank,
    rank_report as rank_report,
)
from fxexpand.recipes import (
    DBB as DBB,
    OREPA as OREPA,
    ACNet as ACNet,
    Chain as Chain,
    DOConv as DOConv,
    ExpandNetCK as ExpandNetCK,
    ExpandNetCL as ExpandNetCL,
    ExpandNetFC as ExpandNetFC,
    MobileOne as MobileOne,
    Recipe as Recipe,
    RepVGG as RepVGG,
)
from fxexpand.reporting.rows import Report as Report
from fxexpand.running.flops import FlopReport as FlopReport, count_flops as count_flops
from fxexpand.surgery.expand import expand as expand
from fxexpand.surgery.factorize import cuts as cuts, factorize as factorize
from fxexpand.surgery.fold import fused_state_dict as fused_state_dict
from fxexpand.surgery.fuse import fuse as fuse
from fxexpand.surgery.transaction import report as report
from fxexpand.training import checkpoint as checkpoint

CONTENTS: dict[str, tuple[str, ...]]
MOVED: dict[str, str]
__version__: str
__all__: list[str]
