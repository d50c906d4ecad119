"""Effective weights: tensors that factors compute, and into which one can write.

A product of factors is a temporary tensor, so a write into it would be lost. The tensor that ``weight`` of a
rewritten layer returns, and each view of it, therefore hands a write on to its owner, as an assignment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxexpand.errors import FxExpandError
from fxexpand.layers.sharding import is_sharded


@dataclass(frozen=True, eq=False)
class Owner:
    """The owner of an effective weight.

    Attributes:
        value: the whole weight; all views have its memory.
        assign: called with the new value after a write.
        train: called with a flag by ``requires_grad_``.
    """

    value: Tensor
    assign: Callable[[Tensor], None]
    train: Callable[[bool], Any]


class EffectiveWeight(Tensor):
    """A value that factors compute, or a view of it; a write into it becomes an assignment to its owner.

    Any function runs on the tensor as it is, with its autograd graph; a version that changed shows a write.
    Results are plain tensors, except those that share memory with the weight. ``numpy()`` returns a read-only
    array, as a write into it could not be seen. A copy (``clone``, ``deepcopy``, pickling, ``nn.Parameter``)
    is plain and independent of the owner.
    """

    _owner: Owner
    _whole: bool  # the tensor that ``weight`` returned, not a view of it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():
                return _compiled(func, args, kwargs)
            if func in COPIES:
                return func(args[0].as_subclass(Tensor), *args[1:], **kwargs)
            if func in ATTRIBUTES and args[0]._whole:
                return ATTRIBUTES[func](args[0], *args[1:], **kwargs)
            given = list(_effective((*args, *kwargs.values())))
            versions = [weight._version for weight in given]
            result = func(*args, **kwargs)
            written = [w._owner for w, before in zip(given, versions, strict=True) if w._version != before]
            for owner in dict.fromkeys(written):
                _assign(owner, owner.value)
            return _views(given, result)

    @property
    def _is_param(self) -> bool:
        """``nn.Parameter(weight)`` sets it on a detached alias, which becomes an ordinary parameter."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        del self._owner, self._whole
        self.__class__ = nn.Parameter  # type: ignore[assignment]


def effective_weight(
    value: Tensor, assign: Callable[[Tensor], None], train: Callable[[bool], Any]
) -> EffectiveWeight:
    """``value`` as a tensor whose writes reach ``assign``, in the same autograd graph."""
    if value.is_inference():  # has no version
        with torch.inference_mode(False):
            value = value.clone()
    return _wrapped(value, Owner(value, assign, train), whole=True)


def fuse_first(name: str, status: str, fuses: bool = True) -> AttributeError:
    """The error for tools that replace a weight by one that they compute, as pruning and weight_norm do."""
    fuse = 'Fuse the layer first, fxexpand.fuse(model, scope="expanded"), or use' if fuses else "Use"
    return AttributeError(f"{name}: {status}, and stays. {fuse} the tool on its factors.")


def replaced_by_tool(name: str, computed: Iterable[str]) -> str | None:
    """The weight whose original prune (``weight_orig``) or weight_norm would keep under ``name``."""
    return next((weight for weight in computed for part in ORIGINALS if name == weight + part), None)


def require_unpacked(value: object, status: str) -> None:
    """Raises: AttributeError: a tensor made of others, such as torchao's, whose values cannot be factored."""
    if is_traceable_wrapper_subclass(value) and not is_sharded(value):
        raise fuse_first("weight", status)


def is_computed(value: object) -> bool:
    """Whether a value is a product, sharded or not; a parameter is written as it is."""
    return (type(value) is Tensor or is_sharded(value)) and not isinstance(value, nn.Parameter)


def read_in_forward() -> bool:
    """Whether the code that reads an attribute is a ``forward``, or is being compiled: it takes the product.

    Called by the getter of the attribute. A forward only reads, and torch's own choose faster kernels for
    plain tensors.
    """
    return torch.compiler.is_compiling() or sys._getframe(2).f_code.co_name == "forward"


def _wrapped(value: Tensor, owner: Owner, *, whole: bool = False) -> EffectiveWeight:
    if is_sharded(value):
        weight: EffectiveWeight = value.view_as(value)  # type: ignore[assignment]
        weight.__class__ = _sharded_class()
    else:
        weight = value.as_subclass(EffectiveWeight)
    weight._owner, weight._whole = owner, whole
    return weight


@cache
def _sharded_class() -> type[EffectiveWeight]:
    from torch.distributed.tensor import DTensor

    return type("ShardedEffectiveWeight", (EffectiveWeight, DTensor), {"__slots__": ()})


def _memory(value: Any) -> int | None:
    local = getattr(value, "_local_tensor", value)
    return local.untyped_storage()._cdata if torch._C._has_storage(local) else None


def _effective(values: Iterable[Any]) -> Iterable[EffectiveWeight]:
    for value in values:
        if isinstance(value, EffectiveWeight):
            yield value
        elif isinstance(value, list | tuple):
            yield from _effective(value)


def _views(given: list[EffectiveWeight], result: Any) -> Any:
    """The result of a function; tensors that have the memory of a weight become views of it."""
    if type(result) in (list, tuple):
        return type(result)(_views(given, each) for each in result)
    if is_computed(result):
        for weight in given:
            if _memory(result) is not None and _memory(weight) == _memory(result):
                return _wrapped(result, weight._owner)
    elif type(result).__name__ == "ndarray":
        result.flags.writeable = False
    return result


def _compiled(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs ``func`` while torch.compile traces, where no version tells whether it writes."""
    result = func(*args, **kwargs)
    if "out" in kwargs or result is args[0] or (result is None and len(args) > 1):
        raise FxExpandError("A weight that factors compute is written here. Write outside torch.compile.")
    return result


def _assign(owner: Owner, written: Tensor) -> None:
    with torch.no_grad():
        value: Any = written.detach()
        owner.assign(value.full_tensor() if is_sharded(value) else value.as_subclass(Tensor))


def _set_data(weight: EffectiveWeight, value: Tensor) -> None:
    if getattr(value, "_owner", None) is not weight._owner:  # ``weight.data += x`` has written already
        _assign(weight._owner, value)


def _require_grad(weight: EffectiveWeight, requires_grad: bool = True) -> EffectiveWeight:
    weight._owner.train(requires_grad)
    return weight


def _grad(weight: EffectiveWeight) -> Tensor | None:
    if weight._owner.value.is_leaf:  # inside ``accumulate``, or frozen
        return weight._owner.value.grad
    return weight.grad if weight.retains_grad else None  # torch would warn


def _set_grad(weight: EffectiveWeight, value: Tensor | None) -> None:
    if value is not None:
        raise FxExpandError(
            "weight.grad: the weight is computed from factors, which an optimizer steps. "
            "Set the gradients of the factors, or call loss.backward()."
        )


ORIGINALS = ("_orig", "_g", "_v")
COPIES: set[Any] = {Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.__repr__}
_attributes: Any = Tensor
ATTRIBUTES: dict[Any, Callable[..., Any]] = {
    _attributes.data.__set__: _set_data,
    _attributes.requires_grad.__set__: _require_grad,
    _attributes.requires_grad_: _require_grad,
    _attributes.grad.__get__: _grad,
    _attributes.grad.__set__: _set_grad,
}
