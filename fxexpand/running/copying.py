"""Deep copies of models: also where torch's deepcopy refuses them, and with functions that call the copy."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.utils._pytree import tree_leaves

from fxexpand.errors import FxExpandError

Model = TypeVar("Model", bound=nn.Module)

# Attributes by which the module of an exported program checks its inputs; a rewritten network needs none.
CHECKS = ("shape_env", "range_constraints", "validate_inputs", "train", "eval")


def copied(model: Model, shared: Iterable[Tensor] = ()) -> Model:
    """A deep copy of the model that keeps the ``shared`` tensors instead of copying them.

    Functions whose closure or defaults hold modules or tensors of the model hold those of the copy there.
    Objects that cannot be copied (locks, files, random generators) are in both models.

    Raises: FxExpandError: a module has a ``__deepcopy__`` that fails.
    """
    with torch.inference_mode(False):  # a copy must be trainable, whatever the mode of the caller
        return _copied(model, shared)


def _copied(model: Model, shared: Iterable[Tensor]) -> Model:
    kept: list[Any] = list(shared)
    try:
        new, memo = _attempt(model, kept)
    except Exception:  # of whatever the model holds
        kept += _never_copied(vars(model), {id(each) for each in kept})
        try:
            new, memo = _attempt(model, kept)
        except Exception as error:
            raise FxExpandError(
                f"{type(model).__name__}: cannot be copied: {error}. Change the model itself by inplace=True."
            ) from error
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            _complete(module, memo)
    _rebind(memo)
    for old, parameter in zip(model.parameters(), new.parameters(), strict=True):
        if not parameter.is_leaf:  # deepcopy makes such parameters of scripted modules
            parameter.detach_().requires_grad_(old.requires_grad)
    return new


def _attempt(model: Model, kept: Iterable[Any]) -> tuple[Model, dict[int, Any]]:
    """A deep copy that holds the ``kept`` objects themselves, and the copies by the ids of the originals."""
    memo: dict[int, Any] = {id(each): each for each in kept}
    for tensor in _uncopyable(model):
        memo.setdefault(
            id(tensor),
            type(tensor)(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else tensor.detach().clone(),
        )
    return copy.deepcopy(model, memo), memo


def _never_copied(value: Any, seen: set[int]) -> Iterator[Any]:
    """The innermost objects in a value that deepcopy refuses."""
    if id(value) in seen or isinstance(value, Tensor | str | bytes | int | float | type | FunctionType):
        return
    seen.add(id(value))
    if isinstance(value, dict | list | tuple | set):
        parts = value.values() if isinstance(value, dict) else value
    else:
        parts = getattr(value, "__dict__", {}).values()
    found = [each for part in list(parts) for each in _never_copied(part, seen)]
    yield from found
    if not found and not isinstance(value, dict | list | tuple | set | nn.Module):
        try:
            copy.deepcopy(value)
        except Exception:  # of any class
            yield value


def _rebind(memo: dict[int, Any]) -> None:
    """Let the functions that copied objects hold, which deepcopy does not copy, reach the copies."""
    originals, done = memo.pop(id(memo), None), dict(memo)  # the first keeps the ids in use
    for copied_to in list(memo.values()):
        if memo.get(id(copied_to)) is copied_to:  # it is shared
            continue
        holder = copied_to if isinstance(copied_to, dict | list) else getattr(copied_to, "__dict__", {})
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if isinstance(value, FunctionType | partial):
                holder[key] = _rebound(value, done)
    del originals


def _rebound(value: Any, done: dict[int, Any]) -> Any:
    """The value with the copies in place of the originals; itself where it holds none of them."""
    if id(value) not in done:
        done[id(value)] = value  # while it is looked into: it may hold itself
        parts, made = _taken_apart(value)
        new = [_rebound(part, done) for part in parts]
        if not all(map(operator.is_, parts, new)):
            done[id(value)] = made(new)
    return done[id(value)]


def _taken_apart(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The parts of a function, a method or a container, and the way to make one of other parts."""
    if isinstance(value, MethodType):
        return [value.__self__], lambda parts: MethodType(value.__func__, parts[0])
    if type(value) in (list, tuple):
        return list(value), type(value)
    if type(value) is dict:
        return list(value.values()), lambda parts: dict(zip(value, parts, strict=True))
    if isinstance(value, partial):
        held = [value.func, value.args, value.keywords]
        return held, lambda parts: type(value)(parts[0], *parts[1], **parts[2])
    if isinstance(value, FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != CellType()]  # without those still empty
        held = [value.__defaults__, value.__kwdefaults__, *(cell.cell_contents for cell in cells)]
        return held, partial(_function_with, value, cells)
    return [], lambda parts: value


def _function_with(function: FunctionType, cells: list[CellType], parts: list[Any]) -> FunctionType:
    defaults, keyword_defaults, *contents = parts
    filled = dict(zip(map(id, cells), map(CellType, contents), strict=True))
    closure = tuple(filled.get(id(cell), cell) for cell in function.__closure__ or ())
    new = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    new.__kwdefaults__ = keyword_defaults
    new.__dict__.update(vars(function))
    for cell in filled.values():
        if cell.cell_contents is function:  # it calls itself
            cell.cell_contents = new
    return new


def keep_attributes(graph_module: fx.GraphModule, old: nn.Module) -> None:
    """Give a graph module the plain attributes of the module that it replaces: other code may read them.

    They are also put where torch's deepcopy of a graph module looks for attributes, as it drops all others.
    """
    kept = {
        name: value
        for name, value in vars(old).items()
        if name not in vars(graph_module) and not name.startswith("_")
    }
    vars(graph_module).update(kept)
    settable = {name: value for name, value in kept.items() if not hasattr(fx.GraphModule, name)}
    if settable:
        graph_module.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = settable


def _complete(old: fx.GraphModule, memo: dict[int, Any]) -> None:
    """Give the copy of a graph module the plain attributes and hooks that torch's own deepcopy drops.

    The checks of an exported program are not copied, nor its ``train`` and ``eval``, which raise.
    """
    copied_to = memo.get(id(old))
    if copied_to is None:  # a module around it has its own deepcopy, without the memo
        return
    new = vars(copied_to)
    for name, value in vars(old).items():
        hooks = name.startswith(("_forward_", "_backward_", "_is_full_backward_"))
        if hooks or (name not in (*new, *CHECKS) and not hasattr(type(old), name)):
            new[name] = copy.deepcopy(value, memo)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        for key, hook in list(new[name].items()):
            if getattr(hook, "__module__", "") == "torch.export._unlift":
                del new[name][key]


def _uncopyable(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that deepcopy refuses: those of legacy hooks and recurrent layers, and sparse parameters."""
    for module in model.modules():
        for value in vars(module).values():
            for item in tree_leaves(value):
                if isinstance(item, Tensor) and (not item.is_leaf or item.layout != torch.strided):
                    yield item
