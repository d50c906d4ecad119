"""Rows of pools and borders."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel
from fxexpand.passes.affine.maps import Map, Place, identity
from fxexpand.passes.affine.steps import Affine, Layout, Step
from fxexpand.passes.operators.sizes import Shape, Size, one_per_dimension
from fxexpand.passes.operators.table import Call, Values, row


def _window_shape(call: Call, before: Shape, values: Values) -> Shape:
    return (*before[:2], *values.fresh(call, len(before))[2:])


def _averaged(call: Call, note: str | None = None) -> Layout:
    """An average over the last dimensions, as many as the name says: the channels must not be among them."""
    rank = int(call.name[-2])
    return Layout(call["input"], lambda given: given if given >= rank else None, averages=True, note=note)


def _pool(call: Call, values: Values) -> Step | None:
    """A convolution with 1 / k² everywhere, or a weighted average that a pointwise map commutes with."""
    x, rank = call["input"], int(call.name[-2])
    size = one_per_dimension(call["kernel_size"], rank)
    stride = one_per_dimension(call.get("stride") or call["kernel_size"], rank)
    around = one_per_dimension(call.get("padding", 0), rank)
    if size is None or stride is None or around is None or call.get("divisor_override") is not None:
        return None
    counted = call.get("count_include_pad", True) is True or not any(around)
    if call.get("ceil_mode", False) or not counted:
        # Every output is an average of what it reads.
        option = "count_include_pad=False" if not counted else "ceil_mode=True"
        note = f"an average over windows that are cut at the border ({option}) is no kernel."
        if any(around) and counted:
            raise InexactError(note)
        return _averaged(call, note)

    def leaf(place: Place) -> Kernel:
        weight = torch.full(
            (place.channels, 1, *size), 1 / math.prod(size), dtype=torch.float64, device=place.device
        )
        sides = tuple((p, p) for p in around)
        return Kernel(weight, None, stride=stride, padding=sides, groups=place.channels)

    return Affine(x, Map(rank, None, None, leaf), averages=not any(around))


def _global_shape(call: Call, before: Shape, values: Values) -> Shape:
    wanted, fresh = (
        one_per_dimension(call["output_size"], len(before) - 2),
        values.fresh(call, len(before))[2:],
    )
    return (*before[:2], *(fresh if wanted is None else map(Size, wanted)))


def _global(call: Call, values: Values) -> Step:
    return _averaged(call)


for _rank, _average, _max, _adaptive in (
    (1, nn.AvgPool1d, nn.MaxPool1d, nn.AdaptiveAvgPool1d),
    (2, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
    (3, nn.AvgPool3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d),
):
    _options = "input kernel_size stride padding ceil_mode count_include_pad"
    _options += " divisor_override" if _rank > 1 else ""
    row(f"avg_pool{_rank}d", _options, modules=(_average,), shape=_window_shape, fresh=True)(_pool)
    row(f"max_pool{_rank}d", open=True, modules=(_max,), shape=_window_shape, fresh=True)
    row(
        f"adaptive_avg_pool{_rank}d",
        "input output_size",
        modules=(_adaptive,),
        shape=_global_shape,
        fresh=True,
    )(_global)


def _padded_shape(call: Call, before: Shape, values: Values) -> Shape:
    return values.fresh(call, len(before))


def _padded(call: Call, values: Values) -> Step | None:
    """Zeros around the last dimensions; torch counts from the last one."""
    sides = call["pad"]
    if call.get("mode", "constant") != "constant" or call.get("value") not in (None, 0, 0.0):
        return None
    if not isinstance(sides, list | tuple) or not all(isinstance(side, int) for side in sides):
        return None
    pairs = [(sides[i], sides[i + 1]) for i in range(0, len(sides), 2)][::-1]

    def leaf(place: Place) -> Kernel:
        if any(any(pair) for pair in pairs[: max(0, len(pairs) - place.rank)]):
            raise InexactError("it pads the channels too.")
        around = ((0, 0),) * (place.rank - len(pairs)) + tuple(pairs[max(0, len(pairs) - place.rank) :])
        return replace(identity().at(place), padding=around)

    return Affine(call["input"], Map(None, None, None, leaf))


def _of_padding(module: Any) -> dict[str, Any]:
    return {"pad": module.padding, "value": getattr(module, "value", 0.0)}


_paddings = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_modules = dict.fromkeys(_paddings, _of_padding)
row("pad", "input pad mode value", modules=_modules, shape=_padded_shape, keeps="first", fresh=True)(_padded)
row("constant_pad_nd", "input pad value", shape=_padded_shape, keeps="first", fresh=True)(_padded)
