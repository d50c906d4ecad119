"""Affine maps as values: when two of them compose to one kernel, and its numbers.

``geometry`` decides whether a composition is exact and gives its stride, padding and dilation; ``alignment``
does so for a sum; ``taps`` has the laws on weights, ``algebra`` those on ``Kernel``; ``modules`` reads the
kernel of a torch layer, ``library_layers`` that of a layer of another library; ``lower`` makes the layer of a
kernel.
"""

from fxexpand.kernel.algebra import (
    FLOATING,
    Kernel,
    add,
    apply,
    cast,
    compose,
    compose_all,
    concat,
    identity,
    macs,
    native_weight,
    regroup,
    scale,
    split,
)
from fxexpand.kernel.lower import is_channels_last, laid_out_as, to_module
from fxexpand.kernel.modules import LAYERS, NORMS, describe, kernel_of
from fxexpand.kernel.taps import exchanged

__all__ = ["FLOATING", "LAYERS", "NORMS", "Kernel", "add", "apply", "cast", "compose", "compose_all"]
__all__ += ["concat", "describe", "exchanged", "identity", "is_channels_last", "kernel_of", "laid_out_as"]
__all__ += ["macs", "native_weight", "regroup", "scale", "split", "to_module"]
