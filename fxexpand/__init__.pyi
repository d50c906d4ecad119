"""The contents page for type checkers; tests/test_public_api.py compares it with ``CONTENTS``."""

from fxexpand.deploy import (
    OnnxReport as OnnxReport,
)
from fxexpand.deploy import (
    check_int8 as check_int8,
)
from fxexpand.deploy import (
    export_onnx as export_onnx,
)
from fxexpand.deploy import (
    weight_ranges as weight_ranges,
)
from fxexpand.deploy.latency import LatencyReport as LatencyReport
from fxexpand.deploy.latency import measure_latency as measure_latency
from fxexpand.errors import (
    FxExpandError as FxExpandError,
)
from fxexpand.errors import (
    InexactError as InexactError,
)
from fxexpand.errors import (
    RefusedError as RefusedError,
)
from fxexpand.errors import (
    SelectionError as SelectionError,
)
from fxexpand.errors import (
    UnusableWeightError as UnusableWeightError,
)
from fxexpand.errors import (
    VerificationError as VerificationError,
)
from fxexpand.layers.accumulation import accumulate as accumulate
from fxexpand.layers.param_groups import param_groups as param_groups
from fxexpand.lowrank import (
    RankTracker as RankTracker,
)
from fxexpand.lowrank import (
    TrainedRankPruning as TrainedRankPruning,
)
from fxexpand.lowrank import (
    effective_rank as effective_rank,
)
from fxexpand.lowrank import (
    kernel_rank as kernel_rank,
)
from fxexpand.lowrank import (
    rank_report as rank_report,
)
from fxexpand.recipes import (
    DBB as DBB,
)
from fxexpand.recipes import (
    OREPA as OREPA,
)
from fxexpand.recipes import (
    ACNet as ACNet,
)
from fxexpand.recipes import (
    Chain as Chain,
)
from fxexpand.recipes import (
    DOConv as DOConv,
)
from fxexpand.recipes import (
    ExpandNetCK as ExpandNetCK,
)
from fxexpand.recipes import (
    ExpandNetCL as ExpandNetCL,
)
from fxexpand.recipes import (
    ExpandNetFC as ExpandNetFC,
)
from fxexpand.recipes import (
    MobileOne as MobileOne,
)
from fxexpand.recipes import (
    Recipe as Recipe,
)
from fxexpand.recipes import (
    RepVGG as RepVGG,
)
from fxexpand.reporting.rows import Report as Report
from fxexpand.running.flops import FlopReport as FlopReport
from fxexpand.running.flops import count_flops as count_flops
from fxexpand.surgery.expand import expand as expand
from fxexpand.surgery.factorize import cuts as cuts
from fxexpand.surgery.factorize import factorize as factorize
from fxexpand.surgery.fold import fused_state_dict as fused_state_dict
from fxexpand.surgery.fuse import fuse as fuse
from fxexpand.surgery.transaction import report as report
from fxexpand.training import checkpoint as checkpoint

CONTENTS: dict[str, tuple[str, ...]]
MOVED: dict[str, str]
__version__: str
__all__: list[str]
