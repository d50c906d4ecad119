"""Graphs that hold for one mode or one value of an argument: they say so, and raise for any other."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, fx, nn

from fxexpand.errors import FxExpandError
from fxexpand.running.inputs import ExampleInputs, as_call


class UntraceableError(FxExpandError):
    """A model has no single graph; the message says which, why and what to do.

    Attributes:
        reason: why.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


@fx.has_side_effect
def require_argument(value: Any, expected: Any, name: str) -> None:
    """Part of a graph: raise unless the argument has the value that the graph was traced with."""
    if isinstance(value, fx.Proxy):  # a trace of that graph, as where a pickled one is read
        value.tracer.create_proxy("call_function", require_argument, (value, expected, name), {})
        return
    same = not value if name.startswith("*") else not isinstance(value, Tensor) and value == expected
    if not same:
        raise UntraceableError(
            f"argument {name}: this graph was traced with {expected!r} and holds for nothing else. "
            "Trace again with example_inputs that give it."
        )


def fixed_arguments(model: nn.Module, example_inputs: ExampleInputs | None) -> dict[str, Any]:
    """Values for the arguments that steer a forward, by the names of their placeholders."""
    signature = signature_of(model)
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


def signature_of(model: nn.Module) -> inspect.Signature:
    """That of the class' forward, without ``self``."""
    return inspect.signature(MethodType(type(model).forward, model))


Mode: TypeAlias = Literal["train", "eval"]


GUARD = "fxexpand_mode"  # the ModeGuard of a graph that holds in one mode


class ModeGuard(nn.Module):
    """Part of a graph: raises unless the graph is in the mode that it was traced in."""

    _is_impure = True  # what keeps fx from removing it as dead code
    keeps_mode: ClassVar[bool] = True  # for ``evaluating``

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


def mode_of(graph_module: fx.GraphModule) -> Mode | None:
    """The only mode in which a graph made by ``trace`` holds; None where it holds in both."""
    return next((module.mode for module in graph_module.modules() if isinstance(module, ModeGuard)), None)


def guard(graph_module: fx.GraphModule) -> None:
    """Have the graph raise in any mode but the present one; unlike a hook, this is pickled with it."""
    graph_module.add_module(GUARD, ModeGuard("train" if graph_module.training else "eval"))
    graph = graph_module.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.call_module(GUARD)
    graph_module.recompile()
