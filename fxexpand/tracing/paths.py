"""Other paths through the code of a model, where a fold that holds for the example inputs may not hold."""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch
from torch import fx, nn

from fxexpand.tracing.guards import fixed_arguments, require_class
from fxexpand.tracing.recording import Failed, Traced, record
from fxexpand.tracing.tracer import Leaf, TraceOptions

T = TypeVar("T")

PATHS = 32  # traced at most ...
NODES = 5000  # ... with so many nodes together, but two paths in any case
ALTERNATIVES = 64  # sets of other arguments
FREE = object()  # the value of an argument that is a proxy
OTHER_CLASS = object()  # that of one of another class
RAISES = dis.opmap["RAISE_VARARGS"]
TORCH = Path(torch.__file__).parent


class OpaqueLeaves:
    """A leaf that keeps modules whole whose code has no graph, and all others of their classes."""

    def __init__(self, leaf: Leaf | None = None) -> None:
        self._leaf = leaf
        self._codes: set[object] = set()

    def __call__(self, name: str, module: nn.Module) -> bool:
        return _code_of(module) in self._codes or (self._leaf is not None and self._leaf(name, module))

    def around(self, attempt: Callable[[], T | Failed]) -> T | Failed:
        """The outcome of ``attempt``, which uses this leaf, with every module whole in which it fails."""
        while True:
            outcome = attempt()
            if not isinstance(outcome, Failed) or not self._add(outcome.within):
                return outcome

    def _add(self, module: nn.Module | None) -> bool:
        """Keep a module whole; False where it is so already, or returns None sometimes."""
        if module is None or _code_of(module) in self._codes or _lacks(module):
            return False
        self._codes.add(_code_of(module))
        return True


def _code_of(module: nn.Module) -> object:
    """The class of a module, whose code it runs; for torch's containers, which run others' code, itself."""
    return module if type(module).__module__.startswith("torch.") else type(module)


def _lacks(module: nn.Module) -> bool:
    """Whether its forward sometimes returns None, which the node of a leaf cannot stand for."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    steps = [] if code is None else list(dis.get_instructions(code))
    places = {step.offset: i for i, step in enumerate(steps)}
    returns_none: set[bool] = set()
    for step, after in itertools.pairwise(steps):
        while after.opname.startswith("JUMP_FORWARD"):  # of "return x if ... else None"
            after = steps[places[after.argval]]
        if after.opname in ("RETURN_VALUE", "RETURN_CONST"):
            last = after if after.opname == "RETURN_CONST" else step
            returns_none.add(last.opname in ("LOAD_CONST", "RETURN_CONST") and last.argval is None)
    return len(returns_none) == 2


def other_paths(model: nn.Module, options: TraceOptions, traced: Traced) -> list[Traced] | Failed:
    """The graphs of all paths but that of ``traced``, for reading only.

    A path at the end of which the model raises is none: it checks its inputs. A failure where there are more
    than ``PATHS``, or where one has no graph.
    """
    todo = _turned(traced.decisions, 0)
    return _explored(model, replace(options, faithful=False), todo, len(traced.graph_module.graph.nodes))


def alternatives(
    model: nn.Module, options: TraceOptions, graph: fx.Graph
) -> Iterator[tuple[str, Traced | None]]:
    """Graphs of ``model`` for other arguments, for reading only, each with the names of these arguments.

    A flag is inverted, a None is a proxy, ``*args`` hold one value, a string is another one from the code of
    the forward, a value whose class the code asks for is of another class. Each argument changes alone, on
    all paths, conditions on values among them; then several together, up to ``ALTERNATIVES``, on one path
    each. Modules without a graph are leaves; None stands for a failure even so.

    Args:
        graph: that of the model.
    """
    nodes = len(graph.nodes)
    fixed = fixed_arguments(model, options.example_inputs)
    words = _words(type(model))
    changes: list[tuple[str, Any]] = []
    for name, value in fixed.items():
        if isinstance(value, str):
            changes += [(name, word) for word in words if word != value and word.isidentifier()]
        elif not name.startswith("**"):
            changes.append((name, FREE if value is None else not value))
    checks = graph.find_nodes(op="call_function", target=require_class)
    changes += [(str(check.args[2]), OTHER_CLASS) for check in checks]
    counts = range(1, len(changes) + 1)
    together = itertools.chain.from_iterable(itertools.combinations(changes, count) for count in counts)
    for chosen in itertools.islice(together, ALTERNATIVES):
        changed = (fixed | dict(chosen)).items()
        others = {name: value for name, value in changed if value not in (FREE, OTHER_CLASS)}
        untyped = frozenset(name for name, value in chosen if value is OTHER_CLASS)
        leaf = OpaqueLeaves(options.leaf)
        reading = replace(
            options, leaf=leaf, faithful=False, fixed=others, assume_false=True, untyped=untyped
        )
        outcome = leaf.around(partial(_explored, model, reading, [()], nodes, only_first=len(chosen) > 1))
        for traced in [None] if isinstance(outcome, Failed) else outcome:
            yield ", ".join(dict(chosen)), traced


def _words(kind: type) -> list[str]:
    """The strings in the code of a forward and of the methods that it names."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)  # type: ignore[attr-defined]
    codes = [] if code is None else [code]
    for name in getattr(code, "co_names", ()):
        method = inspect.unwrap(getattr(kind, name, None) or _words)
        if isinstance(method, FunctionType) and method is not _words:
            codes.append(method.__code__)
    words: dict[str, None] = {}
    for each in codes:
        consts = each.co_consts
        codes += [inner for inner in consts if isinstance(inner, CodeType)]
        words |= dict.fromkeys(word for word in consts if isinstance(word, str))
    return list(words)


