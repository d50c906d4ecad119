"""Layers of other libraries that are affine in whole or in part: frozen norms, norm+act, weights by hooks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxexpand.errors import InexactError

# The norm+act modules of timm, with the BatchNorm that each starts with.
_NORM_ACT: dict[str, type[nn.Module]] = {
    "BatchNormAct2d": nn.BatchNorm2d,
    "FrozenBatchNormAct2d": nn.BatchNorm2d,
    "SyncBatchNormAct": nn.SyncBatchNorm,
}


def frozen_norm(module: nn.Module) -> bool:
    """Whether it is torchvision's FrozenBatchNorm2d, a BatchNorm by buffers alone in both modes."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("torchvision.ops.misc", "FrozenBatchNorm2d")


def norm_and_rest(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The two parts of a norm+act module of timm: BatchNorm, then drop and activation; None for any other."""
    kind = type(module)
    stock = _NORM_ACT.get(kind.__name__)
    if stock is None or kind.__module__ != "timm.layers.norm_act":
        return None
    norm: nn.Module = stock.__new__(stock)
    inside = {name: part for name, part in module._modules.items() if name in ("drop", "act")}
    norm.__dict__.update(module.__dict__)
    norm.__dict__.update(_modules={})
    if kind.__name__.startswith("Frozen"):  # by buffers alone, in both modes
        norm.__dict__.update(training=False, momentum=0.1, affine=True, track_running_stats=True)
        norm.__dict__["num_features"] = int(norm.__dict__["_buffers"]["running_mean"].numel())
    if set(inside) != set(module._modules):
        return None
    rest = [part for part in inside.values() if part is not None and type(part) is not nn.Identity]
    if not rest:
        return norm, nn.Identity()
    following = rest[0] if len(rest) == 1 else nn.Sequential(*rest)
    return norm, following.train(module.training)


def is_layer_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm or RMSNorm of torch, or timm's LayerNorm, which computes the same."""
    kind = type(module)
    timm = (kind.__module__, kind.__name__) == ("timm.layers.norm", "LayerNorm")
    return (kind in (nn.LayerNorm, nn.RMSNorm) or timm) and "forward" not in vars(module)


def weight_by_hooks(module: nn.Module) -> list[Any]:
    """The hooks of weight_norm, spectral_norm and prune, which compute a weight before each call.

    Empty where the module has other hooks too.
    """
    held = vars(module)
    others = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = list(held["_forward_pre_hooks"].values())
    known = all(isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod) for hook in hooks)
    return [] if not known or "forward" in held or any(held.get(name) for name in others) else hooks


def without_hooks(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The module with the weights of its ``weight_by_hooks`` as plain tensors; in ``dtype`` if given.

    Raises: InexactError: every call in training mode computes another weight.
    """
    plain = copy.copy(module)
    vars(plain).update(_forward_pre_hooks=OrderedDict(), _modules={})
    for kind in ("_parameters", "_buffers"):
        tensors = vars(module)[kind].items()
        vars(plain)[kind] = {name: None if tensor is None else tensor.detach() for name, tensor in tensors}
    if dtype is not None:
        plain.to(dtype)
    for hook in weight_by_hooks(module):
        if isinstance(hook, SpectralNorm) and module.training:
            raise InexactError("its spectral norm is estimated anew in training mode. Call eval() first.")
        with torch.no_grad():
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                weight = hook.apply_mask(plain)  # type: ignore[no-untyped-call]
            elif isinstance(hook, SpectralNorm):
                name, weight = hook.name, hook.compute_weight(plain, do_power_iteration=False)
            else:
                name, weight = hook.name, hook.compute_weight(plain)
        vars(plain).pop(name, None)
        vars(plain)["_parameters"][name] = weight
    return plain
