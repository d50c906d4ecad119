"""Traces: one graph for a whole model, or graphs of the largest submodules that have one.

A graph must do what the model does, for training too. What a plain trace would freeze without a word stops
this one with the reason: random numbers, gradient modes, values computed from buffers. A training flag that
the graph depends on is found by tracing in both modes.
"""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.passes.shape_prop import ShapeProp

from fxexpand.running.evaluation import evaluating, undisturbed
from fxexpand.running.inputs import ExampleInputs, as_call
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.running.outputs import agree, outputs_of, seed, tensors_of
from fxexpand.tracing.example_values import Sizes, UnknownValue
from fxexpand.tracing.export import export, module_of
from fxexpand.tracing.guards import UntraceableError as UntraceableError
from fxexpand.tracing.guards import fixed_arguments, guard, mode_of, require_argument, signature_of
from fxexpand.tracing.tracer import FAILURES, Leaf, RegionTracer, calls_more, first_line
from fxexpand.tracing.tracer import hooked as hooked

# In the meta of a graph module, what its tracer found; see ``RegionTracer``.
DECISIONS, WORDY, BEGUN = "fxexpand_decisions", "fxexpand_wordy", "fxexpand_begun"


def _untraceable(
    model: nn.Module, reason: str, fix: str, differs: bool = False, within: nn.Module | None = None
) -> UntraceableError:
    return UntraceableError(f"{_title(model)}: {reason}. {fix}", reason, differs, within)


@dataclass(frozen=True, eq=False)
class Regions:
    """The largest traceable submodules of a model, and why what is around them has no graph.

    Attributes:
        graphs: ``(dotted name, graph)``; one entry named "" where the whole model has a graph.
        failures: reason by dotted name.
    """

    graphs: tuple[tuple[str, fx.GraphModule], ...]
    failures: dict[str, str]


def trace(
    model: nn.Module, *, leaf: Leaf | None = None, example_inputs: ExampleInputs | None = None
) -> fx.GraphModule:
    """The graph of ``model``, which shares its modules, parameters and buffers; the model is as it was.

    A symbolic graph where there is one. Leaves are torch's own modules, those that timm and torchvision
    declare (where imported), expanded layers, parametrized modules, modules with hooks, and modules without
    parameters that read their training flag. Optional arguments that are None, a bool or a string are fixed
    to their default, or to their value in ``example_inputs``: the graph raises when it is called with another
    value.

    Otherwise, with ``example_inputs``, a graph of ATen operators made by ``torch.export``: of the path that
    these inputs take through the code, in the mode that the model is in, for all sizes that take the same
    path. It takes the arguments that were given, and raises in the other mode and for other paths.

    Args:
        leaf: ``(name, module) -> bool``: further modules to keep whole, which ``torch.export`` cannot.
        example_inputs: run once, to check the graph against the model and to record shapes in the nodes.

    Returns:
        A graph that holds in both modes or, where ``mode_of`` says so, one that raises in the other mode.

    Raises: UntraceableError: there is no such graph. What stops a symbolic one: control flow on values, a
        hook on the model itself, random numbers drawn outside the graph, a gradient mode or autocast switched
        inside, a mapping of an unknown class, a ``__call__`` of its own, or a trace that computes something
        else than the model. What stops ``torch.export``: control flow on the values of tensors, and whatever
        it does not support.
    """
    try:
        return symbolic(model, leaf=leaf, example_inputs=example_inputs)
    except UntraceableError as error:
        if example_inputs is None or leaf is not None:
            raise
        return _exported(model, example_inputs, error)


def _exported(model: nn.Module, example_inputs: ExampleInputs, because: UntraceableError) -> fx.GraphModule:
    """The graph that torch.export makes, checked; ``because`` is why there is no symbolic one."""
    try:
        graph_module = module_of(export(model, example_inputs), model.training)
    except (*FAILURES, SyntaxError) as error:  # of a guard for a string with quotes in it
        reason = f"{because.reason}; torch.export: {first_line(error)}"
        fix = "fxexpand.tracing.regions finds the parts that have a graph."
        raise _untraceable(model, reason, fix) from error
    if not model.training:
        _require_same(model, outputs_of(graph_module, example_inputs), outputs_of(model, example_inputs))
    return graph_module


def symbolic(
    model: nn.Module, *, leaf: Leaf | None = None, example_inputs: ExampleInputs | None = None
) -> fx.GraphModule:
    """The symbolic graph of ``trace``, which is that of all paths that its guards do not exclude.

    Raises: UntraceableError.
    """
    graph_module = in_both_modes(model, leaf, example_inputs)
    if example_inputs is not None:
        check_with_shapes(graph_module, model, example_inputs)
    elif isinstance(model, fx.GraphModule):
        _keep_records(model.graph, graph_module.graph)
    return graph_module


