"""Graphs of models: refused rather than wrong.

``graphs`` makes the graph of a whole model or of its largest submodules that have one, ``tracer`` is fx's
with the leaves any network needs, ``guards`` raises where a graph does not hold, ``export`` takes that of
torch.export, ``paths`` and ``submodules`` read other paths and parts, ``example_values`` knows sizes;
``edit`` is the only file that edits graphs.
"""

from fxexpand.tracing.graphs import Regions, fixes_arguments, record, regions, symbolic, trace
from fxexpand.tracing.guards import Mode, ModeGuard, UntraceableError, guard, mode_of, require_argument
from fxexpand.tracing.tracer import Leaf, RegionTracer, hooked

__all__ = [
    "Leaf",
    "Mode",
    "ModeGuard",
    "RegionTracer",
    "Regions",
    "UntraceableError",
    "fixes_arguments",
    "guard",
    "hooked",
    "mode_of",
    "record",
    "regions",
    "require_argument",
    "symbolic",
    "trace",
]
