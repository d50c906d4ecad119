"""Symbolic traces: one graph for a whole model, or graphs of the largest submodules that have one.

A graph must do what the model does, for training too. What a plain trace would freeze without a word stops
this one with the reason: random numbers, gradient modes, values computed from buffers. A training flag that
the graph depends on is found by tracing in both modes.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import MethodType, ModuleType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from fxexpand.errors import FxExpandError
from fxexpand.evaluating import evaluating
from fxexpand.inputs import ExampleInputs, as_call, call
from fxexpand.inputs import copy as copy_inputs
from fxexpand.outputs import tensors_of, worst_error

Leaf: TypeAlias = Callable[[str, nn.Module], bool]
Mode: TypeAlias = Literal["train", "eval"]

GUARD = "fxexpand_mode"  # the ModeGuard of a graph that holds in one mode
ROUNDINGS = 1000  # of a trace against its model: both do the same operations, in the same order

# What forward code raises when it is given proxies instead of tensors.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


class UntraceableError(FxExpandError):
    """A model has no single graph; the message says which, why and what to do, ``reason`` why."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


def _untraceable(model: nn.Module, reason: str, fix: str) -> UntraceableError:
    return UntraceableError(f"{_title(model)}: {reason}. {fix}", reason)


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

    Leaves are torch's own modules, those that timm and torchvision declare (where imported), expanded layers,
    parametrized modules, modules with hooks, and modules without parameters that read their training flag.
    Optional arguments that are None, a bool or a string are fixed to their default, or to their value in
    ``example_inputs``: the graph raises when it is called with another value.

    Args:
        leaf: ``(name, module) -> bool``: further modules to keep whole.
        example_inputs: run once, to check the graph against the model and to record shapes in the nodes.

    Returns:
        A graph that holds in both modes or, where ``mode_of`` says so, one that raises in the other mode.

    Raises: UntraceableError: control flow on values, a hook on the model itself, random numbers drawn outside
        the graph, a gradient mode switched inside, or a trace that computes something else than the model.
    """
    modes = (record(model, leaf, example_inputs, training=flag) for flag in (True, False))
    graph_module, evaluation = modes
    if not _same_graph(graph_module, evaluation, model):
        graph_module = record(model, leaf, example_inputs)
        _guard(graph_module)
    if example_inputs is not None:
        _check_with_shapes(graph_module, model, example_inputs)
    return graph_module


def mode_of(graph_module: fx.GraphModule) -> Mode | None:
    """The only mode in which a graph made by ``trace`` holds; None where it holds in both."""
    return next((module.mode for module in graph_module.children() if isinstance(module, ModeGuard)), None)


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
            graph_module = trace(module, leaf=_within(name, leaf))
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


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class' forward: hooks, or a forward of its own."""
    held = vars(module)
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in held or any(held.get(name) for name in names)


