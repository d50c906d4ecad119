"""The other paths through code: what holds for the example inputs may not hold there."""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn

from fxexpand.running.inputs import ExampleInputs
from fxexpand.tracing.graphs import decisions_of, record
from fxexpand.tracing.guards import UntraceableError, fixed_arguments
from fxexpand.tracing.tracer import Leaf

PATHS = 32  # that are looked at, each by a trace ...
NODES = 5000  # ... and of so many nodes together, but two in any case
ALTERNATIVES = 64  # sets of other arguments that are looked at
RAISES = dis.opmap["RAISE_VARARGS"]
TORCH = Path(torch.__file__).parent


class Whole:
    """A leaf: modules whose code has no graph, those of a class together, as layers have the same code."""

    def __init__(self, leaf: Leaf | None = None) -> None:
        self._leaf = leaf
        self._codes: set[object] = set()

    def __call__(self, name: str, module: nn.Module) -> bool:
        return _code_of(module) in self._codes or (self._leaf is not None and self._leaf(name, module))

    def add(self, module: nn.Module | None) -> bool:
        """Keep it whole; False where that is done already, or is no help."""
        if module is None or _code_of(module) in self._codes or _lacks(module):
            return False
        self._codes.add(_code_of(module))
        return True


def _code_of(module: nn.Module) -> object:
    """What modules with the same forward share: that of torch's containers is in what they hold."""
    return module if type(module).__module__.startswith("torch.") else type(module)


def _lacks(module: nn.Module) -> bool:
    """Whether its forward sometimes returns None: what a trace stands for is something or nothing always."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    steps = [] if code is None else list(dis.get_instructions(code))
    places = {step.offset: i for i, step in enumerate(steps)}
    found: set[bool] = set()
    for step, after in itertools.pairwise(steps):
        while after.opname.startswith("JUMP_FORWARD"):  # of "return x if ... else None"
            after = steps[places[after.argval]]
        if after.opname in ("RETURN_VALUE", "RETURN_CONST"):
            last = after if after.opname == "RETURN_CONST" else step
            found.add(last.opname in ("LOAD_CONST", "RETURN_CONST") and last.argval is None)
    return len(found) == 2


def other_paths(
    model: nn.Module, leaf: Leaf | None, example_inputs: ExampleInputs, graph_module: fx.GraphModule
) -> Iterator[fx.GraphModule]:
    """The graphs of all paths but that of ``graph_module``, for reading only.

    A path at the end of which the model raises is none: it checks its inputs.

    Raises: UntraceableError: there are more than ``PATHS``, or one has no graph.
    """
    todo = _turned(decisions_of(graph_module), 0)
    yield from _explored(model, leaf, example_inputs, todo, len(graph_module.graph.nodes))


def alternatives(
    model: nn.Module, leaf: Leaf | None, example_inputs: ExampleInputs | None, nodes: int
) -> Iterator[tuple[str, fx.GraphModule | None]]:
    """Other graphs of ``model``, for reading only, each with the arguments of ``trace`` that it does not fix.

    A flag is the other way round, a None is something, ``*args`` hold one, a string is another that the
    forward names. First each alone, on all paths, those that go by values among them; then together, up to
    ``ALTERNATIVES``, on one path each. All around parts without a graph; None where there is none even so.

    Args:
        nodes: in the graph of the model.
    """
    fixed = fixed_arguments(model, example_inputs)
    words = _words(type(model))
    changes: list[tuple[str, Any]] = []
    for name, value in fixed.items():
        if isinstance(value, str):
            changes += [(name, word) for word in words if word != value and word.isidentifier()]
        elif not name.startswith("**"):
            changes.append((name, None if value is None else not value))
    counts = range(1, len(changes) + 1)
    together = itertools.chain.from_iterable(itertools.combinations(changes, count) for count in counts)
    for chosen in itertools.islice(together, ALTERNATIVES):
        others = {**fixed, **dict(chosen)}
        for name, _ in chosen:
            if fixed[name] is None:
                del others[name]
        for graph_module in _around(model, leaf, example_inputs, nodes, others, len(chosen) == 1):
            yield ", ".join(dict(chosen)), graph_module


def _around(
    model: nn.Module,
    leaf: Leaf | None,
    example_inputs: ExampleInputs | None,
    nodes: int,
    fixed: dict[str, Any],
    all_paths: bool,
) -> list[fx.GraphModule | None]:
    """The graphs for some arguments, around the parts that have none."""
    whole = Whole(leaf)
    while True:
        try:
            found = _explored(model, whole, example_inputs, [()], nodes, fixed=fixed, blind=True)
            return [*found] if all_paths else [*itertools.islice(found, 1)]
        except UntraceableError as error:
            if not whole.add(error.within):
                return [None]


def _words(kind: type) -> list[str]:
    """The strings in the code of a forward and of the methods that it names."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)  # type: ignore[attr-defined]
    codes = [] if code is None else [code]
    for name in getattr(code, "co_names", ()):
        method = inspect.unwrap(getattr(kind, name, None) or _words)
        if isinstance(method, FunctionType) and method is not _words:
            codes.append(method.__code__)
    found: dict[str, None] = {}
    for each in codes:
        consts = each.co_consts
        codes += [inner for inner in consts if isinstance(inner, CodeType)]
        found |= dict.fromkeys(word for word in consts if isinstance(word, str))
    return list(found)


def _explored(
    model: nn.Module,
    leaf: Leaf | None,
    example_inputs: ExampleInputs | None,
    todo: list[tuple[bool, ...]],
    nodes: int,
    **options: Any,
) -> Iterator[fx.GraphModule]:
    """The graphs of the paths ``todo``, and of those that branch off; see ``unfinished``."""
    limit = max(2, NODES // nodes)
    seen = tried = 0
    while todo:
        tried += 1
        if seen == limit or seen + len(todo) > PATHS or tried > 2 * PATHS:  # before more are traced in vain
            reason = f"its code goes by sizes, on more paths than can be looked at ({min(limit, PATHS)})"
            raise UntraceableError(f"{type(model).__name__}: {reason}.", reason)
        along = todo.pop(0)  # those that branch off early first: the more there are, the sooner it shows
        try:
            found = record(model, leaf, example_inputs, faithful=False, along=along, **options)
        except UntraceableError as error:
            todo += _turned(error.decisions, len(along))  # it may raise for the sizes of the inputs only
            if _raised_by_the_model(error):
                continue
            if error.begun is None:
                raise
            found = error.begun
        else:
            todo += _turned(decisions_of(found), len(along))
        seen += 1
        yield found


def _turned(decisions: Sequence[bool], start: int) -> list[tuple[bool, ...]]:
    """Each decision from ``start`` on the other way round, after those before it."""
    return [(*decisions[:i], not decisions[i]) for i in range(start, len(decisions))]


def _raised_by_the_model(error: UntraceableError) -> bool:
    """Whether a ``raise`` or an ``assert`` outside of torch raised it."""
    at = None if error.__cause__ is None else error.__cause__.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None:
        return False
    code = at.tb_frame.f_code
    theirs = Path(code.co_filename).is_relative_to(TORCH) or __package__ in at.tb_frame.f_globals.get(
        "__name__", ""
    )
    return code.co_code[at.tb_lasti] == RAISES and not theirs
