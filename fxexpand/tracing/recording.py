"""One symbolic trace of a model: its graph, or the reason why it has none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, fx, nn

from fxexpand.running.evaluation import undisturbed
from fxexpand.tracing.classes import typed
from fxexpand.tracing.example_values import Sizes, UnknownValue
from fxexpand.tracing.guards import arguments_by_name, fixed_arguments
from fxexpand.tracing.stores import (
    Change,
    Stores,
    is_cache,
    kept_nodes,
    keys,
    replaces_constant,
    stand_in,
    stored,
)
from fxexpand.tracing.tracer import RegionTracer, TraceOptions, calls_more, first_line, hooked

FIX = "fxexpand.tracing.regions finds the parts that have a graph."


@dataclass(frozen=True, eq=False)
class Traced:
    """The graph of a model.

    Attributes:
        graph_module: the graph, with the modules, parameters and buffers of the model.
        decisions: the results of its conditions, in order.
        multi_argument_calls: the paths of modules called with several arguments, or with one by its name.
        partial: the model's own code failed at the end of the graph.
    """

    graph_module: fx.GraphModule
    decisions: tuple[bool, ...] = ()
    multi_argument_calls: frozenset[str] = frozenset()
    partial: bool = False


@dataclass(frozen=True, eq=False)
class Failed:
    """The reason why a model has no graph.

    Attributes:
        name: the class name of the model.
        reason: why it has none.
        fix: what to do about it.
        differs: there is a graph, but it computes something else than the model.
        within: the innermost module in whose forward the trace failed. None: the model itself.
        decisions: the results of the conditions before the failure.
        partial_graph: the graph before the failure, where ``TraceOptions.assume_false`` asks for it.
        cause: the exception that ended the trace.
    """

    name: str
    reason: str
    fix: str = FIX
    differs: bool = False
    within: nn.Module | None = None
    decisions: tuple[bool, ...] = ()
    partial_graph: Traced | None = None
    cause: Exception | None = None


def record(model: nn.Module, options: TraceOptions) -> Traced | Failed:
    """One trace of ``model``, which is as before afterwards."""
    name = type(model).__name__
    refusal = _refusal(model, options.faithful)
    if refusal is not None:
        return Failed(name, *refusal)
    with undisturbed(model):
        if options.training is not None:
            for module in model.modules():
                module.training = options.training
        with _side_effects(model) as effects, typed(model.modules()):
            outcome = _traced(model, options)
    if isinstance(outcome, Failed):
        return outcome
    if options.faithful and effects:
        return Failed(name, *effects[0])
    graph_module = outcome.graph_module
    graph_module.training = model.training
    for path, module in graph_module.named_modules():
        if type(module) is nn.Module:  # fx makes these to hold what the graph calls, in training mode
            module.training = model.get_submodule(path).training
    return outcome


def _refusal(model: nn.Module, faithful: bool) -> tuple[str, str] | None:
    """The reason not to trace a model at all, and the fix."""
    if "forward" in vars(model):
        reason = "its forward was replaced on this very object, and its graph would be that of the class"
        return reason, "Give it a class of its own."
    tensors = (model.named_parameters(recurse=False), model.named_buffers(recurse=False))
    held = chain(model.named_children(), *tensors)
    taken = next((name for name, _ in held if name == "meta" or hasattr(fx.GraphModule, name)), None)
    if taken is not None and not isinstance(model, fx.GraphModule):
        return f"{taken} is also the name of an attribute that each graph module has", "Rename it."
    if faithful and hooked(model):
        return "it has hooks, which a graph would drop", "Remove them, or trace the modules inside it."
    if faithful and calls_more(model):
        reason = "its class has a __call__ of its own, which a graph of its forward would drop"
        return reason, "Move what it does into the forward."
    return None


@contextmanager
def _side_effects(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Effects of a trace that no graph records, each with the fix; the random states are put back."""
    effects: list[tuple[str, str]] = []
    numbers, torch_state, python_state = _numbers(model), torch.get_rng_state(), random.getstate()
    try:
        yield effects
    finally:
        drawn = not torch.equal(torch_state, torch.get_rng_state()) or random.getstate() != python_state
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
    if drawn:
        reason = "it draws random numbers of constant shape, and a graph would repeat one draw"
        effects.append((reason, "Put them into a module of their own, and name it as a leaf."))
    for key, value in _numbers(model).items():
        if numbers.get(key, value) != value:
            reason = f"it assigns to its attribute {key[1]}, which a graph does not record"
            effects.append((reason, "Put it into a module of its own, and name it as a leaf."))
    for name in [name for name, buffer in model.named_buffers() if not isinstance(buffer, Tensor)]:
        reason = f"it assigns to its buffer {name}, which a graph does not record"
        effects.append((reason, "Write into the buffer in place (copy_, add_)."))


