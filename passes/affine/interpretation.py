"""The candidates for all values of a graph, and how two of them become one.

Affine steps compose, and sums of two maps of one source add. A merged kernel may cost more multiply-adds than
the nodes it replaces and still lead to one that costs less (branches of different sizes, once summed): it is
kept as a candidate, but only a profitable one is ever put into a graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from torch import fx

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel, macs
from fxexpand.kernel.lower import to_module
from fxexpand.passes.affine.candidates import Candidate
from fxexpand.passes.affine.layouts import Layouts
from fxexpand.passes.affine.maps import META, ApartError, Map, Place, after, beside, fitted, identity, plus
from fxexpand.passes.affine.reader import Reader
from fxexpand.passes.affine.steps import Affine, Concat, Identity, Layout, MultiOutput, Select, Step, Sum
from fxexpand.passes.operators.table import call_of

MOST_MACS = 256  # multiply-adds of a candidate, in those of the nodes it replaces, above which it is dropped
CANDIDATES = 4  # candidates that are kept for a value


class Note(NamedTuple):
    """Why a node stays apart; ``refused`` if it cannot be fused, rather than should not be."""

    refused: bool
    reason: str


class Interpretation:
    """The candidates for all values of a graph.

    Attributes:
        candidates: those for each value, the earliest source first.
        notes: why nodes stay apart.
    """

    def __init__(
        self,
        reader: Reader,
        steps: Mapping[fx.Node, Step],
        order: Mapping[fx.Node, int],
        readers: Mapping[fx.Node, set[fx.Node]],
    ) -> None:
        """Args: readers: the nodes that read each value."""
        self._reader = reader
        self._steps = steps
        self._order = order
        self._readers = readers
        self._layouts = Layouts(steps, reader.values)
        self._writes = reader.values.writes
        self.notes: dict[fx.Node, Note] = {}
        self.candidates: dict[fx.Node, tuple[Candidate, ...]] = {}
        for node, step in steps.items():
            self.candidates[node] = self._of_step(node, step)

    def _of_step(self, node: fx.Node, step: Step) -> tuple[Candidate, ...]:
        match step:
            case Identity():
                return self._passed(node, step.operand)
            case Layout():
                return self._of_layout(node, step)
            case Sum():
                return self._combined(node, step.terms, plus)
            case Concat():
                terms = tuple((operand, identity()) for operand in step.operands)
                joined = self._combined(node, terms, beside)
                return tuple(each for each in joined if each.map.rank == step.rank and not each.after)
            case Select():
                return self._of_selection(node, step)
            case Affine():
                return self._of_map(node, step)
        return ()

    def _of_layout(self, node: fx.Node, step: Layout) -> tuple[Candidate, ...]:
        given = self.candidates.get(step.operand, ())
        if step.note and any(candidate.layer is not None for candidate in given):
            self._note(node, True, step.note)
        return self._laid_out(node, step)

    def _of_selection(self, node: fx.Node, step: Select) -> tuple[Candidate, ...]:
        shape = self._reader.values.shape(step.operand)
        channels = None if shape is None or step.rank >= len(shape) else shape[-1 - step.rank]
        try:
            if channels is None or channels.unknown:
                return ()
            return self._applied(node, Affine(step.operand, step.of(channels.number)))
        except InexactError:
            return ()

    def _of_map(self, node: fx.Node, step: Affine) -> tuple[Candidate, ...]:
        candidates = self._applied(node, step)
        if step.averages:  # a pointwise map without multiply-adds may come after it
            candidates += tuple(each for each in self._laid_out(node, step) if each.layer is None)
        return candidates

    def _applied(self, node: fx.Node, step: Affine, trivial: bool = False) -> tuple[Candidate, ...]:
        place, density = self._order[node], self._density(node, step)
        work = Fraction(0)
        if step.has_macs and step.map.shape is not None:
            work = _macs(step.map.shape, density)
        multi_outputs = self._multi_outputs(node)
        local = Candidate(
            source=step.operand,
            map=step.map,
            own=(*multi_outputs, node),
            start=min([place, *(self._order[output] for output in multi_outputs)]),
            last=place,
            stop=place,
            layer=node if step.has_macs else None,
            macs_after=work,
            macs_before=work,
            density=density,
            computed=step.computed,
            trivial=trivial,
            devices=frozenset(tensor.device for tensor in self._reader.tensors(node)),
            dtypes=self._reader.dtypes.get(node, frozenset()),
        )
        return self._with_extended(local)

    def _density(self, node: fx.Node, step: Affine) -> Fraction:
        """Positions of the result per position of the operand: by their sizes, else by the stride."""
        density = self._reader.values.ratio(node, step.operand)
        if density is not None:
            if step.map.inputs and step.map.outputs:
                density *= Fraction(step.map.inputs, step.map.outputs)
            return density
        shape = step.map.shape
        if shape is None and step.map.rank is not None:
            shape = step.map.at(Place(1, step.map.rank, META))
        steps = 1 if shape is None else math.prod(shape.stride)
        return Fraction(steps) if shape is not None and shape.transposed else Fraction(1, steps)

    def _multi_outputs(self, node: fx.Node) -> list[fx.Node]:
        return [each for each in node.all_input_nodes if isinstance(self._steps.get(each), MultiOutput)]

    def _passed(self, node: fx.Node, value: fx.Node) -> tuple[Candidate, ...]:
        """The candidates of a node that passes a value on."""
        local = self._applied(node, Affine(value, identity()), trivial=True)[-1:]
        alone = self._readers[value] <= {node}
        given = [each for each in self.candidates.get(value, ()) if each.layer is None or alone]
        del given[CANDIDATES - 1 :]  # in a row of identities, each in between adds one
        return (*(replace(each, own=(node,), parts=(each,), credited=()) for each in given), *local)

    def _with_extended(self, candidate: Candidate) -> tuple[Candidate, ...]:
        """The candidate, and before it those that reach further back."""
        reaching = [candidate]
        while True:
            merged, unprofitable = self._extended(reaching[0])
            if merged is None:
                return (*unprofitable, *reaching)[:CANDIDATES]
            reaching = [merged, *(reaching if len(reaching) == 1 else reaching[-1:])]

    def _extended(self, candidate: Candidate) -> tuple[Candidate | None, list[Candidate]]:
        """The candidate merged with one of its source's, if that is profitable; else those that are not."""
        unprofitable: list[Candidate] = []
        for inner in self.candidates.get(candidate.source, ()):
            merged = None if inner.trivial else self._merged(candidate, inner)
            if merged is None:
                continue
            if merged.profitable:
                return merged, []
            unprofitable.append(merged)
            if inner.profitable:  # less of the same would be a detour
                break
        return None, unprofitable

    def _laid_out(self, node: fx.Node, step: Layout | Affine) -> tuple[Candidate, ...]:
        """The candidates of the operand with the change of layout after them."""
        operand = step.operand
        alone = all(user is node or self._reads_shape_only(user, operand) for user in self._readers[operand])
        read = [self._order[arg] + 1 for arg in node.all_input_nodes if arg is not operand]
        return tuple(
            replace(
                each,
                own=(node,),
                parts=(each,),
                credited=(),
                after=self._layouts.shortened((*each.after, node), each.map),
                shared=each.shared or not alone,
                last=max([each.last, *read]),
                stop=self._order[node],
            )
            for each in self.candidates.get(operand, ())
            if alone or each.layer is None
        )

    def _reads_shape_only(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether a node changes the layout of another value to the shape of this one."""
        step = self._steps.get(user)
        return isinstance(step, Layout) and step.like is value and step.operand is not value

    def _combined(
        self, node: fx.Node, terms: Sequence[tuple[fx.Node, Map]], combine: Callable[[Map, Map], Map]
    ) -> tuple[Candidate, ...]:
        """Maps of one source, one of which may be the source itself, as one map."""
        sums = self._term(node, *terms[0], first=True)
        for i, (value, term) in enumerate(terms[1:], start=1):
            again = any(value is other for other, _ in terms[:i])
            pairs = itertools.product(sums, self._term(node, value, term, first=not again))
            joined = (self._both(node, one, two, combine) for one, two in pairs)
            sums = self._best(each for each in joined if each is not None)
        own, stop = (*self._multi_outputs(node), node), self._order[node]
        whole = (replace(each, own=own, parts=(each,), credited=(), stop=stop) for each in sums)
        extended = self._best(longer for each in whole for longer in self._with_extended(each))
        return tuple(sorted(extended, key=lambda each: self._order[each.source]))

    def _best(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """One candidate for each source: first a profitable one, then one that repeats no shared node."""
        best: dict[fx.Node, Candidate] = {}
        for new in candidates:
            old = best.get(new.source)
            if old is None or (new.profitable, not new.shared) > (old.profitable, not old.shared):
                best[new.source] = new
        return list(best.values())[:CANDIDATES]

    def _term(self, node: fx.Node, value: fx.Node, term: Map, first: bool) -> list[Candidate]:
        """The candidates of one term of a sum; the last has the value itself as its source.

        Args:
            first: the sum has no earlier term of this value.
        """
        alone = self._readers[value] <= {node}
        saved = alone and first
        terms = []
        for candidate in self.candidates.get(value, ()):
            try:
                scaled = after(term, candidate.map)
            except InexactError:
                continue
            terms.append(
                replace(
                    candidate,
                    map=scaled,
                    own=(),
                    parts=(candidate,),
                    macs_before=candidate.least_macs if saved else Fraction(0),
                    credited=(value,) if saved and candidate.layer is not None else (),
                    shared=candidate.shared or not alone,
                )
            )
        place = self._order[node]
        return [*terms, Candidate(value, term, (), place, place, place)]

    def _both(
        self, node: fx.Node, one: Candidate, two: Candidate, combine: Callable[[Map, Map], Map]
    ) -> Candidate | None:
        """Two terms of one source, in the same layouts, as one map; None with a note."""
        source = self._passed_on(one.source)
        if source is not self._passed_on(two.source) or one.before != two.before:
            return None
        if [_layout_key(layout) for layout in one.after] != [_layout_key(layout) for layout in two.after]:
            return None
        main = max((one, two), key=lambda each: (each.layer is not None, each.macs_after))
        joint = replace(
            one if one.own or one.parts else two,
            source=source,
            credited=(),
            own=(),
            parts=(one, two),
            start=min(one.start, two.start),
            last=max(one.last, two.last),
            stop=self._order[node],
            layer=main.layer,
            macs_before=one.macs_before + two.macs_before,
            computed=one.computed or two.computed,
            shared=one.shared or two.shared,
            trivial=False,
            devices=one.devices | two.devices,
            dtypes=one.dtypes | two.dtypes,
        )
        return self._accepted(joint, lambda: combine(one.map, two.map), node)

    def _passed_on(self, value: fx.Node) -> fx.Node:
        """The value that nodes such as Identity pass on."""
        while isinstance(step := self._steps.get(value), Identity):
            value = step.operand
        return value

    def _merged(self, outer: Candidate, inner: Candidate) -> Candidate | None:
        """``outer``, whose source is the value of ``inner``, as a map of its source; None with a note."""
        alone = not outer.shared and self._readers[outer.source] <= outer.nodes.keys()
        between = (*inner.after, *outer.before)
        merged = replace(
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
            macs_before=outer.least_macs * inner.density + (inner.least_macs if alone else 0),
            density=inner.density * outer.density,
            computed=inner.computed or outer.computed,
            shared=not alone or inner.shared,
            trivial=inner.trivial and outer.trivial,
            devices=inner.devices | outer.devices,
            dtypes=inner.dtypes | outer.dtypes,
        )
        if between and inner.layer is not None:
            merged = replace(merged, after=(*between, *outer.after))
        elif between:
            rank = inner.rank if inner.before else self._layouts.rank_before(between, inner.map, outer.map)
            if rank is None:
                return None  # the layouts make the channels of several dimensions
            merged = replace(merged, before=(*inner.before, *between), rank=rank)
        return self._accepted(
            merged, lambda: self._joined(outer, inner, between), self._first(outer.nodes), alone
        )

    def _first(self, nodes: Iterable[fx.Node]) -> fx.Node:
        return min(nodes, key=self._order.__getitem__)

    def _joined(self, outer: Candidate, inner: Candidate, between: Sequence[fx.Node]) -> Map:
        """The two maps as one. Across layouts one of them must be pointwise: it is moved past them.

        A map without a layer moves to the layer that follows; else the outer map moves to the layer before.
        """
        if not between:
            return after(outer.map, inner.map)
        known = inner.map.rank is not None and outer.map.rank is not None
        if known and self._layouts.rank_after(between, inner.map.rank or 0) != outer.map.rank:
            raise ApartError("its input is rearranged, with the channels in another place.")
        if inner.layer is None:
            return after(outer.map, fitted(inner.map, outer.map))
        if outer.layer is not None and any(self._layouts.averages(layout) for layout in between):
            raise ApartError("its input is averaged over positions, and it would cost more before that.")
        return after(fitted(outer.map, inner.map), inner.map)

    def _accepted(
        self, candidate: Candidate, join: Callable[[], Map], node: fx.Node, alone: bool = True
    ) -> Candidate | None:
        """A merged candidate with its map and its multiply-adds; None, with a note at ``node``.

        Args:
            candidate: the rest of it.
            join: gives the map, or raises InexactError.
            alone: no other node reads the value in between.
        """
        try:
            if len(candidate.devices) > 1:
                raise InexactError("they are on different devices.")
            if len(candidate.dtypes) > 1:
                raise InexactError("they are of different dtypes.")
            joined = join()
            if joined.shape is not None and candidate.layer is not None:
                to_module(joined.shape)
        except InexactError as error:
            self._note(node, not isinstance(error, ApartError), str(error))
            return None
        if candidate.layer is None or joined.shape is None:
            return replace(candidate, map=joined)
        work, before = _macs(joined.shape, candidate.density), candidate.macs_before
        if work > before:
            factor = float(work / before) if before else math.inf
            more = f"one kernel would cost {factor:.3g} times the multiply-adds"
            self._note(node, False, more if alone else "its input is also read elsewhere")
            if work > MOST_MACS * before:
                return None
        if not self._writes.spare(candidate):
            reason = "what it reads is written in place before all branches have read it"
            self._note(self._first(candidate.nodes), True, reason)
            return None
        return replace(candidate, map=joined, macs_after=work)

    def _note(self, node: fx.Node, refused: bool, reason: str) -> None:
        self.notes.setdefault(node, Note(refused, reason))


def _macs(kernel: Kernel, density: Fraction) -> Fraction:
    """Multiply-adds per position of the input; a Linear has no groups to save any."""
    if kernel.rank == 0:
        return kernel.out_channels * kernel.in_channels * density
    return Fraction(macs(kernel)) * (1 if kernel.transposed else density)


def _layout_key(layout: fx.Node) -> tuple[object, ...]:
    """The same for layouts that differ in their operand alone."""
    call = call_of(layout)
    rest = None if call is None else {k: v for k, v in call.arguments.items() if k != "input"}
    return layout.op, layout.target, repr(rest)
