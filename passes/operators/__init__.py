"""The operator table: one row an operator, under every spelling, with all that is known of it.

``table`` has the columns of a row and finds the row of a call; ``sizes`` computes with sizes of dimensions.
The rows are in ``arithmetic`` (sums, scales, what works on every number), ``layers`` (weights, norms,
pools, borders), ``pooling`` (pools and borders), ``layout`` (exchanges of dimensions, reshapes) and
``channels`` (stacking, splitting, selecting).
"""

from fxexpand.passes.operators import arithmetic, channels, layers, layout, pooling
from fxexpand.passes.operators.table import SYNONYMS, Call, Operator, Weight, bind, call_of, row

__all__ = [
    "SYNONYMS",
    "Call",
    "Operator",
    "Weight",
    "arithmetic",
    "bind",
    "call_of",
    "channels",
    "layers",
    "layout",
    "pooling",
    "row",
]
