"""Graphs of models: refused rather than wrong.

``graphs`` makes the graph of a whole model or of its largest submodules that have one; ``tracer`` is fx's
with the leaves that any network needs, and ``recording`` one trace with it; ``guards`` raise where a graph
does not hold; ``export`` makes graphs by torch.export; ``paths`` and ``submodules`` read other paths and
submodules; ``example_values`` computes sizes, ``classes`` tells types, ``stores`` finds values that a forward
keeps. ``edit`` is the only file that edits graphs.
"""

from fxexpand.tracing.graphs import Regions, attempt_symbolic, fixes_arguments, regions, symbolic, trace
from fxexpand.tracing.guards import Mode, ModeGuard, UntraceableError, guard, mode_of, require_argument
from fxexpand.tracing.recording import Failed, Traced, record
from fxexpand.tracing.tracer import Leaf, RegionTracer, TraceOptions, hooked

__all__ = [
    "Failed",
    "Leaf",
    "Mode",
    "ModeGuard",
    "RegionTracer",
    "Regions",
    "TraceOptions",
    "Traced",
    "UntraceableError",
    "attempt_symbolic",
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