class RegionTracer(fx.Tracer):
    """fx's tracer with the leaves of ``trace``, buffers kept as reads, and look-ups in constant time."""

    def __init__(
        self, leaf: Leaf | None = None, fixed: dict[str, Any] | None = None, faithful: bool = True
    ) -> None:
        types, functions, modules = _library_leaves()
        super().__init__(autowrap_modules=modules, autowrap_functions=functions)  # type: ignore[arg-type]
        self._types = types
        self._leaf = leaf
        self._fixed = fixed or {}
        self._faithful = faithful
        self._names: dict[int, str] = {}
        self._gradients = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """See ``fx.Tracer.trace``."""
        tensors = chain(root.named_buffers(), root.named_parameters())
        self._names = {id(tensor): name for name, tensor in tensors}
        self._gradients = torch.is_grad_enabled()
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one node of the graph."""
        if super().is_leaf_module(m, module_qualified_name) or isinstance(m, self._types):
            return True
        ours = type(m).__module__.startswith("fxexpand.") and not isinstance(m, nn.Sequential)
        kept = ours or parametrize.is_parametrized(m) or isinstance(m, torch.jit.ScriptModule) or hooked(m)
        # torchvision.ops: the operators, not the blocks of layers that are also found there.
        operator = type(m).__module__.startswith("torchvision.ops.") and not m._modules
        asked = self._leaf is not None and self._leaf(module_qualified_name, m)
        return kept or operator or asked or _switch(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer read by the forward: one node of the graph."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """See ``fx.Tracer.create_arg``."""
        if isinstance(a, Tensor) and id(a) in self._names:
            return self.create_node("get_attr", self._names[id(a)], (), {})
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """See ``fx.Tracer.create_node``."""
        if self._faithful and torch.is_grad_enabled() != self._gradients:
            raise RuntimeError("it switches gradients on or off, which a graph does not record")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The arguments that the forward is traced with: proxies, but for the fixed ones."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):
            if isinstance(arg, fx.Proxy) and arg.node.target in self._fixed:
                name = str(arg.node.target)
                expected = self._fixed[name]
                guard = self.create_proxy("call_function", require_argument, (arg, expected, name), {})
                guard.node.meta["is_wrapped"] = True  # a node again when a pickled graph is read
                args[i] = {} if name.startswith("**") else expected
        return function, args


class ModeGuard(nn.Module):
    """Part of a graph: raises unless the graph is in the mode that it was traced in."""

    _is_impure = True  # what keeps fx from removing it as dead code

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.mode = mode
        self.training = mode == "train"

    def forward(self) -> None:
        """Check the training flag, which follows that of the graph module."""
        if self.training != (self.mode == "train"):
            raise UntraceableError(
                f"this graph was traced in {self.mode} mode and holds in that mode only. "
                "Trace the model again in the other mode."
            )


@fx.has_side_effect
def require_argument(value: Any, expected: Any, name: str) -> None:
    """Part of a graph: raise unless the argument has the value that the graph was traced with."""
    same = not value if name.startswith("*") else not isinstance(value, Tensor) and value == expected
    if not same:
        raise UntraceableError(
            f"argument {name}: this graph was traced with {expected!r} and holds for nothing else. "
            "Trace again with example_inputs that give it."
        )


def record(
    model: nn.Module,
    leaf: Leaf | None = None,
    example_inputs: ExampleInputs | None = None,
    *,
    training: bool | None = None,
    faithful: bool = True,
) -> fx.GraphModule:
    """One trace, in the modes that the modules are in or in the one given; the model is as before afterwards.

    Args:
        faithful: raise for what a graph cannot do again; without it the graph is for reading only.

    Raises: UntraceableError.
    """
    if "forward" in vars(model):
        reason = "its forward was replaced on this very object, and its graph would be that of the class"
        raise _untraceable(model, reason, "Give it a class of its own.")
    if faithful and hooked(model):
        reason = "it has hooks, which a graph would drop"
        raise _untraceable(model, reason, "Remove them, or trace the modules inside it.")
    with _undisturbed(model):
        if training is not None:
            for module in model.modules():
                module.training = training
        random_state = torch.get_rng_state()
        try:
            fixed = _fixed_arguments(model, example_inputs)
            graph = RegionTracer(leaf, fixed, faithful).trace(model)
            graph_module = fx.GraphModule(model, graph, type(model).__name__)
        except _FAILURES as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            fix = "fxexpand.tracing.regions finds the parts that have a graph."
            raise _untraceable(model, reason, fix) from error
        drawn = not torch.equal(random_state, torch.get_rng_state())
        torch.set_rng_state(random_state)
        written = [name for name, buffer in model.named_buffers() if not isinstance(buffer, Tensor)]
    graph_module.training = model.training
    if faithful and drawn:
        reason = "it draws random numbers of constant shape, and a graph would repeat one draw"
        raise _untraceable(model, reason, "Put them into a module of their own, and name it as a leaf.")
    if faithful and written:
        reason = f"it assigns to its buffer {written[0]}, which a graph does not record"
        raise _untraceable(model, reason, "Write into the buffer in place (copy_, add_).")
    return graph_module


def _library_leaves() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...], tuple[ModuleType, ...]]:
    """(module types, functions, modules of functions) to keep whole, of the libraries that are imported."""
    types: tuple[type, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    modules: tuple[ModuleType, ...] = (math,)
    timm = sys.modules.get("timm.models._features_fx")
    if timm is not None:
        types = tuple(timm.get_notrace_modules())
        functions = tuple(function for function in timm.get_notrace_functions() if callable(function))
    ops = sys.modules.get("torchvision.ops")
    if ops is not None:
        modules = (math, ops)
    return types, functions, modules


def _switch(module: nn.Module) -> bool:
    """A module that holds no tensor and reads its training flag, such as stochastic depth.

    Kept whole it works in both modes, and nothing that could be rewritten is inside.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    reads = code is not None and "training" in code.co_names
    return reads and next(chain(module.parameters(), module.buffers()), None) is None


