"""A value of a graph as a map of an earlier one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import fx

from fxexpand.passes.affine.maps import Map


@dataclass(frozen=True, eq=False)
class Form:
    """A value of the graph as a map of an earlier one.

    Attributes:
        source: the value it is a map of.
        map: the map, at the place between ``before`` and ``after``.
        own, parts: what computes it: nodes, and the forms that were merged.
        start, stop: the places of the first and the last of its nodes in the graph.
        last: the place of the last that reads the source.
        layer: the first of them that is a Linear or a convolution; of branches, of the one that costs most.
        before, after: views of the source before the map applies, and of what it gives.
        rank: dimensions after the channels of the source, where ``before`` holds views.
        cost: multiply-adds per position of the source.
        paid: those of what it replaces, for the nodes that nobody else reads.
        density: positions of the value per position of the source.
        computed: a weight is computed at every call.
        shared: it computes again what others read too, so that nothing before that is saved.
        idle: nothing but what passes a value on or moves it.
        devices: where its tensors are.
        dtypes: of its weights and of the constants that decide on the dtype of the result.
        credited: values that it takes to be computed for nobody else; see ``credits``.
    """

    source: fx.Node
    map: Map
    own: tuple[fx.Node, ...]
    start: int
    last: int
    stop: int
    parts: tuple[Form, ...] = ()
    layer: fx.Node | None = None
    before: tuple[fx.Node, ...] = ()
    after: tuple[fx.Node, ...] = ()
    rank: int | None = None
    cost: Fraction = Fraction(0)
    paid: Fraction = Fraction(0)
    density: Fraction = Fraction(1)
    computed: bool = False
    shared: bool = False
    idle: bool = False
    devices: frozenset[torch.device] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset()
    credited: tuple[fx.Node, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether it costs no more than what it replaces."""
        return self.layer is None or self.cost <= self.paid

    @property
    def price(self) -> Fraction:
        """The multiply-adds that the value costs, in this form or as it was."""
        return min(self.cost, self.paid)

    @cached_property
    def nodes(self) -> dict[fx.Node, None]:
        """All that computes it."""
        return dict.fromkeys(self.each())

    @cached_property
    def credits(self) -> set[fx.Node]:
        """The values whose cost it saves, since nobody else reads them."""
        return {node for form in self._tree() for node in form.credited}

    def each(self) -> Iterator[fx.Node]:
        """The nodes that compute it, one after the other, some more than once: to look at a few of many."""
        return (node for form in self._tree() for node in form.own)

    def _tree(self) -> Iterator[Form]:
        todo = [self]
        while todo:
            form = todo.pop()
            yield form
            todo.extend(form.parts)
