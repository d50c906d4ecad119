"""Guards: a graph that holds in one mode or for one value of an argument raises for any other."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn.modules.conv import _ConvNd

from fxexpand.errors import FxExpandError
from fxexpand.running.inputs import ExampleInputs, as_call


class UntraceableError(FxExpandError):
    """A model has no graph, or its graph does not hold for a call; the message says why and what to do.

    Attributes:
        reason: why.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


@fx.has_side_effect
def require_argument(value: Any, expected: Any, name: str) -> None:
    """Raise unless the argument has the value that the graph was traced with: a node of that graph.

    Raises: UntraceableError.
    """
    if isinstance(value, fx.Proxy):  # in a trace of that graph, also where a pickled one is loaded
        value.tracer.create_proxy("call_function", require_argument, (value, expected, name), {})
        return
    same = not value if name.startswith("*") else not isinstance(value, Tensor) and value == expected
    if not same:
        raise UntraceableError(
            f"argument {name}: this graph was traced with {expected!r} and holds for nothing else. "
            "Trace again with example_inputs that give it."
        )


@fx.has_side_effect
def require_class(value: Any, kind: str, name: str) -> None:
    """Raise unless the argument is of the class that the graph was traced for: a node of that graph.

    Raises: UntraceableError.
    """
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", require_class, (value, kind, name), {})
    elif all(each.__name__ != kind for each in type(value).__mro__):
        raise UntraceableError(
            f"argument {name}: this graph was traced for a {kind}, not for a {type(value).__name__}. "
            "Trace again with example_inputs that give it."
        )


@fx.has_side_effect
def require_tensor(value: Any, ndim: int | None, name: str) -> None:
    """Raise unless a value is a tensor, with so many dimensions if given: a node of a graph.

    Raises: UntraceableError.
    """
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", require_tensor, (value, ndim, name), {})
    elif not isinstance(value, Tensor) or (ndim is not None and value.dim() != ndim):
        given = f"one of {value.dim()}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        size = "" if ndim is None else f" of {ndim} dimensions"
        raise UntraceableError(
            f"argument {name}: this graph was made for a tensor{size}, not for {given}. "
            "Fuse the model again with example_inputs that give it."
        )


def guard_tensors(graph_module: fx.GraphModule) -> None:
    """Have the graph check the arguments, and the items of mappings, that it was traced with as tensors.

    Code goes another way where one is None, and a convolution takes an image without a batch as well.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        name = _name_of_input(node)
        if name is None or any(user.target is require_tensor for user in node.users):
            continue
        ndim = _ndim_for_convolution(graph_module, node)
        if ndim is not None or isinstance(node.meta.get("tensor_meta"), TensorMetadata):
            place = graph.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else node
            with graph.inserting_after(place):
                graph.call_function(require_tensor, (node, ndim, name))


def _name_of_input(node: fx.Node) -> str | None:
    """The name of an argument, or the key of an item that the code gets from a mapping; None for others."""
    if node.op == "placeholder":
        return str(node.target)
    item = node.op == "call_method" and node.target in ("get", "pop") and len(node.args) > 1
    return str(node.args[1]) if item else None


def _ndim_for_convolution(graph_module: fx.GraphModule, node: fx.Node) -> int | None:
    """The number of dimensions, with a batch where it is not known, of the input of a convolution."""
    called = [user for user in node.users if user.op == "call_module" and user.args[:1] == (node,)]
    modules = [graph_module.get_submodule(str(user.target)) for user in called]
    conv = next((module for module in modules if isinstance(module, _ConvNd)), None)
    if conv is None:
        return None
    meta = node.meta.get("tensor_meta")
    return len(meta.shape) if meta is not None else len(conv.kernel_size) + 2


def fixed_arguments(model: nn.Module, example_inputs: ExampleInputs | None) -> dict[str, Any]:
    """The values to fix of arguments that steer a forward, by the names of their placeholders.

    They are None, bools, strings and empty ``*args`` and ``**kwargs``, of the example inputs or by default.
    """
    given = {} if example_inputs is None else arguments_by_name(model, example_inputs)
    fixed: dict[str, Any] = {}
    for name, parameter in signature_of(model).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if not given.get(name):
                stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
                fixed[stars + name] = ()
            continue
        value = given.get(name, parameter.default)
        if value is None or isinstance(value, bool | str):
            fixed[name] = value
    return fixed


def arguments_by_name(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    """The example inputs by the names of the arguments of the forward."""
    args, kwargs = as_call(example_inputs)
    return dict(signature_of(model).bind(*args, **kwargs).arguments)


def signature_of(model: nn.Module) -> inspect.Signature:
    """The signature of the class' forward, without ``self``."""
    return inspect.signature(MethodType(type(model).forward, model))


Mode: TypeAlias = Literal["train", "eval"]


GUARD = "fxexpand_mode"  # the ModeGuard of a graph that holds in one mode


class ModeGuard(nn.Module):
    """Raises unless the graph that calls it is in the mode that it was traced in."""

    _is_impure = True  # fx keeps it, although nothing reads its result
    keeps_mode: ClassVar[bool] = True  # ``evaluating`` does not switch it

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.mode = mode
        self.training = mode == "train"

    def forward(self) -> None:
        """Check the training flag, which follows that of the graph module.

        Raises: UntraceableError.
        """
        if self.training != (self.mode == "train"):
            raise UntraceableError(
                f"this graph was traced in {self.mode} mode and holds in that mode only. "
                "Trace the model again in the other mode."
            )


def mode_of(model: nn.Module) -> Mode | None:
    """The only mode in which a graph of ``trace``, or a model with one in it, holds; None if in both."""
    return next((module.mode for module in model.modules() if isinstance(module, ModeGuard)), None)


def guard(graph_module: fx.GraphModule) -> None:
    """Have the graph raise in the other mode than the present one; unlike a hook, a guard is pickled."""
    graph_module.add_module(GUARD, ModeGuard("train" if graph_module.training else "eval"))
    graph = graph_module.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.call_module(GUARD)
    graph_module.recompile()
