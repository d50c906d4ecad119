"""Affine interpretation of a graph: which values are one kernel of an earlier value, and which to fuse.

What a node computes is known as "kernel K of the source s", perhaps with views before and after. There are no
patterns. Two maps become one only where that is exact and costs no more multiply-adds.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from torch import fx, nn

from fxexpand.errors import InexactError
from fxexpand.passes.affine.candidates import Form
from fxexpand.passes.affine.interpretation import Interpretation
from fxexpand.passes.affine.maps import META, Place
from fxexpand.passes.affine.reader import Reader
from fxexpand.passes.affine.shapes import shape_readers
from fxexpand.passes.affine.steps import Affine, Identity, Layout, MultiOutput, Step
from fxexpand.running.verify import probe_size
from fxexpand.tracing.edit import drop_unread_items, read_what_is_written, site_of


class Walk:
    """One walk over a graph.

    Attributes:
        order: every node with its place.
        steps: what the nodes do that do something affine.
        shape_readers: the nodes that read nothing of a value but its shape.
        chosen: the values to fuse, each with the form to give it, which lets other nodes go.
        notes: by node: whether something was refused, and the reason it stayed apart.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        read_what_is_written(graph_module)
        drop_unread_items(graph_module)
        self.order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        self.reader = Reader(graph_module)
        self.steps: dict[fx.Node, Step] = {}
        self._called = sorted({str(node.target) for node in graph_module.graph.find_nodes(op="call_module")})
        self.shape_readers = set(shape_readers(graph_module))
        reasons: dict[fx.Node, str] = {}
        for node in self.order:
            try:
                step = self.reader.step(node)
            except InexactError as error:
                reasons[node] = str(error)
            else:
                if step is not None:
                    self.steps[node] = step
        readers = {node: self._through_bridges(node.users) for node in self.order}
        found = Interpretation(self.reader, self.steps, self.order, readers)
        self._forms = found.forms
        self.notes = {**{node: (True, reason) for node, reason in reasons.items()}, **found.notes}
        self.chosen = self._choice()

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.graph_module.get_submodule(str(node.target))

    def has_macs(self, node: fx.Node) -> bool:
        """Whether the node is a Linear or a convolution."""
        step = self.steps[node]
        return isinstance(step, Affine) and step.has_macs

    def kernels(self, form: Form) -> list[fx.Node]:
        """The nodes of a form that compute something, as they stand in the graph."""
        return list(self._computing(form, self.in_order(form)))

    def _computing(self, form: Form, nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
        moved = {*form.before, *form.after}
        return (
            n
            for n in nodes
            if n not in moved and not isinstance(self.steps[n], Identity | Layout | MultiOutput)
        )

    def in_order(self, form: Form) -> tuple[fx.Node, ...]:
        """The nodes of a form as they stand in the graph."""
        return tuple(sorted(form.nodes, key=self.order.__getitem__))

    def site(self, node: fx.Node) -> str | None:
        """The name of the expanded layer that a node calls a factor of."""
        return site_of(str(node.target), self.module(node)) if node.op == "call_module" else None

    def factors(self, node: fx.Node) -> set[str]:
        """The modules of that expanded layer that the graph calls."""
        start = f"{self.site(node)}."
        first = bisect_left(self._called, start)
        return set(
            itertools.takewhile(
                lambda name: name.startswith(start), itertools.islice(self._called, first, None)
            )
        )

    def gone(self) -> set[fx.Node]:
        """The nodes that the chosen forms replace or let go."""
        return {*self.chosen, *self.dead()}

    @cached_property
    def absorbed(self) -> set[fx.Node]:
        """The nodes merged with what is before them."""
        nodes = (
            (node, self.order[node] > form.start) for form in self.chosen.values() for node in form.nodes
        )
        return {node for node, later in nodes if later}

    def dead(self) -> set[fx.Node]:
        """The nodes that nobody reads once the chosen forms are in place."""
        alive = self._alive(self.chosen)
        return {node for node in self.order if node not in alive}

    def shapes_read(self) -> dict[fx.Node, Form]:
        """The nodes that read shapes of values which will go, each with a form that has the same shape."""
        dead = self.dead()
        forms = {reader: self._shape_form(reader) for reader in self.shape_readers if reader.args[0] in dead}
        return {reader: form for reader, form in forms.items() if form is not None}

    def probe(self, form: Form) -> tuple[list[int], dict[fx.Node, int]]:
        """A small shape of the source that shows strides and borders, and the sizes read in such a run."""
        shape = form.map.shape
        assert shape is not None
        rank = shape.rank if not form.before else form.rank or 0
        ndim = self.reader.shapes.ndim(form.source) or rank + (2 if rank or not form.after else 3)
        size = probe_size(shape)
        if form.before:
            size = [self._window(form.before) * max([3, *size])] * rank
        return self.reader.shapes.probe(form.source, [2] * (ndim - 1 - rank) + [shape.in_channels, *size])

    def _window(self, views: Sequence[fx.Node]) -> int:
        """How many positions the averages among some views take together."""
        steps = [self.steps[view] for view in views]
        shapes = [
            step.map.at(Place(1, step.map.rank or 0, META)) for step in steps if isinstance(step, Affine)
        ]
        return math.prod(math.prod(shape.kernel_size) for shape in shapes)

    def _choice(self) -> dict[fx.Node, Form]:
        chosen: dict[fx.Node, Form] = {}
        for node, forms in self._forms.items():
            form = next((form for form in forms if form.sound), None)
            if form is not None and not self._passes(node, form) and self._worthwhile(form):
                chosen[node] = form
        while True:
            alive = self._alive(chosen)
            here = {node: form for node, form in chosen.items() if node in alive}
            wasted = [node for node, form in here.items() if self._wasted(node, form, alive)]
            if wasted:
                chosen |= {node: self._shallower(node, chosen[node]) for node in wasted}
                chosen = {node: form for node, form in chosen.items() if self._worthwhile(form)}
                continue
            idle = [node for node, form in here.items() if self._idle(node, form, alive)]
            # First what saves no layer: it may be what keeps a layer alive that others are to save.
            idle = [node for node in idle if not here[node].credits] or idle
            idle = idle or [node for node, form in here.items() if form.credits & alive]
            if not idle:
                return {node: form for node, form in chosen.items() if node in alive}
            for node in idle:
                del chosen[node]

    def _wasted(self, node: fx.Node, form: Form, alive: set[fx.Node]) -> bool:
        """Whether a scale or a norm was merged that is computed all the same, for others."""
        others = (other for other in self.kernels(form) if other is not node)
        return any(other in alive and not self.has_macs(other) for other in others)

    def _shallower(self, node: fx.Node, form: Form) -> Form:
        """The next sound form, that reaches less far back; at the end one that is not worthwhile."""
        forms = self._forms[node]
        rest = forms[forms.index(form) + 1 :]
        return next((each for each in rest if each.sound), Form(node, form.map, (), 0, 0, 0))

    def _through_bridges(self, users: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes that read a value, be it as a part of a split or in a stack."""
        found = set(users)
        while bridges := [user for user in found if isinstance(self.steps.get(user), MultiOutput)]:
            found.difference_update(bridges)
            found.update(user for bridge in bridges for user in bridge.users)
        return found

    def _passes(self, node: fx.Node, form: Form) -> bool:
        """Whether a node passes on a value, which may as well be replaced itself, or a view of it."""
        return isinstance(self.steps[node], Identity) or node in form.after

    def _worthwhile(self, form: Form) -> bool:
        """Whether fusing changes anything: several nodes become one, or an expanded layer of one factor."""
        if form.layer is None or form.map.shape is None:
            return False
        single = self.site(form.layer) is not None and len(self.factors(form.layer)) == 1
        kernels = self._computing(form, form.each())
        first = next(kernels, None)
        return single or form.computed or any(other is not first for other in kernels)

    def _idle(self, node: fx.Node, form: Form, alive: set[fx.Node]) -> bool:
        """Whether everything else that the form holds is computed all the same."""
        others = [other for other in self.kernels(form) if other is not node]
        return bool(others) and not form.computed and all(other in alive for other in others)

    def _alive(self, chosen: dict[fx.Node, Form]) -> set[fx.Node]:
        """The nodes whose value is still read once the chosen forms are in place."""
        alive: set[fx.Node] = set()
        for node in reversed(self.order):
            if node not in self.steps:
                alive.add(node)
            if node in alive:
                alive.update(self._reads(node, chosen))
        return alive

    def _reads(self, node: fx.Node, chosen: dict[fx.Node, Form]) -> list[fx.Node]:
        form = self._shape_form(node) or chosen.get(node)
        if form is None:
            return node.all_input_nodes
        sizes = [arg for view in (*form.before, *form.after) for arg in view.all_input_nodes[1:]]
        return [form.source, *sizes]

    def _shape_form(self, reader: fx.Node) -> Form | None:
        """Of a node that reads the shape of a value: the form by which the source, viewed, has that shape."""
        if reader not in self.shape_readers or not isinstance(reader.args[0], fx.Node):
            return None
        for form in self._forms.get(reader.args[0], ()):
            shape, source = form.map.shape, self._forms.get(form.source, ())
            keeps = shape is not None and shape.pointwise and shape.in_channels == shape.out_channels
            true_source = all(each.idle for each in source)
            if form.layer is None and not form.before and true_source and (form.idle or keeps):
                return form
        return None
