"""The ways in which a value of a graph is an affine map of an earlier value, and what each costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import fx

from fxexpand.passes.affine.maps import Map


@dataclass(frozen=True, eq=False)
class Candidate:
    """A value of the graph as a map of an earlier value.

    Attributes:
        source: the value that the map reads.
        map: the map, applied between ``before`` and ``after``.
        own, parts: the nodes and the merged candidates that compute the value.
        start, stop: the places of the first and the last of these nodes in the graph.
        last: the place of the last node that reads the source.
        layer: the first Linear or convolution; of branches, that of the branch with most multiply-adds.
        before, after: changes of layout of the source, and of the result of the map.
        rank: spatial dimensions of the source, where ``before`` is not empty.
        macs_after: multiply-adds of the one kernel, per position of the source.
        macs_before: those of the nodes that it replaces and no other node reads.
        density: positions of the value per position of the source.
        computed: a weight is computed at every call.
        shared: it repeats nodes that are read elsewhere too, so that nothing before them is saved.
        trivial: it passes a value on, or changes its layout, and computes nothing.
        devices: the devices of its tensors.
        dtypes: those of its weights and of the constants that decide on the dtype of the result.
        credited: values that are counted in ``macs_before`` since no other node reads them; see ``credits``.
    """

    source: fx.Node
    map: Map
    own: tuple[fx.Node, ...]
    start: int
    last: int
    stop: int
    parts: tuple[Candidate, ...] = ()
    layer: fx.Node | None = None
    before: tuple[fx.Node, ...] = ()
    after: tuple[fx.Node, ...] = ()
    rank: int | None = None
    macs_after: Fraction = Fraction(0)
    macs_before: Fraction = Fraction(0)
    density: Fraction = Fraction(1)
    computed: bool = False
    shared: bool = False
    trivial: bool = False
    devices: frozenset[torch.device] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset()
    credited: tuple[fx.Node, ...] = ()

    @property
    def profitable(self) -> bool:
        """Whether the one kernel costs no more than the nodes that it replaces."""
        return self.layer is None or self.macs_after <= self.macs_before

    @property
    def least_macs(self) -> Fraction:
        """The multiply-adds of the value, folded or as it was."""
        return min(self.macs_after, self.macs_before)

    @cached_property
    def nodes(self) -> dict[fx.Node, None]:
        """The nodes that compute the value."""
        return dict.fromkeys(self.each())

    @cached_property
    def credits(self) -> set[fx.Node]:
        """The values whose multiply-adds it saves, since no other node reads them."""
        return {node for candidate in self._tree() for node in candidate.credited}

    def each(self) -> Iterator[fx.Node]:
        """The nodes that compute the value, without order, some more than once: to look at a few of many."""
        return (node for candidate in self._tree() for node in candidate.own)

    def _tree(self) -> Iterator[Candidate]:
        todo = [self]
        while todo:
            candidate = todo.pop()
            yield candidate
            todo.extend(candidate.parts)