def _explored(
    model: nn.Module,
    options: TraceOptions,
    todo: list[tuple[bool, ...]],
    nodes: int,
    only_first: bool = False,
) -> list[Traced] | Failed:
    """The graphs of the paths that begin with the results ``todo``, and of those that branch off.

    Args:
        nodes: the number of nodes in the graph of the model, which limits that of paths.
        only_first: stop at the first path that has a graph.
    """
    limit = max(2, NODES // nodes)
    paths: list[Traced] = []
    tried = 0
    todo = [*todo]
    while todo and not (only_first and paths):
        tried += 1
        if len(paths) == limit or len(paths) + len(todo) > PATHS or tried > 2 * PATHS:  # or more fail in vain
            reason = f"its code goes by sizes, on more paths than can be looked at ({min(limit, PATHS)})"
            return Failed(type(model).__name__, reason)
        prefix = todo.pop(0)  # an early branch first: where paths are too many, this shows sooner
        outcome = record(model, replace(options, branch_prefix=prefix))
        todo += _turned(
            outcome.decisions, len(prefix)
        )  # of a failure too, which may be one of the sizes only
        if isinstance(outcome, Failed):
            if _raised_by_the_model(outcome.cause):
                continue
            if outcome.partial_graph is None:
                return outcome
            outcome = outcome.partial_graph
        paths.append(outcome)
    return paths


def _turned(decisions: Sequence[bool], start: int) -> list[tuple[bool, ...]]:
    """Each decision from ``start`` on the other way round, after those before it."""
    return [(*decisions[:i], not decisions[i]) for i in range(start, len(decisions))]


def _raised_by_the_model(cause: Exception | None) -> bool:
    """Whether a ``raise`` or an ``assert`` outside of torch and of this package raised the exception."""
    at = None if cause is None else cause.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None:
        return False
    code, name = at.tb_frame.f_code, at.tb_frame.f_globals.get("__name__", "")
    library = Path(code.co_filename).is_relative_to(TORCH) or __package__ in name
    return code.co_code[at.tb_lasti] == RAISES and not library
