"""Which values of a graph to fuse: a choice among their candidates.

There are no patterns: a value is known as a map of an earlier value, perhaps with changes of layout before
and after. Two maps become one only where that is exact and costs no more multiply-adds.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from torch import fx, nn

from fxexpand.errors import InexactError
from fxexpand.passes.affine.aliasing import results_of_writes
from fxexpand.passes.affine.candidates import Candidate
from fxexpand.passes.affine.interpretation import Interpretation, Note
from fxexpand.passes.affine.maps import META, Place
from fxexpand.passes.affine.reader import Reader
from fxexpand.passes.affine.shapes import shape_readers
from fxexpand.passes.affine.steps import Affine, Identity, Layout, MultiOutput, Step
from fxexpand.running.verify import probe_size
from fxexpand.tracing.edit import drop_unread_items, read_results, site_of


class Extraction:
    """The values of one graph to fuse, and why others stay apart.

    Attributes:
        order: every node with its place.
        steps: what the nodes do that do something affine.
        shape_readers: the nodes that read nothing of a value but its shape.
        writes: the in-place operators.
        chosen: the values to fuse, each with the candidate to compute it by, which lets other nodes go.
        notes: why nodes stay apart.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        read_results(graph_module, results_of_writes(graph_module))
        drop_unread_items(graph_module)
        self.order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        self.reader = Reader(graph_module)
        self.steps: dict[fx.Node, Step] = {}
        self.notes: dict[fx.Node, Note] = {}
        self._called = sorted({str(node.target) for node in graph_module.graph.find_nodes(op="call_module")})
        self.shape_readers = set(shape_readers(graph_module))
        for node in self.order:
            try:
                step = self.reader.step(node)
            except InexactError as error:
                self.notes[node] = Note(True, str(error))
            else:
                if step is not None:
                    self.steps[node] = step
        readers = {node: self._through_multi_outputs(node.users) for node in self.order}
        self.writes = self.reader.values.writes
        interpretation = Interpretation(self.reader, self.steps, self.order, readers)
        self._candidates = interpretation.candidates
        self.notes |= interpretation.notes
        self.chosen = self._choice()

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.graph_module.get_submodule(str(node.target))

    def has_macs(self, node: fx.Node) -> bool:
        """Whether the node is a Linear or a convolution."""
        step = self.steps[node]
        return isinstance(step, Affine) and step.has_macs

    def kernels(self, candidate: Candidate) -> list[fx.Node]:
        """The nodes of a candidate that compute something, in the graph's order."""
        return list(self._computing(candidate, self.in_order(candidate)))

    def _computing(self, candidate: Candidate, nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
        layouts = {*candidate.before, *candidate.after}
        return (
            n
            for n in nodes
            if n not in layouts and not isinstance(self.steps[n], Identity | Layout | MultiOutput)
        )

    def note(self, candidate: Candidate, note: Note) -> None:
        """Note why all that computes in a candidate stays apart after all."""
        self.notes |= dict.fromkeys(self.kernels(candidate), note)

    def refuse(self, values: Mapping[fx.Node, Candidate], reason: str) -> None:
        """Leave chosen values as they are, and note why."""
        for node, candidate in values.items():
            del self.chosen[node]
            self.note(candidate, Note(True, reason))

    def in_order(self, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The nodes of a candidate in the graph's order."""
        return tuple(sorted(candidate.nodes, key=self.order.__getitem__))

    def site(self, node: fx.Node) -> str | None:
        """The name of the expanded layer that a node calls a factor of."""
        return site_of(str(node.target), self.module(node)) if node.op == "call_module" else None

    def factors(self, node: fx.Node) -> set[str]:
        """The modules of that expanded layer that the graph calls."""
        start = f"{self.site(node)}."
        later = itertools.islice(self._called, bisect_left(self._called, start), None)
        return set(itertools.takewhile(lambda name: name.startswith(start), later))

    def gone(self) -> set[fx.Node]:
        """The nodes that the chosen candidates replace or let go."""
        return {*self.chosen, *self.dead()}

    @cached_property
    def absorbed(self) -> set[fx.Node]:
        """The nodes that are merged with a node before them."""
        return {
            node
            for candidate in self.chosen.values()
            for node in candidate.nodes
            if self.order[node] > candidate.start
        }

    def dead(self) -> set[fx.Node]:
        """The nodes that no other reads once the chosen candidates are in place."""
        return self.order.keys() - self._alive(self.chosen)

    def shapes_read(self) -> dict[fx.Node, Candidate]:
        """The nodes that read shapes of values which will go, each with a candidate of the same shape."""
        dead = self.dead()
        read = {reader: self._of_shape(reader) for reader in self.shape_readers if reader.args[0] in dead}
        return {reader: candidate for reader, candidate in read.items() if candidate is not None}

    def probe(self, candidate: Candidate) -> tuple[list[int], dict[fx.Node, int]]:
        """A small shape of the source that shows strides and borders, and the sizes read in such a run."""
        shape = candidate.map.shape
        assert shape is not None
        rank = shape.rank if not candidate.before else candidate.rank or 0
        leading = rank + (2 if rank or not candidate.after else 3)
        ndim = self.reader.values.ndim(candidate.source) or leading
        size = probe_size(shape)
        if candidate.before:
            size = [self._window(candidate.before) * max([3, *size])] * rank
        sizes = [2] * (ndim - 1 - rank) + [shape.in_channels, *size]
        return self.reader.values.probe(candidate.source, sizes)

    def _window(self, layouts: Sequence[fx.Node]) -> int:
        """How many positions the averages among some layouts take together."""
        steps = [self.steps[layout] for layout in layouts]
        averages = [
            step.map.at(Place(1, step.map.rank or 0, META)) for step in steps if isinstance(step, Affine)
        ]
        return math.prod(math.prod(kernel.kernel_size) for kernel in averages)

    def _choice(self) -> dict[fx.Node, Candidate]:
        """The first profitable candidate of each value, without those that save nothing beside the others."""
        chosen = dict(self._profitable())
        while True:
            alive = self._alive(chosen)
            here = {node: candidate for node, candidate in chosen.items() if node in alive}
            repeating = [node for node, each in here.items() if self._repeats_scale(node, each, alive)]
            if repeating:
                chosen |= {node: self._shallower(node, chosen[node]) for node in repeating}
                chosen = {
                    node: candidate for node, candidate in chosen.items() if self._worthwhile(candidate)
                }
                continue
            useless = self._useless(here, alive)
            if not useless:
                return here
            for node in useless:
                del chosen[node]

    def _profitable(self) -> Iterator[tuple[fx.Node, Candidate]]:
        """Each value that may be fused, with its first profitable candidate."""
        for node, candidates in self._candidates.items():
            candidate = next((each for each in candidates if each.profitable), None)
            if candidate is None or self._passes_on(node, candidate) or not self._worthwhile(candidate):
                continue
            if self.writes.replaceable(node):
                yield node, candidate
            else:
                reason = "it shares the memory of a value that is written in place and read afterwards."
                self.notes.setdefault(node, Note(True, reason))

    def _useless(self, chosen: Mapping[fx.Node, Candidate], alive: set[fx.Node]) -> list[fx.Node]:
        """Values whose candidates do not save the nodes that they count on.

        Those that save no layer come first: one of them may be all that keeps a layer alive which others are
        to save.
        """
        redundant = [node for node, each in chosen.items() if self._redundant(node, each, alive)]
        without_layer = [node for node in redundant if not chosen[node].credits]
        return without_layer or redundant or [node for node, each in chosen.items() if each.credits & alive]

    def _repeats_scale(self, node: fx.Node, candidate: Candidate, alive: set[fx.Node]) -> bool:
        """Whether it merges a scale or a norm that is computed all the same, for others."""
        others = (other for other in self.kernels(candidate) if other is not node)
        return any(other in alive and not self.has_macs(other) for other in others)

    def _redundant(self, node: fx.Node, candidate: Candidate, alive: set[fx.Node]) -> bool:
        """Whether everything else that it merges is computed all the same, for others."""
        others = [other for other in self.kernels(candidate) if other is not node]
        return bool(others) and not candidate.computed and all(other in alive for other in others)

    def _shallower(self, node: fx.Node, candidate: Candidate) -> Candidate:
        """The next profitable candidate, which reaches less far back; after the last, one not worthwhile."""
        candidates = self._candidates[node]
        rest = candidates[candidates.index(candidate) + 1 :]
        last = Candidate(node, candidate.map, (), 0, 0, 0)
        return next((each for each in rest if each.profitable), last)

    def _through_multi_outputs(self, users: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes that read a value, be it as a part of a split or in a stack."""
        readers = set(users)
        while multi_outputs := [user for user in readers if isinstance(self.steps.get(user), MultiOutput)]:
            readers.difference_update(multi_outputs)
            readers.update(user for output in multi_outputs for user in output.users)
        return readers

    def _passes_on(self, node: fx.Node, candidate: Candidate) -> bool:
        """Whether a node passes a value on, or changes its layout: that value may be replaced itself."""
        return isinstance(self.steps[node], Identity) or node in candidate.after

    def _worthwhile(self, candidate: Candidate) -> bool:
        """Whether fusing changes anything: several nodes become one, or an expanded layer of one factor."""
        if candidate.layer is None or candidate.map.shape is None:
            return False
        single = self.site(candidate.layer) is not None and len(self.factors(candidate.layer)) == 1
        kernels = self._computing(candidate, candidate.each())
        first = next(kernels, None)
        return single or candidate.computed or any(other is not first for other in kernels)

    def _alive(self, chosen: Mapping[fx.Node, Candidate]) -> set[fx.Node]:
        """The nodes whose value is still read once the chosen candidates are in place."""
        alive: set[fx.Node] = set()
        for node in reversed(self.order):
            if node not in self.steps:
                alive.add(node)
            if node in alive:
                alive.update(self._reads(node, chosen))
        return alive

    def _reads(self, node: fx.Node, chosen: Mapping[fx.Node, Candidate]) -> list[fx.Node]:
        candidate = self._of_shape(node) or chosen.get(node)
        if candidate is None:
            return node.all_input_nodes
        layouts = (*candidate.before, *candidate.after)
        return [candidate.source, *(arg for layout in layouts for arg in layout.all_input_nodes[1:])]

    def _of_shape(self, reader: fx.Node) -> Candidate | None:
        """The candidate whose source, laid out, has the shape that a node reads; None for other nodes."""
        if reader not in self.shape_readers or not isinstance(reader.args[0], fx.Node):
            return None
        for candidate in self._candidates.get(reader.args[0], ()):
            shape, source = candidate.map.shape, self._candidates.get(candidate.source, ())
            if candidate.layer is not None or candidate.before or not all(each.trivial for each in source):
                continue
            keeps = shape is not None and shape.pointwise and shape.in_channels == shape.out_channels
            if candidate.trivial or keeps:
                return candidate
        return None
