"""Whether in-place operators write into values that a kernel is to read or to replace elsewhere."""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections.abc import Iterator

from torch import fx

from fxexpand.passes.affine.aliasing import INPUTS, memory, shared, works_in_place, written
from fxexpand.passes.affine.candidates import Candidate


class Writes:
    """The in-place operators of one graph.

    Attributes:
        nodes: their nodes, in order.
        memory: the memory that each value of the graph may share.
        written: all the memory that they may write into.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.memory = memory(graph_module)
        self._order = {node: i for i, node in enumerate(self.memory)}
        self.nodes = dict.fromkeys(node for node in self.memory if works_in_place(graph_module, node))
        self._in_order = list(self.nodes)
        self._places = [self._order[node] for node in self.nodes]
        self.written = frozenset().union(*map(self._written, self.nodes))
        self._sharing: dict[object, list[fx.Node]] = {}
        for node, parts in self.memory.items():
            for part in parts & self.written:
                self._sharing.setdefault(part, []).append(node)

    def spare(self, candidate: Candidate) -> bool:
        """Whether no other node writes into the source or a value of the candidate while it is to be read.

        The one kernel runs where the first node of the candidate stands.
        """
        first, end = bisect(self._places, candidate.start), bisect(self._places, candidate.stop - 1)
        for write in self._in_order[first:end]:
            if write in candidate.nodes:
                continue
            target, place = self._written(write), self._order[write]
            source = [candidate.source] if place < candidate.last else []
            before = (node for node in candidate.nodes if self._order[node] < place)
            if any(target & self.memory[node] for node in (*source, *before)):
                return False
        return True

    def replaceable(self, value: fx.Node) -> bool:
        """Whether a copy of a value does as well: no other value of its memory shows what is written into it.

        A view that is written into, or whose memory is, stands for the values that it is a view of.
        """
        mine = self.memory[value]
        if mine == {value} and value not in self.nodes:
            return True
        later = self._in_order[bisect_left(self._places, self._order[value]) :]
        first = next((write for write in later if mine & self._written(write)), None)
        if first is None:
            return True
        seen = (user for other in self._beside(value) for user in other.users if self.memory[user])
        return not mine & INPUTS and all(self._order[user] <= self._order[first] for user in seen)

    def _beside(self, value: fx.Node) -> Iterator[fx.Node]:
        """The values that may share the memory of a value and are not made of it."""
        made = {value}
        together = {node for part in self.memory[value] & self.written for node in self._sharing[part]}
        for other in sorted(together - made, key=self._order.__getitem__):
            sharing = [each for each in other.all_input_nodes if each in together]
            if sharing and all(each in made for each in sharing):
                made.add(other)
            else:
                yield other

    def _written(self, write: fx.Node) -> frozenset[object]:
        return shared(self.memory, written(write))