def _numbers(model: nn.Module) -> dict[tuple[int, str], float]:
    """The attributes of modules that are numbers, such as a count of their calls."""
    held = ((id(module), vars(module)) for module in model.modules())
    return {(key, name): value for key, named in held for name, value in named.items()
            if isinstance(value, int | float)}  # fmt: skip


def _traced(model: nn.Module, options: TraceOptions) -> Traced | Failed:
    """The trace in the modes that the modules are in."""
    name = type(model).__name__
    try:
        tracer = _tracer_of(model, options)
    except Exception as error:  # of a forward without a signature, or of arguments that it does not take
        return Failed(name, first_line(error), cause=error)
    try:
        return _module_of(model, tracer, _graph_with_stores(model, tracer, options))
    except Exception as error:  # whatever a model raises
        cause = error if tracer.stopped is None else tracer.stopped
        partial = _partial_graph(model, tracer) if options.assume_false and tracer.failed is None else None
        return Failed(
            name,
            first_line(cause),
            within=tracer.failed,
            decisions=tuple(tracer.decisions),
            partial_graph=partial,
            cause=cause,
        )


def _graph_with_stores(model: nn.Module, tracer: RegionTracer, options: TraceOptions) -> fx.Graph:
    """The graph, with a reader for each value that is kept on a module; the model is without these again.

    Raises: RuntimeError: the next call computes something else, or a value is kept that ``options`` forbid.
    """
    stores, held = Stores(model), {*vars(model)}
    graph = tracer.trace(model)
    new = {name: vars(model)[name] for name in _constants(tracer) & vars(model).keys() - held}
    every = list(stores.changed({*new}))
    stores.restore(every)
    changes = [change for change in every if not is_cache(change, every, model)]
    nodes = kept_nodes(changes)
    if changes and options.faithful:
        name = next((change.name for change in changes if replaces_constant(change)), changes[0].name)
        if nodes and options.stores == "fail":
            raise RuntimeError(f"it assigns to its attribute {name}, which a graph does not record")
        for each in new:
            delattr(model, each)
        if not _repeats(model, options, changes, graph):
            raise RuntimeError(
                f"it keeps its attribute {name} for the next call, which computes something else"
            )
        vars(model).update(new)
        stores.restore(every)
    if options.stores == "read":
        with graph.inserting_before(next(iter(reversed(graph.nodes)))):
            for node in nodes:
                graph.call_function(stored, (node,))
    return graph


def _repeats(model: nn.Module, options: TraceOptions, changes: list[Change], graph: fx.Graph) -> bool:
    """Whether the call after the one that made these changes does what the graph does."""
    if any(map(replaces_constant, changes)):
        return False
    held = {*vars(model)}
    stand_in(changes)
    tracer = _tracer_of(model, options)
    same = keys(tracer.trace(model)) == keys(graph)
    for name in _constants(tracer) - held:
        vars(model).pop(name, None)
    return same


def _constants(tracer: RegionTracer) -> set[str]:
    """The attributes of constant tensors, those that fx made among them."""
    return {str(name) for name in tracer.tensor_attrs.values()}


def _tracer_of(model: nn.Module, options: TraceOptions) -> RegionTracer:
    steering = fixed_arguments(model, options.example_inputs)
    fixed = steering if options.fixed is None else options.fixed
    values = None
    if options.example_inputs is not None:
        changed = {name: UnknownValue("it is no example") for name in steering if name not in fixed}
        values = Sizes(model, arguments_by_name(model, options.example_inputs) | changed)
    return RegionTracer(replace(options, fixed=fixed), values)


def _module_of(model: nn.Module, tracer: RegionTracer, graph: fx.Graph, partial: bool = False) -> Traced:
    graph_module = fx.GraphModule(model, graph, type(model).__name__)
    calls = frozenset(tracer.multi_argument_calls)
    return Traced(graph_module, tuple(tracer.decisions), calls, partial)


def _partial_graph(model: nn.Module, tracer: RegionTracer) -> Traced:
    """The graph up to the failure of the model's own code; it returns the values that nothing reads yet."""
    graph = tracer.graph
    graph.output(tuple(node for node in graph.nodes if not node.users))
    return _module_of(model, tracer, graph, partial=True)
