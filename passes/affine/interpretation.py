"""The forms of all values of a graph, and how two of them become one.

Affine steps compose, sums of two maps of one source add. A merged kernel may cost more multiply-adds than
what it replaces and still lead to one that costs less (branches of different sizes, once summed): such
a form is kept as a candidate, but only a sound one, that costs no more, is ever put into a graph.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from torch import fx

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel, macs
from fxexpand.kernel.lower import to_module
from fxexpand.passes.affine.aliasing import fresh
from fxexpand.passes.affine.candidates import Form
from fxexpand.passes.affine.maps import META, ApartError, Map, Place, after, beside, fitted, identity, plus
from fxexpand.passes.affine.reader import Reader
from fxexpand.passes.affine.steps import Affine, Concat, Identity, Layout, MultiOutput, Select, Step, Sum
from fxexpand.passes.operators.table import call_of
from fxexpand.tracing.edit import works_in_place, written

LIMIT = 256  # how many times what it replaces a candidate may cost
CANDIDATES = 4  # forms of a value that are kept


class Interpretation:
    """The forms of all values of a graph.

    Attributes:
        forms: the candidates for each value: the earliest source first.
        notes: by node: whether something was refused, and the reason it stayed apart.
    """

    def __init__(
        self,
        reader: Reader,
        steps: Mapping[fx.Node, Step],
        order: Mapping[fx.Node, int],
        readers: Mapping[fx.Node, set[fx.Node]],
    ) -> None:
        """Args: readers: of each value, the nodes that read it."""
        self._reader = reader
        self._steps = steps
        self._order = order
        self._readers = readers
        self.notes: dict[fx.Node, tuple[bool, str]] = {}
        self.forms: dict[fx.Node, tuple[Form, ...]] = {}
        self._writes = [node for node in order if works_in_place(reader.graph_module, node)]
        self._write_places = [order[node] for node in self._writes]
        for node, step in steps.items():
            self.forms[node] = self._forms(node, step)

    def _forms(self, node: fx.Node, step: Step) -> tuple[Form, ...]:
        if isinstance(step, Identity):
            return self._passed(node, step.operand)
        if isinstance(step, Layout):
            forms = self._viewed(node, step)
            if step.note and any(form.layer is not None for form in self.forms.get(step.operand, ())):
                self._note(node, True, step.note)
            return forms
        if isinstance(step, Sum):
            return self._combined(node, step.terms, plus)
        if isinstance(step, Concat):
            terms = tuple((operand, identity()) for operand in step.operands)
            forms = self._combined(node, terms, beside)
            return tuple(form for form in forms if form.map.rank == step.rank and not form.after)
        if isinstance(step, MultiOutput):
            return ()
        if isinstance(step, Select):
            return self._picked(node, step)
        forms = self._applied(node, step)
        if step.averages:  # a pointwise map without multiply-adds may come after it
            forms += tuple(form for form in self._viewed(node, step) if form.layer is None)
        return forms

    def _picked(self, node: fx.Node, step: Select) -> tuple[Form, ...]:
        shape = self._reader.shapes.of(step.operand)
        channels = None if shape is None or step.rank >= len(shape) else shape[-1 - step.rank]
        try:
            if channels is None or channels.unknown:
                return ()
            return self._applied(node, Affine(step.operand, step.of(channels.number)))
        except InexactError:
            return ()

    def _applied(self, node: fx.Node, step: Affine, idle: bool = False) -> tuple[Form, ...]:
        shape, place = step.map.shape, self._order[node]
        if shape is None and step.map.rank is not None:
            shape = step.map.at(Place(1, step.map.rank, META))  # its stride
        density = self._reader.shapes.ratio(node, step.operand)
        if density is not None and step.map.inputs and step.map.outputs:
            density *= Fraction(step.map.inputs, step.map.outputs)
        if density is None:
            steps = 1 if shape is None else math.prod(shape.stride)
            density = Fraction(steps) if shape is not None and shape.transposed else Fraction(1, steps)
        work = Fraction(0)
        if step.has_macs and step.map.shape is not None:
            work = _work(step.map.shape, density)
        bridges = [each for each in node.all_input_nodes if isinstance(self._steps.get(each), MultiOutput)]
        local = Form(
            source=step.operand,
            map=step.map,
            own=(*bridges, node),
            start=min([place, *(self._order[bridge] for bridge in bridges)]),
            last=place,
            stop=place,
            layer=node if step.has_macs else None,
            cost=work,
            paid=work,
            density=density,
            computed=step.computed,
            idle=idle,
            devices=frozenset(tensor.device for tensor in self._reader.tensors(node)),
            dtypes=self._reader.dtypes.get(node, frozenset()),
        )
        return self._with_extended(local)

    def _passed(self, node: fx.Node, value: fx.Node) -> tuple[Form, ...]:
        local = self._applied(node, Affine(value, identity()), idle=True)[-1:]
        forms = [f for f in self.forms.get(value, ()) if f.layer is None or self._readers[value] <= {node}]
        del forms[CANDIDATES - 1 :]  # of a row of identities, each in between is one more
        return (*(replace(form, own=(node,), parts=(form,), credited=()) for form in forms), *local)

    def _with_extended(self, form: Form) -> tuple[Form, ...]:
        """The form, and before it those that reach further back."""
        found = [form]
        while True:
            merged, dearer = self._extended(found[0])
            if merged is None:
                return (*dearer, *found)[:CANDIDATES]
            found = [merged, *(found if len(found) == 1 else found[-1:])]

    def _extended(self, form: Form) -> tuple[Form | None, list[Form]]:
        """The form merged with the one before it, where that is sound; and candidates that are not."""
        dearer: list[Form] = []
        for inner in self.forms.get(form.source, ()):
            merged = None if inner.idle else self._merged(form, inner)
            if merged is None:
                continue
            if merged.sound:
                return merged, []
            dearer.append(merged)
            if inner.sound:  # less of the same would be a detour
                break
        return None, dearer

    def _viewed(self, node: fx.Node, step: Layout | Affine) -> tuple[Form, ...]:
        operand = step.operand
        alone = all(user is node or self._shape_only(user, operand) for user in self._readers[operand])
        read = [self._order[arg] + 1 for arg in node.all_input_nodes if arg is not operand]
        found = []
        for form in self.forms.get(operand, ()):
            if form.layer is not None and not alone:
                continue
            last, views = max([form.last, *read]), self._shortened((*form.after, node), form.map)
            found.append(
                replace(
                    form,
                    own=(node,),
                    parts=(form,),
                    credited=(),
                    after=views,
                    shared=form.shared or not alone,
                    last=last,
                    stop=self._order[node],
                )
            )
        return tuple(found)

    def _shape_only(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether a node reads nothing of a value but its shape, and is a view of another."""
        step = self._steps.get(user)
        return isinstance(step, Layout) and step.like is value and step.operand is not value

    def _shortened(self, views: tuple[fx.Node, ...], given: Map) -> tuple[fx.Node, ...]:
        """Without the reshapes at the end that restore an earlier shape."""
        shapes, now = self._reader.shapes, self._reader.shapes.of(views[-1])
        for i in range(len(views)):
            steps = [self._steps[view] for view in views[i:]]
            if now is None or not all(isinstance(step, Layout) and step.keeps_order for step in steps):
                continue
            before = shapes.of(views[i].all_input_nodes[0])
            rank = self._through(views[:i], given.rank) if given.rank is not None else None
            if before is None or rank is None or len(before) != len(now):
                continue
            channels = len(now) - 1 - rank
            if all(a == b for d, (a, b) in enumerate(zip(before, now, strict=True)) if d != channels):
                return views[:i]
        return views

    def _combined(
        self, node: fx.Node, terms: Sequence[tuple[fx.Node, Map]], combine: Callable[[Map, Map], Map]
    ) -> tuple[Form, ...]:
        """Maps of one source, one of which may be the source itself, as one."""
        bridges = [each for each in node.all_input_nodes if isinstance(self._steps.get(each), MultiOutput)]
        found = self._term(node, *terms[0], first=True)
        for i, (value, term) in enumerate(terms[1:], start=1):
            again = any(value is other for other, _ in terms[:i])
            pairs = itertools.product(found, self._term(node, value, term, first=not again))
            joined = (self._both(node, one, two, combine) for one, two in pairs)
            found = self._best(form for form in joined if form is not None)
        stop = self._order[node]
        whole = (replace(form, own=(*bridges, node), parts=(form,), credited=(), stop=stop) for form in found)
        extended = self._best(longer for form in whole for longer in self._with_extended(form))
        return tuple(sorted(extended, key=lambda form: self._order[form.source]))

    def _best(self, found: Iterable[Form]) -> list[Form]:
        """One form of each source: a sound one where there is one, that computes nothing again."""
        kept: dict[fx.Node, Form] = {}
        for form in found:
            held = kept.get(form.source)
            if held is None or (form.sound, not form.shared) > (held.sound, not held.shared):
                kept[form.source] = form
        return list(kept.values())[:CANDIDATES]

    def _term(self, node: fx.Node, value: fx.Node, term: Map, first: bool) -> list[Form]:
        """The forms of one term of a sum; the last is the value itself as the source."""
        alone = self._readers[value] <= {node}
        found = []
        for form in self.forms.get(value, ()):
            try:
                scaled = after(term, form.map)
            except InexactError:
                continue
            saved = alone and first
            term_form = replace(
                form,
                map=scaled,
                own=(),
                parts=(form,),
                paid=form.price if saved else Fraction(0),
                credited=(value,) if saved and form.layer is not None else (),
                shared=form.shared or not alone,
            )
            found.append(term_form)
        place = self._order[node]
        return [*found, Form(value, term, (), place, place, place)]

    def _both(self, node: fx.Node, one: Form, two: Form, combine: Callable[[Map, Map], Map]) -> Form | None:
        source = self._passed_on(one.source)
        if (
            source is not self._passed_on(two.source)
            or one.before != two.before
            or len(one.after) != len(two.after)
        ):
            return None
        if any(_key(a) != _key(b) for a, b in zip(one.after, two.after, strict=True)):
            return None
        main = max((one, two), key=lambda form: (form.layer is not None, form.cost))
        form = replace(
            one if one.own or one.parts else two,
            source=source,
            credited=(),
            own=(),
            parts=(one, two),
            start=min(one.start, two.start),
            last=max(one.last, two.last),
            stop=max(one.stop, two.stop),
            layer=main.layer,
            paid=one.paid + two.paid,
            computed=one.computed or two.computed,
            shared=one.shared or two.shared,
            idle=False,
            devices=one.devices | two.devices,
            dtypes=one.dtypes | two.dtypes,
        )
        return self._accepted(form, lambda: combine(one.map, two.map), node)

    def _passed_on(self, value: fx.Node) -> fx.Node:
        """The value that nodes such as Identity pass on."""
        step = self._steps.get(value)
        while isinstance(step, Identity):
            value = step.operand
            step = self._steps.get(value)
        return value

    def _merged(self, outer: Form, inner: Form) -> Form | None:
        """``outer``, whose source is the value of ``inner``, as a map of its source; None with a note."""
        alone = not outer.shared and self._readers[outer.source] <= outer.nodes.keys()
        between = (*inner.after, *outer.before)
        form = replace(
            outer,
            source=inner.source,
            credited=(outer.source,) if alone and inner.layer is not None else (),
            own=(),
            parts=(inner, outer),
            start=inner.start,
            last=inner.last,
            layer=inner.layer or outer.layer,
            before=inner.before,
            rank=inner.rank,
            paid=outer.price * inner.density + (inner.price if alone else 0),
            density=inner.density * outer.density,
            computed=inner.computed or outer.computed,
            shared=not alone or inner.shared,
            idle=inner.idle and outer.idle,
            devices=inner.devices | outer.devices,
            dtypes=inner.dtypes | outer.dtypes,
        )
        if between and inner.layer is not None:
            form = replace(form, after=(*between, *outer.after))
        elif between:
            rank = inner.rank if inner.before else self._rank_before(between, inner.map, outer.map)
            if rank is None:
                return None  # the views make the channels of several dimensions
            form = replace(form, before=(*inner.before, *between), rank=rank)
        first = min(outer.nodes, key=self._order.__getitem__)
        return self._accepted(form, lambda: self._joined(outer, inner, between), first, alone)

    def _joined(self, outer: Form, inner: Form, between: Sequence[fx.Node]) -> Map:
        """The two maps as one. Across views one of them must be pointwise: it is moved past them.

        A map without a layer moves to the layer that follows; else what follows moves to the layer before.
        """
        if not between:
            return after(outer.map, inner.map)
        ranks = (inner.map.rank, outer.map.rank)
        known = ranks[0] is not None and ranks[1] is not None
        if known and self._through(between, ranks[0] or 0) != ranks[1]:
            raise ApartError("its input is rearranged, with the channels in another place.")
        if inner.layer is None:
            return after(outer.map, fitted(inner.map, outer.map))
        if outer.layer is not None and any(self._averages(view) for view in between):
            raise ApartError("its input is averaged over positions, and it would cost more before that.")
        return after(fitted(outer.map, inner.map), inner.map)

    def _rank_before(self, views: Sequence[fx.Node], inner: Map, outer: Map) -> int | None:
        if inner.rank is not None:
            return inner.rank
        ranks = (rank for rank in range(4) if self._through(views, rank) == outer.rank)
        return next(ranks, None)

    def _averages(self, view: fx.Node) -> bool:
        step = self._steps[view]
        return not isinstance(step, Layout) or step.averages

    def _through(self, views: Sequence[fx.Node], rank: int) -> int | None:
        """Where views put the channels, counted from the last dimension."""
        found: int | None = rank
        for view in views:
            step = self._steps[view]
            if found is None:
                return None
            if isinstance(step, Layout):
                found = step.moves(found)
            elif isinstance(step, Affine) and found < (step.map.rank or 0):
                return None  # it averages over the channels too
        return found

    def _accepted(self, form: Form, join: Callable[[], Map], at: fx.Node, alone: bool = True) -> Form | None:
        """``form``, which holds what is paid for its parts, with its own map and cost; None, with a note."""
        try:
            if len(form.devices) > 1:
                raise InexactError("they are on different devices.")
            if len(form.dtypes) > 1:
                raise InexactError("they are of different dtypes.")
            joined = join()
            if joined.shape is not None and form.layer is not None:
                to_module(joined.shape)
        except InexactError as error:
            self._note(at, not isinstance(error, ApartError), str(error))
            return None
        if form.layer is None or joined.shape is None:
            return replace(form, map=joined)
        cost = _work(joined.shape, form.density)
        if cost > form.paid:
            factor = float(cost / form.paid) if form.paid else math.inf
            more = f"one kernel would cost {factor:.3g} times the multiply-adds"
            self._note(at, False, more if alone else "its input is also read elsewhere")
            if cost > LIMIT * form.paid:
                return None
        if not self._unwritten(form):
            first = min(form.nodes, key=self._order.__getitem__)
            self._note(first, True, "what it reads is written in place before all branches have read it")
            return None
        return replace(form, map=joined, cost=cost)

    def _unwritten(self, form: Form) -> bool:
        """Whether nothing writes into what the nodes read of each other and of the source while they do.

        The one kernel runs where the first node of the form stands.
        """
        places = self._write_places
        between = self._writes[bisect(places, form.start) : bisect(places, form.stop - 1)]
        for write in between:
            if write in form.nodes:
                continue
            target = self._memory(written(write))
            source = self._memory(form.source) if self._order[write] < form.last else None
            unknown = target is None or (source is None and self._order[write] < form.last)
            if unknown or target is source or target in form.nodes:
                return False
        return True

    def _memory(self, value: object) -> fx.Node | None:
        """The node whose memory holds a value; None where that is not known."""
        while isinstance(value, fx.Node):
            step = self._steps.get(value)
            if isinstance(step, Identity | Layout | Select):
                value = step.operand
                continue
            if fresh(self._reader.graph_module, value):
                return value
            return None
        return None

    def _note(self, node: fx.Node, refused: bool, reason: str) -> None:
        self.notes.setdefault(node, (refused, reason))


def _work(kernel: Kernel, density: Fraction) -> Fraction:
    """Multiply-adds per position of the input; a Linear has no groups to save any."""
    if kernel.rank == 0:
        return kernel.out_channels * kernel.in_channels * density
    return Fraction(macs(kernel)) * (1 if kernel.transposed else density)


def _key(view: fx.Node) -> tuple[object, ...]:
    call = call_of(view)
    rest = None if call is None else {k: v for k, v in call.arguments.items() if k != "input"}
    return view.op, view.target, repr(rest)
