"""Rows of arithmetic: sums, scales and shifts, and what works on every number by itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from fxexpand.errors import InexactError
from fxexpand.passes.affine.maps import after, scaling, shifting
from fxexpand.passes.affine.steps import Affine, Identity, Layout, Step, Sum
from fxexpand.passes.operators.channels import stacked_terms
from fxexpand.passes.operators.sizes import ONE, Shape, Size, broadcast, listed, reduced
from fxexpand.passes.operators.table import Call, Constants, Values, row, rows

# The numbers that a value is scaled with or shifted by, one in all or one per channel; how many channels,
# and how many dimensions come after these.
Factor: TypeAlias = "tuple[Callable[[torch.device], Tensor] | float, int | None, int | None]"


def factor_of(constants: Constants, constant: Any, sign: float, inverse: bool = False) -> Factor | None:
    """A constant that has one value per channel, or one in all; None for any other.

    The dimensions of a constant are those of the value counted from the last: (C, 1, 1) has the channels
    where a Conv2d has them.

    Raises: InexactError: it holds NaN or Inf, as the mask of a head may.
    """
    if isinstance(constant, int | float) and not isinstance(constant, bool):
        finite = math.isfinite(constant) and not (inverse and constant == 0)
        return (sign / constant if inverse else sign * constant, None, None) if finite else None
    if not isinstance(constant, fx.Node) or constants.dtype(constant).is_complex:
        return None
    shape = constants.shape(constant)
    wide = [i for i, size in enumerate(shape) if size != 1]
    if len(wide) > 1:
        return None

    def numbers(device: torch.device) -> Tensor:
        values = constants.value(constant).reshape(-1).to(device, torch.float64)
        return sign / values if inverse else sign * values

    found = numbers(constants.value(constant).device)
    if not found.is_meta and not bool(torch.isfinite(found).all()):
        raise InexactError("it holds NaN or Inf, or divides by zero.")
    if not wide:
        return numbers, None, None
    return numbers, shape[wide[0]], len(shape) - 1 - wide[0]


def same(call: Call, before: Shape, values: Values) -> Shape:
    """The shape of the first argument."""
    return before


def _broadcast(call: Call, before: Shape, values: Values) -> Shape | None:
    other = values.shape(call.get("other", 0))
    return None if other is None else broadcast(before, other)


def _factor(
    value: fx.Node, constant: Any, values: Values, sign: float, inverse: bool = False
) -> Factor | None:
    """The factor or shift of ``value``, which keeps its shape."""
    factor = factor_of(values.constants, constant, sign, inverse)
    if factor is None or not isinstance(constant, fx.Node):
        return factor
    shape, example = values.shape(value), values.recorded(value)
    dims = len(values.constants.shape(constant))
    _, channels, rank = factor
    # Of unknown shapes only a convolution's is taken to have a batch, in front of the channels.
    least = len(shape) if shape is not None else rank + 2 if rank else 1
    if least < dims:
        have = least if shape is not None else "a number that is not known"
        raise InexactError(f"it makes {dims} dimensions of {have}.")
    if channels is not None and rank is not None:
        single = shape is not None and shape[-1 - rank] == ONE
        if single or (example is not None and example[-1 - rank] == 1):
            raise InexactError(f"it makes {channels} channels of one.")
    return factor


def _added(call: Call, values: Values, sign: float) -> Step | None:
    """``x + alpha y``: the sum of two values, or a value shifted by a constant."""
    alpha = call.get("alpha", 1)
    if not isinstance(alpha, int | float):
        return None
    signed = [(call["input"], 1.0), (call.get("other"), sign * float(alpha))]
    terms = [(value, factor) for value, factor in signed if values.varies(value)]
    if len(terms) == 2 and terms[0][0] is terms[1][0]:  # x + x, x - x
        return Affine(terms[0][0], scaling(terms[0][1] + terms[1][1], None, None))
    if len(terms) == 2:
        return Sum(tuple((value, scaling(factor, None, None)) for value, factor in terms))
    if len(terms) != 1:
        return None
    value, factor = terms[0]
    constant, constant_sign = next(pair for pair in signed if pair[0] is not value)
    shift = _factor(value, constant, values, constant_sign)
    if shift is None:
        return None
    scaled = scaling(factor, None, None)
    return Affine(value, scaled if shift[0] == 0 else after(shifting(*shift), scaled))


def _scaled(value: Any, constant: Any, values: Values, inverse: bool = False) -> Step | None:
    if not values.varies(value) or values.varies(constant):
        return None
    factor = _factor(value, constant, values, 1.0, inverse)
    return None if factor is None else Affine(value, scaling(*factor))


@row("add", "input other alpha", shape=_broadcast, keeps="larger", fresh=True)
def _add(call: Call, values: Values) -> Step | None:
    return _added(call, values, 1.0)


@row("sub subtract", "input other alpha", shape=_broadcast, keeps="larger", fresh=True)
def _sub(call: Call, values: Values) -> Step | None:
    return _added(call, values, -1.0)


_exchanged = {"self": "other", "input": "other", "other": "input"}
row("rsub", "other input alpha", keywords=_exchanged, shape=_broadcast, keeps="larger", fresh=True)(_sub)


def _product(call: Call, values: Values) -> Size | None:
    one, two = values.size(call["input"]), values.size(call.get("other"))
    return None if one is None or two is None else one * two


@row("mul multiply", "input other", shape=_broadcast, size=_product, keeps="larger", fresh=True)
def _mul(call: Call, values: Values) -> Step | None:
    one, two = call["input"], call.get("other")
    return _scaled(one, two, values) or _scaled(two, one, values)


@row("div divide true_divide truediv", "input other", shape=_broadcast, keeps="larger", fresh=True)
def _div(call: Call, values: Values) -> Step | None:
    return _scaled(call["input"], call.get("other"), values, inverse=True)


@row("neg negative", shape=same, keeps="first", fresh=True)
def _neg(call: Call, values: Values) -> Step:
    return Affine(call["input"], scaling(-1.0, None, None))


def _quotient(call: Call, values: Values) -> Size | None:
    one, two = values.size(call["input"]), values.size(call.get("other"))
    return None if one is None or two is None else one.over(two)


row("floordiv floor_divide", "input other", size=_quotient)


# The value itself ---------------------------------------------------------------------------------


def _identity(call: Call, values: Values) -> Step:
    return Identity(call["input"])


row("detach alias", shape=same, keeps="first")(_identity)
row("contiguous", "input memory_format", shape=same, keeps="first")(_identity)
row("clone", "input memory_format", shape=same, keeps="first", fresh=True)(_identity)


def _dropout(call: Call, values: Values) -> Step | None:
    """The value itself while nothing is dropped."""
    idle = call.get("training", True) is False or call.get("p", 0.5) == 0.0
    return Identity(call["input"]) if idle else None


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
row("identity", modules=(nn.Identity, "DropPath", "StochasticDepth"), shape=same)
for _module in DROPOUTS:
    _name = re.sub("(?<!^)(?=[A-Z])", "_", _module.__name__).lower()  # AlphaDropout: alpha_dropout
    row(_name, "input p training inplace", modules=(_module,), shape=same)(_dropout)
row("feature_dropout", "input p training inplace", shape=same)(_dropout)


# Sums and means -----------------------------------------------------------------------------------


def _reduced_shape(call: Call, before: Shape, values: Values) -> Shape | None:
    dims = listed(call.get("dim"))
    return None if dims is None else reduced(before, dims, call.get("keepdim", False))


def _mean_of_stack(call: Call, values: Values, mean: bool) -> Step | None:
    """The sum or the mean of stacked values."""
    parts = stacked_terms(call["input"], values)
    if parts is None or not call.given("input", "dim", "keepdim"):
        return None
    return Sum(tuple((part, scaling(1.0 / len(parts) if mean else 1.0, None, None)) for part in parts))


row("sum", "input dim keepdim dtype", shape=_reduced_shape, fresh=True)(partial(_mean_of_stack, mean=False))


@row("mean", "input dim keepdim dtype", shape=_reduced_shape, fresh=True)
def _mean(call: Call, values: Values) -> Step | None:
    """The mean of stacked values, and the mean over positions."""
    x, dims, keep = call["input"], listed(call.get("dim")), call.get("keepdim", False)
    shape, stacked = values.shape(x), _mean_of_stack(call, values, mean=True)
    if stacked is not None or shape is None or dims is None or not call.given("input", "dim", "keepdim"):
        return stacked
    ndim = len(shape)
    gone = sorted(dim % ndim for dim in dims)

    def moves(rank: int) -> int | None:
        at = ndim - 1 - rank
        if at in gone or at < 0:
            return None
        return rank if keep else rank - sum(dim > at for dim in gone)

    return Layout(x, moves, averages=True)


# Every number by itself, and norms: the shape stays, nothing is affine ----------------------------

_activations = [
    kind
    for kind in vars(nn.modules.activation).values()
    if isinstance(kind, type) and kind.__module__ == nn.modules.activation.__name__
    if kind not in (nn.MultiheadAttention, nn.GLU)
]
row("activation", modules=_activations, shape=same, fresh=True)
rows(
    "relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid leaky_relu elu softmax log_softmax softplus "
    "mish exp hardtanh clamp sqrt rsqrt",
    shape=same,
    fresh=True,
)
# The parameter that goes in, cast, turned round or normalised.
rows(
    "to type type_as float double half bfloat16 data real flip roll normalize group_norm instance_norm "
    "rms_norm",
    shape=same,
    keeps="first",
)
_norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
row("layer_norm", open=True, modules=_norms, subclasses=True, shape=same, keeps="first", fresh=True)