def _within(name: str, leaf: Leaf | None) -> Leaf | None:
    """``leaf``, which takes names from the root, for a trace that starts at ``name``."""
    if leaf is None or not name:
        return leaf
    return lambda inner, module: leaf(f"{name}.{inner}", module)


def _fixed_arguments(model: nn.Module, example_inputs: ExampleInputs | None) -> dict[str, Any]:
    """Values for the arguments that steer a forward, by the names of their placeholders."""
    signature = _signature(model)
    given: dict[str, Any] = {}
    if example_inputs is not None:
        args, kwargs = as_call(example_inputs)
        given = signature.bind(*args, **kwargs).arguments
    fixed: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if not given.get(name):
                stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
                fixed[stars + name] = ()
            continue
        value = given.get(name, parameter.default)
        if value is None or isinstance(value, bool | str):
            fixed[name] = value
    return fixed


def _signature(model: nn.Module) -> inspect.Signature:
    return inspect.signature(MethodType(type(model).forward, model))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The attributes of all modules are restored afterwards, training flags and plain containers among them.

    fx stores constants on the model it traces, and a forward may keep what it computes (a cache).
    """
    saved: list[tuple[Any, Any]] = []
    for module in model.modules():
        held = vars(module)
        saved.append((held, dict(held)))
        saved.extend((value, value.copy()) for value in held.values() if isinstance(value, dict | set | list))
    try:
        yield
    finally:
        for container, content in saved:
            container.clear()
            extend = container.extend if isinstance(container, list) else container.update
            extend(content)


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


def _guard(graph_module: fx.GraphModule) -> None:
    """Have the graph raise in any mode but the present one; unlike a hook, this is pickled with it."""
    graph_module.add_module(GUARD, ModeGuard("train" if graph_module.training else "eval"))
    graph = graph_module.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.call_module(GUARD)
    graph_module.recompile()


def _check_with_shapes(graph_module: fx.GraphModule, model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run both once: record shapes in the nodes' meta, and compare what is returned."""
    args, kwargs = as_call(copy_inputs(example_inputs))
    given = _signature(model).bind(*args, **kwargs).arguments
    inputs: list[Any] = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if node.target.startswith("**") and given.get(node.target[2:]):
            raise _untraceable(model, f"a graph has no {node.target}", "Leave them out of example_inputs.")
        if node.target.startswith("*"):
            inputs.extend(given.get(node.target[1:], ()))
        else:
            inputs.append(given[node.target] if node.target in given else node.args[0])
    with evaluating(model):
        random_state = torch.get_rng_state()
        expected = tensors_of(call(model, copy_inputs(example_inputs)))
        torch.set_rng_state(random_state)
        actual = tensors_of(ShapeProp(graph_module).propagate(*inputs))
    if mode_of(graph_module) == "train":
        return  # the model ran in eval mode
    eps = max((torch.finfo(t.dtype).eps for t in expected if t.is_floating_point()), default=0.0)
    limit = min(ROUNDINGS * eps, 0.1)
    if not all(tensor.is_meta for tensor in expected) and worst_error(actual, expected) > limit:
        reason = "its trace computes something else: it goes by a type or a value that no trace sees"
        raise _untraceable(model, reason, "fxexpand.tracing.regions finds the parts that have a graph.")


def _title(module: nn.Module) -> str:
    return type(module).__name__