def in_both_modes(
    model: nn.Module,
    leaf: Leaf | None,
    example_inputs: ExampleInputs | None,
    along: Sequence[bool] | None = None,
) -> fx.GraphModule:
    """A trace that holds in both modes, or is guarded; see ``record``.

    Raises: UntraceableError.
    """
    modes = (record(model, leaf, example_inputs, training=flag, along=along) for flag in (True, False))
    graph_module, evaluation = modes
    same = decisions_of(graph_module) == decisions_of(evaluation)  # which a graph does not show
    if not same or not _same_graph(graph_module, evaluation, model):
        graph_module = record(model, leaf, example_inputs, along=along)
        guard(graph_module)
    return graph_module


def fixes_arguments(graph_module: fx.GraphModule) -> bool:
    """Whether a graph made by ``trace`` raises when some argument is not the one it was traced with."""
    return any(node.target is require_argument for node in graph_module.graph.nodes)


def regions(model: nn.Module, *, leaf: Leaf | None = None) -> Regions:
    """The largest submodules of ``model`` that have a graph for both modes, found from the root down.

    Each is tried once; modules that a trace keeps whole anyway are no regions.
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
        try:
            graph_module = symbolic(module, leaf=_within(name, leaf))
        except UntraceableError as error:
            failures[name] = error.reason
        else:
            if mode_of(graph_module) is not None:
                failures[name] = "its graph differs between train and eval mode"
            elif inside & taken:
                failures[name] = "it shares modules with an earlier region"
            else:
                taken.update(inside)
                graphs.append((name, graph_module))
                return
        tracer = RegionTracer(_within(name, leaf))
        for child_name, child in module.named_children():
            holder = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if holder or not tracer.is_leaf_module(child, child_name):
                visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return Regions(tuple(graphs), failures)


def record(
    model: nn.Module,
    leaf: Leaf | None = None,
    example_inputs: ExampleInputs | None = None,
    *,
    training: bool | None = None,
    faithful: bool = True,
    fixed: Mapping[str, Any] | None = None,
    along: Sequence[bool] | None = None,
    blind: bool = False,
) -> fx.GraphModule:
    """One trace, in the modes that the modules are in or in the one given; the model is as before afterwards.

    Args:
        faithful: raise for what a graph cannot do again; without it the graph is for reading only.
        fixed: values of arguments, by the names of their placeholders; None takes those of ``trace``.
        along: how the first branches go where control flow goes by sizes; the others go as those of the
            example inputs do. The length of a shape is known then, too. None: such control flow raises.
        blind: branches that go by anything else are taken, too; see ``RegionTracer``. An error then holds
            the graph that has begun.

    Raises: UntraceableError.
    """
    if "forward" in vars(model):
        reason = "its forward was replaced on this very object, and its graph would be that of the class"
        raise _untraceable(model, reason, "Give it a class of its own.")
    if faithful and hooked(model):
        reason = "it has hooks, which a graph would drop"
        raise _untraceable(model, reason, "Remove them, or trace the modules inside it.")
    if faithful and calls_more(model):
        reason = "its class has a __call__ of its own, which a graph of its forward would drop"
        raise _untraceable(model, reason, "Move what it does into the forward.")
    with undisturbed(model):
        if training is not None:
            for module in model.modules():
                module.training = training
        numbers = _numbers(model) if faithful else {}
        random_state, pythons = torch.get_rng_state(), random.getstate()
        tracer: RegionTracer | None = None
        try:
            own = fixed_arguments(model, example_inputs)
            fixed = own if fixed is None else fixed
            sizes = None
            if along is not None and example_inputs is not None:
                other = {name: UnknownValue("it is no example") for name in own if name not in fixed}
                sizes = Sizes(model, _by_name(model, example_inputs) | other)
            tracer = RegionTracer(leaf, fixed, faithful, sizes, along or (), blind)
            graph_module = _module(model, tracer, tracer.trace(model))
        except Exception as error:  # whatever a model raises
            cause = error if tracer is None or tracer.stopped is None else tracer.stopped
            fix = "fxexpand.tracing.regions finds the parts that have a graph."
            failed = _untraceable(model, first_line(cause), fix)
            if tracer is not None:
                failed.within, failed.decisions = tracer.failed, tuple(tracer.decisions)
                failed.begun = _begun(model, tracer) if blind and tracer.failed is None else None
            raise failed from cause
        finally:
            drawn = not torch.equal(random_state, torch.get_rng_state()) or random.getstate() != pythons
            torch.set_rng_state(random_state)
            random.setstate(pythons)
        after = _numbers(model) if faithful else {}
        counted = [key[1] for key, value in after.items() if numbers.get(key, value) != value]
        written = [name for name, buffer in model.named_buffers() if not isinstance(buffer, Tensor)]
    graph_module.training = model.training
    for name, module in graph_module.named_modules():
        if type(module) is nn.Module:  # fx makes these to hold what the graph calls, in training mode
            module.training = model.get_submodule(name).training
    if faithful and drawn:
        reason = "it draws random numbers of constant shape, and a graph would repeat one draw"
        raise _untraceable(model, reason, "Put them into a module of their own, and name it as a leaf.")
    if faithful and counted:
        reason = f"it assigns to its attribute {counted[0]}, which a graph does not record"
        raise _untraceable(model, reason, "Put it into a module of its own, and name it as a leaf.")
    if faithful and written:
        reason = f"it assigns to its buffer {written[0]}, which a graph does not record"
        raise _untraceable(model, reason, "Write into the buffer in place (copy_, add_).")
    return graph_module


def _begun(model: nn.Module, tracer: RegionTracer) -> fx.GraphModule:
    """The graph of what was traced before the model's own code failed; it returns what nothing reads yet."""
    graph = tracer.graph
    graph.output(tuple(node for node in graph.nodes if not node.users))
    graph_module = _module(model, tracer, graph)
    graph_module.meta[BEGUN] = True
    return graph_module


