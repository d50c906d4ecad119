"""Classes of the values in a trace: the answers to ``isinstance(x, Tensor)`` and ``type(x)`` in a forward."""

from __future__ import annotations

import builtins
import dis
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

ATTRIBUTES: dict[str, type] = {"shape": torch.Size, "ndim": int, "dtype": torch.dtype, "device": torch.device,
                               "data": Tensor, "T": Tensor, "mT": Tensor, "is_cuda": bool}  # fmt: skip
METHODS: dict[str, type] = {"size": torch.Size, "dim": int, "numel": int, "nelement": int, "item": float}
SEVERAL = (nn.RNNBase, nn.MultiheadAttention, nn.LSTMCell)  # layers that return tuples
OWN = ("torch.", "fxexpand.")  # packages whose code sees the proxy


def asking_code(depth: int = 2) -> FrameType | None:
    """The frame of code of a model that asks; None for code of torch or of this package."""
    frame = sys._getframe(depth)
    name = frame.f_globals.get("__name__", "")
    return None if name.startswith(OWN) else frame


def asks_for_class() -> bool:
    """Whether the ``__class__`` of a proxy is read by ``isinstance``, ``x.__class__`` or a class pattern.

    The arguments of torch's functions are checked by the same means in C, which must not take a proxy for a
    tensor.
    """
    frame = asking_code(3)
    return frame is not None and frame.f_lasti in _questions(frame.f_code)


@lru_cache(1000)
def _questions(code: CodeType) -> frozenset[int]:
    """The places in code of the instructions that ask for the class of a value."""
    steps = [(step, step.positions or dis.Positions()) for step in dis.get_instructions(code)]
    known = [(step, (at.lineno, at.col_offset)) for step, at in steps if at.col_offset is not None]
    starts = {start for step, start in known if step.argval == "isinstance"}
    calls = [step for step, start in known if "CALL" in step.opname and start in starts]
    reads = [step for step, _ in steps if step.argval == "__class__" or step.opname == "MATCH_CLASS"]
    return frozenset(step.offset for step in (*calls, *reads))


def deduced_class(node: fx.Node, of_input: Callable[[fx.Node], type | None], root: nn.Module) -> type | None:
    """The class of what a call returns, by the classes of its inputs; None where it is unknown."""
    inputs = [of_input(each) for each in node.all_input_nodes]
    first, target = next(iter(inputs), None), node.target
    if node.op == "call_module":
        module = root.get_submodule(str(target))
        known = type(module).__module__.startswith((*OWN, "timm.layers."))
        return Tensor if known and not isinstance(module, SEVERAL) else None
    if target is getattr:
        return ATTRIBUTES.get(str(node.args[1])) if first is Tensor else None
    if target is operator.getitem:
        number = first is torch.Size and isinstance(node.args[1], int)
        return int if number else first if first in (Tensor, torch.Size) else None
    if node.op == "call_method" and target in METHODS:
        return int if target == "size" and len(node.args) + len(node.kwargs) > 1 else METHODS[str(target)]
    if getattr(target, "__module__", None) in ("_operator", "math"):
        numbers = all(each in (int, float) for each in inputs)
        return _of_numbers(node, of_input) if numbers else Tensor if Tensor in inputs else None
    return _returned(str(target) if node.op == "call_method" else getattr(target, "__name__", ""))


def _of_numbers(node: fx.Node, of_input: Callable[[fx.Node], Any]) -> type:
    """The class of what an operator gives for numbers of these classes."""
    function: Any = node.target
    return type(function(*fx.map_arg(node.args, lambda each: of_input(each)(1))))


def _returned(name: str) -> type | None:
    """The class that all overloads of an operator return, by the schemas of ATen."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return Tensor if name in torch.nn.functional.__dict__ else None
    returned = [getattr(packet, each)._schema.returns for each in packet.overloads()]  # type: ignore[no-untyped-call]
    one = all(len(each) == 1 and str(each[0].type) == "Tensor" for each in returned)
    return Tensor if one else None


class _Types(type):
    """The class of ``TypeOf``."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        kind = builtins.type(*args, **kwargs)
        return args[0].tracer.class_of(args[0]) if issubclass(kind, fx.Proxy) and len(args) == 1 else kind

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.type)


class TypeOf(type, metaclass=_Types):
    """``type``, which gives the class of a proxy's value."""


@contextmanager
def typed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """``TypeOf`` for ``type`` in the code of these modules' classes."""
    names = {kind.__module__ for module in modules for kind in type(module).__mro__}
    spaces = [
        vars(sys.modules[n]) for n in names if n in sys.modules and not n.startswith((*OWN, "builtins"))
    ]
    changed = [space for space in spaces if "type" not in space]
    for space in changed:
        space["type"] = TypeOf
    try:
        yield
    finally:
        for space in changed:
            del space["type"]
