"""Deep copies of models that torch's own deepcopy refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.utils._pytree import tree_leaves

Model = TypeVar("Model", bound=nn.Module)

# Attributes by which the module of an exported program checks its inputs; a rewritten network needs none.
CHECKS = ("shape_env", "range_constraints", "validate_inputs", "train", "eval")


def copied(model: Model, shared: Iterable[Tensor] = ()) -> Model:
    """A deep copy of the model that keeps the ``shared`` tensors instead of copying them."""
    with torch.inference_mode(False):  # a copy must be trainable, whatever the mode of the caller
        return _copied(model, shared)


def _copied(model: Model, shared: Iterable[Tensor]) -> Model:
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for tensor in _uncopyable(model):
        memo.setdefault(
            id(tensor),
            type(tensor)(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else tensor.detach().clone(),
        )
    new = copy.deepcopy(model, memo)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            _complete(module, memo)
    for old, parameter in zip(model.parameters(), new.parameters(), strict=True):
        if not parameter.is_leaf:  # deepcopy makes such parameters of scripted modules
            parameter.detach_().requires_grad_(old.requires_grad)
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
