"""The affine maps of modules whose kernel is read from the module: layers, norms and blocks of recipes."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from fxexpand.errors import InexactError
from fxexpand.kernel import algebra as laws
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.library_layers import frozen_norm, weight_by_hooks, without_hooks
from fxexpand.kernel.modules import LAYERS, kernel_of, stock_layer
from fxexpand.layers.expanded import Expanded
from fxexpand.passes.affine.maps import Map, Place
from fxexpand.passes.operators.arithmetic import DROPOUTS
from fxexpand.recipes import Branches, Scale, Skip, fold
from fxexpand.recipes.fixed import Fixed
from fxexpand.recipes.structure import LastDimBatchNorm
from fxexpand.running.evaluation import evaluating
from fxexpand.tracing.tracer import FAILURES

DROP_PATHS = ("DropPath", "StochasticDepth")
BLOCKS = (Skip, Branches, Scale, Fixed)


def passes_on(module: nn.Module) -> bool:
    """Whether a module returns what it gets: Identity, and dropout of any kind while it drops nothing."""
    kind = type(module)
    forward = getattr(kind, "forward", None)  # the class of scripted modules has none
    if forward is nn.Identity.forward or (kind in DROPOUTS and vars(module)["p"] == 0.0):
        return True
    drops = kind in DROPOUTS or (kind.__name__ in DROP_PATHS and _returns_input(module))
    return drops and not module.training


def _returns_input(module: nn.Module) -> bool:
    """Whether a drop path of any library does so in evaluation mode: as first published it scales instead."""
    probe = torch.arange(1.0, 7.0).reshape(2, 3)
    try:
        with evaluating(module):
            return torch.equal(module.forward(probe), probe)
    except FAILURES:
        return False


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a Linear or a convolution, be it parametrised or expanded."""
    kind = type(module)
    parametrised = parametrize.is_parametrized(module) and kind.__bases__[0] in LAYERS
    return kind in LAYERS or parametrised or isinstance(module, Expanded)


def computes_weight(module: nn.Module) -> bool:
    """Whether a layer computes its weight at every call."""
    return type(module) not in LAYERS or bool(weight_by_hooks(module))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of some kind."""
    return isinstance(module, _BatchNorm) or frozen_norm(module)


def module_map(module: nn.Module, rank: int | None) -> Map:
    """The map of a layer, a norm or a block.

    Args:
        rank: spatial dimensions, where the type does not settle it.

    Raises: InexactError: it has none, and why.
    """
    kernel = partial(_kernel, module, rank)
    shape = kernel(torch.device("meta"))

    def leaf(place: Place) -> Kernel:
        return shape if place.device.type == "meta" else laws.cast(kernel(place.device), torch.float64)

    return Map(shape.rank, shape.in_channels, shape.out_channels, leaf)


def _kernel(module: nn.Module, rank: int | None, device: torch.device) -> Kernel:
    """The kernel in float64, or on the meta device."""
    if isinstance(module, (*BLOCKS, Expanded)):
        return _of_block(module, device)
    if isinstance(module, LastDimBatchNorm):
        module = module.stock()
    if parametrize.is_parametrized(module):
        module = _constant_layer(module, device)
    if weight_by_hooks(module):
        module = without_hooks(module, None if device.type == "meta" else torch.float64)
    return _wide(kernel_of(module, rank=rank, dtype=None if device.type == "meta" else torch.float64), device)


def _wide(kernel: Kernel, device: torch.device) -> Kernel:
    bias = None if kernel.bias is None else kernel.bias.detach().to(device, torch.float64)
    return replace(kernel, weight=kernel.weight.detach().to(device, torch.float64), bias=bias)


def _of_block(module: nn.Module, device: torch.device) -> Kernel:
    """The fold of a recipe's block; an expanded layer adds its own bias."""
    block = module.expansion if isinstance(module, Expanded) else module
    with torch.no_grad():
        kernel = fold(copy.deepcopy(block).to(device, torch.float64))
    own: Tensor | None = module._parameters.get("bias") if isinstance(module, Expanded) else None
    if own is None:
        return kernel
    own = own.detach().to(device, torch.float64)
    return replace(kernel, bias=own if kernel.bias is None else kernel.bias + own)


def _constant_layer(module: nn.Module, device: torch.device) -> nn.Module:
    """A stock layer with the weights that the parametrisation gives in evaluation mode."""
    if module.training:
        raise InexactError("its weight is computed anew in training mode. Call eval() first.")
    base: Any = type(module).__bases__[0]
    source: Any = module if device.type == "meta" else copy.deepcopy(module).double()
    with torch.no_grad():
        values = {name: getattr(source, name) for name in ("weight", "bias")}
    held = {name: None if value is None else nn.Parameter(value.detach()) for name, value in values.items()}
    return stock_layer(base, module, **held)
