"""Graphs of a whole model, or of its largest submodules that have one.

A graph must compute what the model does, in training too. A trace fails with the reason where that of plain
fx silently freezes random numbers, gradient modes or values computed from buffers. Traces in both modes show
whether the graph depends on the training flag.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.passes.shape_prop import ShapeProp

from fxexpand.running.evaluation import evaluating, undisturbed
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.running.outputs import agree, outputs_of, seed, tensors_of
from fxexpand.tracing.export import export, module_of, muted
from fxexpand.tracing.guards import UntraceableError as UntraceableError
from fxexpand.tracing.guards import arguments_by_name, guard, mode_of, require_argument, require_class
from fxexpand.tracing.recording import Failed, Traced, record
from fxexpand.tracing.tracer import FAILURES, Leaf, RegionTracer, TraceOptions, first_line


@dataclass(frozen=True, eq=False)
class Regions:
    """The largest submodules of a model that have a graph, and why those around them have none.

    Attributes:
        graphs: ``(dotted name, graph)``; one entry named "" where the whole model has a graph.
        failures: the reason by the dotted name.
    """

    graphs: tuple[tuple[str, fx.GraphModule], ...]
    failures: dict[str, str]


def trace(
    model: nn.Module, *, leaf: Leaf | None = None, example_inputs: ExampleInputs | None = None
) -> fx.GraphModule:
    """The graph of ``model``, which shares its modules, parameters and buffers; the model is as it was.

    It is symbolic where such a graph exists. Leaves are torch's own modules, those that timm and torchvision
    declare (where imported), expanded layers, parametrized modules, modules with hooks, and modules without
    parameters that read their training flag. Optional arguments that are None, a bool or a string are fixed
    to their default, or to their value in ``example_inputs``: the graph raises when it is called with another
    value.

    Otherwise, with ``example_inputs``, it is a graph of ATen operators made by ``torch.export``: of the path
    that these inputs take through the code, in the mode that the model is in, for all sizes that take the
    same path. It takes the arguments that were given, and raises in the other mode and for other paths.

    Args:
        leaf: ``(name, module) -> bool``: further modules to keep whole, which ``torch.export`` cannot.
        example_inputs: run once, to check the graph against the model and to record shapes in the nodes.

    Returns:
        A graph that holds in both modes or, where ``mode_of`` says so, one that raises in the other mode.

    Raises: UntraceableError: there is no such graph. A symbolic one fails for control flow on values, a hook
        on the model itself, random numbers drawn outside the graph, a gradient mode or autocast switched
        inside, a mapping of an unknown class, a ``__call__`` of its own, or a trace that computes something
        else than the model. ``torch.export`` fails for control flow on the values of tensors, and for
        everything that it does not support.
    """
    outcome = attempt_symbolic(model, TraceOptions(leaf, example_inputs))
    if isinstance(outcome, Failed) and example_inputs is not None and leaf is None:
        outcome = _exported(model, example_inputs, outcome)
    return _graph_of(outcome)


def _exported(model: nn.Module, example_inputs: ExampleInputs, symbolic_failure: Failed) -> Traced | Failed:
    """The graph of torch.export, compared with the model outside of training."""
    try:
        graph_module = module_of(export(model, example_inputs), model.training)
    except (*FAILURES, SyntaxError) as error:  # of a guard for a string with quotes in it
        reason = f"{symbolic_failure.reason}; torch.export: {first_line(error)}"
        return Failed(type(model).__name__, reason, cause=error)
    if model.training:
        return Traced(graph_module)
    actual, expected = (outputs_of(each, example_inputs) for each in (graph_module, model))
    return _difference(model, actual, expected) or Traced(graph_module)


def symbolic(
    model: nn.Module, *, leaf: Leaf | None = None, example_inputs: ExampleInputs | None = None
) -> fx.GraphModule:
    """The symbolic graph of ``trace``, for all paths that its guards do not exclude.

    Raises: UntraceableError.
    """
    return _graph_of(attempt_symbolic(model, TraceOptions(leaf, example_inputs)))


def _graph_of(outcome: Traced | Failed) -> fx.GraphModule:
    if isinstance(outcome, Failed):
        message = f"{outcome.name}: {outcome.reason}. {outcome.fix}"
        raise UntraceableError(message, outcome.reason) from outcome.cause
    return outcome.graph_module


def attempt_symbolic(model: nn.Module, options: TraceOptions) -> Traced | Failed:
    """The symbolic graph of ``trace``, or the reason why there is none.

    Raises: whatever the model raises for its example inputs.
    """
    outcome = in_both_modes(model, options)
    if isinstance(outcome, Failed):
        return outcome
    if options.example_inputs is not None:
        return check_with_shapes(outcome.graph_module, model, options.example_inputs) or outcome
    if isinstance(model, fx.GraphModule):
        _keep_records(model.graph, outcome.graph_module.graph)
    return outcome


def in_both_modes(model: nn.Module, options: TraceOptions) -> Traced | Failed:
    """A trace that holds in both modes, or in the present mode with a guard for it."""
    training = record(model, replace(options, training=True))
    if isinstance(training, Failed):
        return training
    evaluation = record(model, replace(options, training=False))
    if isinstance(evaluation, Failed):
        return evaluation
    if training.decisions == evaluation.decisions and _same_graph(
        training.graph_module, evaluation.graph_module, model
    ):
        return training
    outcome = record(model, options)
    if isinstance(outcome, Traced):
        guard(outcome.graph_module)
    return outcome


def fixes_arguments(graph_module: fx.GraphModule) -> bool:
    """Whether a graph made by ``trace`` raises when some argument is not the one it was traced with."""
    return any(node.target in (require_argument, require_class) for node in graph_module.graph.nodes)


def regions(model: nn.Module, *, leaf: Leaf | None = None) -> Regions:
    """The largest submodules of ``model`` that have a graph for both modes, from the root down.

    Each is tried once; the leaves of a trace are no regions.
    """
    graphs: list[tuple[str, fx.GraphModule]] = []
    failures: dict[str, str] = {}
    seen: set[int] = set()
    taken: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        inside = {id(inner) for inner in module.modules()}
        options = TraceOptions(_within(name, leaf))
        outcome = attempt_symbolic(module, options)
        if isinstance(outcome, Failed):
            failures[name] = outcome.reason
        elif mode_of(outcome.graph_module) is not None:
            failures[name] = "its graph differs between train and eval mode"
        elif inside & taken:
            failures[name] = "it shares modules with an earlier region"
        else:
            taken.update(inside)
            graphs.append((name, outcome.graph_module))
            return
        tracer = RegionTracer(options)
        for child_name, child in module.named_children():
            holder = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if holder or not tracer.is_leaf_module(child, child_name):
                visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return Regions(tuple(graphs), failures)


def _within(name: str, leaf: Leaf | None) -> Leaf | None:
    """``leaf``, which takes names from the root, for a trace that starts at the submodule ``name``."""
    if leaf is None or not name:
        return leaf
    return lambda inner, module: leaf(f"{name}.{inner}", module)


def _same_graph(one: fx.GraphModule, two: fx.GraphModule, model: nn.Module) -> bool:
    """Whether two traces of ``model`` hold the same operations, arguments and constants."""
    nodes = zip(one.graph.nodes, two.graph.nodes, strict=False)
    if len(one.graph.nodes) != len(two.graph.nodes) or any(_key(a) != _key(b) for a, b in nodes):
        return False
    own = {name for name, _ in chain(model.named_buffers(), model.named_parameters())}
    constants = [node.target for node in one.graph.nodes if node.op == "get_attr" and node.target not in own]
    pairs = ((attrgetter(target)(one), attrgetter(target)(two)) for target in constants)
    return all(a is b or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in pairs)


def _key(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, repr(node.args), repr(node.kwargs)


class _ShapePropagation(ShapeProp):
    """torch's, but functions that write into a list get a list, as in the code of a graph."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {key: _mutable(value) for key, value in kwargs.items()}


