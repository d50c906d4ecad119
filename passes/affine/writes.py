"""Whether in-place operators write into values that a kernel is to read at another place in the graph."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping

from torch import fx

from fxexpand.passes.affine.aliasing import fresh, works_in_place, written
from fxexpand.passes.affine.candidates import Candidate
from fxexpand.passes.affine.steps import Identity, Layout, Select, Step


class Writes:
    """The in-place operators of one graph; ``nodes`` are their nodes, in order."""

    def __init__(
        self, graph_module: fx.GraphModule, steps: Mapping[fx.Node, Step], order: Mapping[fx.Node, int]
    ) -> None:
        self._graph_module = graph_module
        self._steps = steps
        self._order = order
        self.nodes = dict.fromkeys(node for node in order if works_in_place(graph_module, node))
        self._in_order = list(self.nodes)
        self._places = [order[node] for node in self.nodes]

    def spare(self, candidate: Candidate) -> bool:
        """Whether no other node writes into the source or a value of the candidate while it is to be read.

        The one kernel runs where the first node of the candidate stands.
        """
        first, end = bisect(self._places, candidate.start), bisect(self._places, candidate.stop - 1)
        for write in self._in_order[first:end]:
            if write in candidate.nodes:
                continue
            target, reads_source = self._memory(written(write)), self._order[write] < candidate.last
            source = self._memory(candidate.source) if reads_source else None
            unknown = target is None or (source is None and reads_source)
            if unknown or target is source or target in candidate.nodes:
                return False
        return True

    def _memory(self, value: object) -> fx.Node | None:
        """The node whose memory holds a value; None where that is not known."""
        while isinstance(value, fx.Node):
            step = self._steps.get(value)
            if not isinstance(step, Identity | Layout | Select):
                return value if fresh(self._graph_module, value) else None
            value = step.operand
        return None
