"""The other paths through code that goes by sizes: what holds for the example inputs may not hold there."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import fx, nn

from fxexpand.inputs import ExampleInputs
from fxexpand.tracer import Leaf, UntraceableError
from fxexpand.tracing import decisions_of, record

PATHS = 16  # that are looked at, each by a trace ...
NODES = 1000  # ... and of so many nodes together, but two in any case
RAISES = dis.opmap["RAISE_VARARGS"]
TORCH = Path(torch.__file__).parent


def other_paths(
    model: nn.Module, leaf: Leaf | None, example_inputs: ExampleInputs, graph_module: fx.GraphModule
) -> Iterator[fx.GraphModule]:
    """The graphs of all paths but that of ``graph_module``, for reading only.

    A path at the end of which the model raises is none: it checks its inputs.

    Raises: UntraceableError: there are more than ``PATHS``, or one has no graph.
    """
    todo = _turned(decisions_of(graph_module), 0)
    limit = max(2, NODES // len(graph_module.graph.nodes))
    seen = tried = 0
    while todo:
        tried += 1
        if seen == limit or seen + len(todo) > PATHS or tried > 2 * PATHS:  # before more are traced in vain
            reason = f"its code goes by sizes, on more paths than can be looked at ({min(limit, PATHS)})"
            raise UntraceableError(f"{type(model).__name__}: {reason}.", reason)
        along = todo.pop()
        try:
            found = record(model, leaf, example_inputs, faithful=False, along=along)
        except UntraceableError as error:
            if not _raised_by_the_model(error):
                raise
            todo += _turned(error.decisions, len(along))  # it may raise for the sizes of the inputs only
            continue
        seen += 1
        todo += _turned(decisions_of(found), len(along))
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