def _module(model: nn.Module, tracer: RegionTracer, graph: fx.Graph) -> fx.GraphModule:
    graph_module = fx.GraphModule(model, graph, type(model).__name__)
    graph_module.meta |= {DECISIONS: tuple(tracer.decisions), WORDY: tracer.wordy}
    return graph_module


def _numbers(model: nn.Module) -> dict[tuple[int, str], float]:
    """The attributes of modules that are numbers, such as a count of their calls."""
    held = ((id(module), vars(module)) for module in model.modules())
    return {(key, name): value for key, named in held for name, value in named.items()
            if isinstance(value, int | float)}  # fmt: skip


def decisions_of(graph_module: fx.GraphModule) -> tuple[bool, ...]:
    """How the branches went where control flow goes by sizes; see ``record``."""
    found: tuple[bool, ...] = graph_module.meta.get(DECISIONS, ())
    return found


def unfinished(graph_module: fx.GraphModule) -> bool:
    """Whether the code of the model failed at the end of the graph; see ``UntraceableError.begun``."""
    return BEGUN in graph_module.meta


def _by_name(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    """The example inputs by the names of their placeholders, which a rest (``*args``) has not."""
    args, kwargs = as_call(example_inputs)
    return dict(signature_of(model).bind(*args, **kwargs).arguments)


def _within(name: str, leaf: Leaf | None) -> Leaf | None:
    """``leaf``, which takes names from the root, for a trace that starts at ``name``."""
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
    pairs = ((_read(one, target), _read(two, target)) for target in constants)
    return all(a is b or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in pairs)


def _key(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, repr(node.args), repr(node.kwargs)


def _read(root: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(root.get_submodule(path), name)


class _OwnLists(ShapeProp):
    """Functions that write into a list get one of their own, as they do in the code of a graph."""

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
    """The shapes and dtypes that an export or an earlier trace recorded, where the new one calls the same."""
    # What has no node for an input (torch.empty) is a constant to a trace.
    old, new = (
        [n for n in graph.nodes if n.op == "placeholder" or (n.all_input_nodes and n.op != "output")]
        for graph in (source, trace)
    )
    if [(node.op, node.target) for node in old] == [(node.op, node.target) for node in new]:
        for before, after in zip(old, new, strict=True):
            after.meta |= {key: before.meta[key] for key in ("val", "tensor_meta") if key in before.meta}


def check_with_shapes(graph_module: fx.GraphModule, model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run both once: record shapes in the nodes' meta, and compare what is returned.

    Raises: UntraceableError: they return something else.
    """
    given = _by_name(model, copy_inputs(example_inputs))
    inputs: list[Any] = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if node.target.startswith("**") and given.get(node.target[2:]):
            raise _untraceable(model, f"a graph has no {node.target}", "Leave them out of example_inputs.")
        if node.target.startswith("*"):
            inputs.extend(given.get(node.target[1:], ()))
        else:
            inputs.append(given[node.target] if node.target in given else node.args[0])
    expected = outputs_of(model, example_inputs)
    quiet = redirect_stderr(io.StringIO())  # where torch prints what it raises as well
    with undisturbed(model), evaluating(model), quiet:
        seed(model)
        actual = tensors_of(_OwnLists(graph_module).propagate(*inputs))
    if mode_of(graph_module) != "train":  # the model ran in eval mode
        _require_same(model, actual, expected)


def _require_same(model: nn.Module, actual: list[Tensor], expected: list[Tensor]) -> None:
    if not agree(actual, expected):
        reason = "its trace computes something else: it goes by a type or a value that no trace sees"
        raise _untraceable(model, reason, "fxexpand.tracing.regions finds the parts that have a graph.", True)


def _title(module: nn.Module) -> str:
    return type(module).__name__
