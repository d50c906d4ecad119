"""Affine steps: the action of one node of a graph on its operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel
from fxexpand.passes.affine.maps import Map, Place


@dataclass(frozen=True)
class Affine:
    """A map of one value.

    Attributes:
        has_macs: it is a Linear or a convolution, whose multiply-adds count.
        computed: its weight is computed at every call, of nothing but constants.
        averages: every output is an average of what it reads, so that a pointwise map may also come after it.
    """

    operand: fx.Node
    map: Map
    has_macs: bool = False
    computed: bool = False
    averages: bool = False


@dataclass(frozen=True)
class Identity:
    """The value itself."""

    operand: fx.Node


@dataclass(frozen=True)
class Layout:
    """The same numbers, or averages of them, at other positions: pointwise maps may come before or after.

    Attributes:
        moves: from the number of spatial dimensions after the channels to that of the result; None where the
            channels are mixed with another dimension.
        averages: there are fewer positions afterwards.
        keeps_order: it is a reshape, which keeps the order of the numbers.
        like: a value of which it reads the shape alone.
        note: why no layer before it can be merged with what follows.
    """

    operand: fx.Node
    moves: Callable[[int], int | None]
    averages: bool = False
    keeps_order: bool = False
    like: fx.Node | None = None
    note: str | None = None


@dataclass(frozen=True)
class Sum:
    """The sum of maps of several values."""

    terms: tuple[tuple[fx.Node, Map], ...]


@dataclass(frozen=True)
class Concat:
    """Values stacked on the channels; ``rank`` is the number of dimensions after those."""

    operands: tuple[fx.Node, ...]
    rank: int | None


@dataclass(frozen=True)
class Select:
    """Some channels of a value, in some order; ``rows`` gives them for the number there are."""

    operand: fx.Node
    rows: Callable[[int], list[int] | None]
    rank: int

    def of(self, channels: int) -> Map:
        """The map: a kernel of zeros and ones.

        Raises: InexactError: which channels are taken is not known.
        """
        rows = self.rows(channels)
        if not rows:
            raise InexactError("which channels are taken is not known.")

        def leaf(place: Place) -> Kernel:
            weight = torch.zeros(len(rows), channels, dtype=torch.float64, device=place.device)
            if place.device.type != "meta":
                weight[torch.arange(len(rows)), rows] = 1.0
            return Kernel(weight.reshape(*weight.shape, *(1,) * place.rank))

        return Map(self.rank, channels, len(rows), leaf)


@dataclass(frozen=True)
class MultiOutput:
    """Several values in one, which the nodes that read it take apart or sum up."""


Step: TypeAlias = "Affine | Identity | Layout | Sum | Concat | Select | MultiOutput"
