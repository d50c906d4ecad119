"""Affine maps along the channels, before their numbers are needed.

A map is a tree: its leaves give kernels, and "after", "plus" and "beside" join them. Its geometry is known on
the meta device once the numbers of channels and of spatial dimensions are; the weights are computed once, in
float64, when a fold is decided. A leaf such as ``x / 2`` or zero padding fits any number of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fxexpand.errors import InexactError
from fxexpand.kernel import algebra as laws
from fxexpand.kernel.algebra import Kernel

MIXED = "it takes channels along another dimension"


class ApartError(InexactError):
    """Two maps stay apart by their nature; no change of the model would let them merge."""


@dataclass(frozen=True)
class Place:
    """Where a map is applied: channels of its input, spatial dimensions, and the device of its weights."""

    channels: int
    rank: int
    device: torch.device


META = torch.device("meta")


@dataclass(frozen=True, eq=False)
class Map:
    """An affine map: a leaf, or two maps joined.

    Attributes:
        rank: spatial dimensions after the channels; None: any.
        inputs: channels of the input; None: any.
        outputs: channels of the output; None: those of the input.
        leaf: gives the kernel, on the meta device or in float64.
        node: how two maps are joined, and these.
        shape: the kernel on the meta device; None while rank or inputs are open.
    """

    rank: int | None = None
    inputs: int | None = None
    outputs: int | None = None
    leaf: Callable[[Place], Kernel] | None = None
    node: tuple[Literal["after", "plus", "beside"], Map, Map] | None = None
    shape: Kernel | None = None

    def __post_init__(self) -> None:
        if self.shape is None and self.leaf is not None and None not in (self.rank, self.inputs):
            assert self.rank is not None and self.inputs is not None
            object.__setattr__(self, "shape", self.leaf(Place(self.inputs, self.rank, META)))

    def given(self, channels: int) -> int:
        """Channels of the output for ``channels`` of the input."""
        return channels if self.outputs is None else self.outputs

    def at(self, place: Place) -> Kernel:
        """The kernel at a place. Without recursion: a chain of a thousand layers has a thousand levels."""
        if place.device == META and self.shape is not None:
            return self.shape
        done: list[Kernel] = []
        todo: list[tuple[Map, Place, bool]] = [(self, place, False)]
        while todo:
            tree, here, ready = todo.pop()
            if tree.leaf is not None:
                done.append(tree.leaf(here))
                continue
            assert tree.node is not None
            how, one, two = tree.node
            if ready:
                second, first = done.pop(), done.pop()
                done.append(_join(how, first, second))
                continue
            there = replace(here, channels=two.given(here.channels)) if how == "after" else here
            todo += [(tree, here, True), (two, here, False), (one, there, False)]
        return done.pop()


def after(outer: Map, inner: Map) -> Map:
    """``outer`` after ``inner``.

    Raises: InexactError with the reason.
    """
    if inner.outputs is None and inner.inputs is None:
        inner = replace(inner, inputs=outer.inputs, shape=None)
    rank, given = _common(outer.rank, inner.rank), inner.outputs or inner.inputs
    if None not in (given, outer.inputs) and given != outer.inputs:
        raise ApartError(f"it takes {outer.inputs} channels and gets {given}.")
    return _joined("after", outer, inner, rank, inner.inputs, outer.outputs or inner.outputs)


def plus(one: Map, two: Map) -> Map:
    """The sum of two maps of one value.

    Raises: InexactError with the reason.
    """
    rank, inputs = _common(one.rank, two.rank), one.inputs or two.inputs
    gives = [m.outputs or m.inputs or inputs for m in (one, two)]
    if None not in gives and gives[0] != gives[1]:
        raise InexactError(f"the terms have {gives[0]} and {gives[1]} channels.")
    outputs = None if one.outputs is None and two.outputs is None else gives[0]
    return _joined("plus", one, two, rank, inputs, outputs)


def beside(one: Map, two: Map) -> Map:
    """The outputs of two maps of one value stacked on the channels.

    Raises: InexactError with the reason.
    """
    rank, inputs = _common(one.rank, two.rank), one.inputs or two.inputs
    gives = [m.outputs or inputs for m in (one, two)]
    if gives[0] is None or gives[1] is None:
        raise ApartError("how many channels are stacked is not known.")
    return _joined("beside", one, two, rank, inputs, gives[0] + gives[1])


def fitted(moved: Map, beside: Map) -> Map:
    """A pointwise map with the rank of the map beside it, and with its channels where those are open.

    Raises: InexactError: ``moved`` is not pointwise, or the rank or the channels are known of neither.
    """
    rank = beside.rank
    own = moved.rank if moved.rank is not None else rank
    channels = moved.inputs if moved.inputs is not None else beside.inputs or beside.outputs
    if rank is None or own is None or channels is None:
        raise ApartError("its input is rearranged, and its channels are not known.")
    if not moved.at(Place(channels, own, META)).pointwise:
        raise ApartError("its input is rearranged, and it reads more than one position.")
    if own == rank:
        return moved

    def leaf(place: Place) -> Kernel:
        kernel = moved.at(replace(place, rank=own))
        weight = kernel.weight.reshape(*kernel.weight.shape[:2], *(1,) * rank)
        return Kernel(weight, kernel.bias, groups=kernel.groups)

    return Map(rank, moved.inputs, moved.outputs, leaf)


def scaling(factor: Callable[[torch.device], Tensor] | float, channels: int | None, rank: int | None) -> Map:
    """``factor * x``, with a number or one per channel."""

    def leaf(place: Place) -> Kernel:
        if isinstance(factor, float):
            values = torch.full((place.channels,), factor, dtype=torch.float64, device=place.device)
        elif place.device == META:
            values = torch.empty(place.channels, dtype=torch.float64, device=META)
        else:
            values = factor(place.device).expand(place.channels)
        return Kernel(values.reshape(-1, 1, *(1,) * place.rank), groups=place.channels)

    return Map(rank, channels, None, leaf)


def shifting(shift: Callable[[torch.device], Tensor] | float, channels: int | None, rank: int | None) -> Map:
    """``x + shift``, with a number or one per channel."""

    def leaf(place: Place) -> Kernel:
        if place.device == META or isinstance(shift, float):
            filled = shift if isinstance(shift, float) else 0.0
            values = torch.full((place.channels,), filled, dtype=torch.float64, device=place.device)
        else:
            values = shift(place.device).expand(place.channels)
        ones = torch.ones(place.channels, 1, *(1,) * place.rank, dtype=torch.float64, device=place.device)
        return Kernel(ones, values.clone(), groups=place.channels)

    return Map(rank, channels, None, leaf)


def identity() -> Map:
    """The identity on any value."""
    return scaling(1.0, None, None)


def _joined(
    how: Literal["after", "plus", "beside"],
    one: Map,
    two: Map,
    rank: int | None,
    inputs: int | None,
    outputs: int | None,
) -> Map:
    shape = None
    if rank is not None and inputs is not None:
        place = Place(inputs, rank, META)
        there = replace(place, channels=two.given(inputs)) if how == "after" else place
        shape = _join(how, one.at(there), two.at(place))
    return Map(rank, inputs, outputs, None, (how, one, two), shape)


def _join(how: str, one: Kernel, two: Kernel) -> Kernel:
    if how == "after":
        return laws.compose(one, two)
    if how == "plus":
        return laws.add(one, two)
    return laws.concat([one, two])


def _common(one: int | None, two: int | None) -> int | None:
    if one is None or two is None or one == two:
        return two if one is None else one
    raise ApartError(MIXED + ".")