def _mutable(value: Any) -> Any:
    if isinstance(value, immutable_list):
        return [_mutable(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: _mutable(item) for key, item in value.items()}
    return value


def _keep_records(source: fx.Graph, trace: fx.Graph) -> None:
    """Copy the shapes and dtypes of an export or an earlier trace into a trace with the same calls."""
    # A trace makes a call without inputs (torch.empty) a constant.
    old, new = (
        [n for n in graph.nodes if n.op == "placeholder" or (n.all_input_nodes and n.op != "output")]
        for graph in (source, trace)
    )
    if [(node.op, node.target) for node in old] == [(node.op, node.target) for node in new]:
        for before, after in zip(old, new, strict=True):
            after.meta |= {key: before.meta[key] for key in ("val", "tensor_meta") if key in before.meta}


def check_with_shapes(
    graph_module: fx.GraphModule, model: nn.Module, example_inputs: ExampleInputs
) -> Failed | None:
    """Run both once: record shapes in the nodes' meta; return the failure where the outputs differ.

    Raises: whatever the model raises for the example inputs.
    """
    given = arguments_by_name(model, copy_inputs(example_inputs))
    inputs: list[Any] = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if node.target.startswith("**") and given.get(node.target[2:]):
            reason = f"a graph has no {node.target}"
            return Failed(type(model).__name__, reason, "Leave them out of example_inputs.")
        if node.target.startswith("*"):
            inputs.extend(given.get(node.target[1:], ()))
        else:
            inputs.append(given[node.target] if node.target in given else node.args[0])
    try:
        expected = outputs_of(model, example_inputs)
        with (
            undisturbed(model),
            evaluating(model),
            muted(),
        ):  # torch prints errors of a node to stderr as well
            seed(model)
            actual = tensors_of(_ShapePropagation(graph_module).propagate(*inputs))
    except UntraceableError as error:  # of a guard in the model, for an argument or for a mode
        return Failed(type(model).__name__, first_line(error), cause=error)
    if mode_of(graph_module) == "train":  # the model ran in eval mode
        return None
    return _difference(model, actual, expected)


def _difference(model: nn.Module, actual: list[Tensor], expected: list[Tensor]) -> Failed | None:
    """The failure of a graph that returns something else than the model."""
    if agree(actual, expected):
        return None
    reason = "its trace computes something else: it goes by a type or a value that no trace sees"
    return Failed(type(model).__name__, reason, differs=True)
