"""The changes of layout between two maps: where they put the channels, and which of them cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from fxexpand.passes.affine.maps import Map
from fxexpand.passes.affine.shapes import GraphValues
from fxexpand.passes.affine.steps import Affine, Layout, Step


class Layouts:
    """The layout steps of one graph. A rank is the number of spatial dimensions after the channels."""

    def __init__(self, steps: Mapping[fx.Node, Step], values: GraphValues) -> None:
        self._steps = steps
        self._values = values

    def rank_after(self, layouts: Sequence[fx.Node], rank: int) -> int | None:
        """The rank after some layouts of a value with ``rank``; None where channels are mixed."""
        after: int | None = rank
        for layout in layouts:
            step = self._steps[layout]
            if after is None:
                return None
            if isinstance(step, Layout):
                after = step.moves(after)
            elif isinstance(step, Affine) and after < (step.map.rank or 0):
                return None  # it averages over the channels too
        return after

    def rank_before(self, layouts: Sequence[fx.Node], inner: Map, outer: Map) -> int | None:
        """The rank of ``inner``, which the layouts bring to that of ``outer``."""
        if inner.rank is not None:
            return inner.rank
        return next((rank for rank in range(4) if self.rank_after(layouts, rank) == outer.rank), None)

    def averages(self, layout: fx.Node) -> bool:
        """Whether there are fewer positions after it."""
        step = self._steps[layout]
        return not isinstance(step, Layout) or step.averages

    def shortened(self, layouts: tuple[fx.Node, ...], given: Map) -> tuple[fx.Node, ...]:
        """The layouts of a result of ``given``, without the reshapes at the end that restore its shape."""
        now = self._values.shape(layouts[-1])
        for i in range(len(layouts)):
            steps = [self._steps[layout] for layout in layouts[i:]]
            if now is None or not all(isinstance(step, Layout) and step.keeps_order for step in steps):
                continue
            before = self._values.shape(layouts[i].all_input_nodes[0])
            rank = self.rank_after(layouts[:i], given.rank) if given.rank is not None else None
            if before is None or rank is None or len(before) != len(now):
                continue
            channels = len(now) - 1 - rank
            if all(a == b for d, (a, b) in enumerate(zip(before, now, strict=True)) if d != channels):
                return layouts[:i]
        return layouts
