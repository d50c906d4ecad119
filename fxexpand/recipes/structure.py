"""The structure of a block, which is parts in sequence, skips and parallel branches, and its fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fxexpand.kernel.algebra import Kernel, add, compose_all, identity, scale
from fxexpand.kernel.alignment import alignment
from fxexpand.kernel.geometry import Association, Geometry, association, composition, composition_macs
from fxexpand.kernel.modules import kernel_of, stock_layer
from fxexpand.recipes.fixed import Fixed, Pad


class Skip(nn.Sequential):
    """``x + f(x)`` where ``f`` is the modules in sequence: a linear residual, which folds."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *size)`` to the same shape."""
        result: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return result


class Branches(nn.ModuleList):
    """``f(x) + g(x) + ...``: the sum of the outputs of the modules for one input, the main one first."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *size)`` to the common shape of the outputs of all branches."""
        first, *others = self
        total: Tensor = first(x)
        for branch in others:
            total = total + branch(x)
        return total


class Scale(nn.Module):
    """``s x`` with one learnable value ``s`` per channel.

    Args:
        weight: the initial values, ``(channels,)``.
        rank: number of spatial dimensions after the channels.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *size)`` to the same shape."""
        return x * self.weight.reshape(-1, *(1,) * self.rank)

    def kernel(self, values: Tensor) -> Kernel:
        """The diagonal kernel of ``values``."""
        return Kernel(values.reshape(-1, 1, *(1,) * self.rank), groups=values.shape[0])

    def extra_repr(self) -> str:
        """The number of channels."""
        return str(self.weight.shape[0])


class LastDimBatchNorm(nn.BatchNorm1d):
    """BatchNorm of the last dimension, the channels of a Linear; the statistics are over all others."""

    def forward(self, x: Tensor) -> Tensor:
        """``(*, channels)`` to the same shape."""
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def stock(self) -> nn.Module:
        """A stock module with the same tensors, which ``kernel_of`` reads."""
        return stock_layer(nn.BatchNorm1d, self, **self._parameters)


def fold(module: nn.Module, factors: Sequence[Tensor] | None = None) -> Kernel:
    """The kernel of the map that ``module`` computes, differentiable with respect to its factors.

    Args:
        module: Linear and convolutions, BatchNorm in evaluation mode, Scale, Fixed, and nn.Sequential, Skip
            and Branches of these.
        factors: weights ``(out, in/groups, *k)`` and values of Scales to use in place of those of the
            modules, in the order of the parameters.

    Raises: InexactError: a BatchNorm is in training mode, or another module is no affine map.
    """
    given = None if factors is None else iter(factors)
    like = next(module.parameters(), torch.empty(0)) if factors is None else factors[0]

    def leaf(part: nn.Module) -> Kernel:
        if isinstance(part, Fixed):
            return part.kernel(like)
        if isinstance(part, Scale):
            return part.kernel(part.weight if given is None else next(given))
        if isinstance(part, LastDimBatchNorm):
            return kernel_of(part.stock(), rank=0)
        kernel = kernel_of(part)
        return kernel if given is None else replace(kernel, weight=next(given))

    return _fold(module, leaf)


def has_norm(module: nn.Module) -> bool:
    """Whether the module contains a BatchNorm."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def leaves(module: nn.Module) -> list[nn.Module]:
    """The layers that ``kernel_of`` reads, in the order of their calls, without Scale and Fixed."""
    # Tuples of types, and lists: the compiler of torch 2.9 knows neither unions nor generators.
    if isinstance(module, (nn.Sequential, Branches)):
        return [leaf for part in module for leaf in leaves(part)]
    return [] if isinstance(module, (Scale, Fixed)) else [module]


def telling_weight(module: nn.Module) -> Tensor:
    """The first weight with a definite memory format, which all weights share, else the first weight."""
    parts: list[Any] = leaves(module)
    weights: list[Tensor] = [leaf.weight for leaf in parts]  # no Parameters under torch.func
    return next((weight for weight in weights if weight.shape[1:].numel() > 1), weights[0])


def fold_cost(module: nn.Module) -> int:
    """Multiply-adds of one ``fold`` in its order of compositions; BatchNorm, scales and sums do not count."""
    return _cost_and_shape(module)[0]


def chain_macs(module: nn.Module) -> int:
    """Multiply-adds per output position with the parts run on activations, Fixed parts included.

    Parts before a stride run at that many more positions. BatchNorm, scales and sums do not count.
    """
    return _work_and_stride(module)[0]


def _work_and_stride(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Sequential):
        work, stride = 0, 1
        for part in reversed(module):
            own, step = _work_and_stride(part)
            work, stride = work + stride * own, stride * step
        return work, stride
    if isinstance(module, Branches):
        pairs = [_work_and_stride(branch) for branch in module]
        return sum(work for work, _ in pairs), pairs[0][1]
    if isinstance(module, Pad) or not isinstance(module, Fixed | nn.Linear | _ConvNd):
        return 0, 1
    geometry = module.geometry if isinstance(module, Fixed) else kernel_of(module).geometry
    return geometry.macs, 1 if geometry.transposed else math.prod(geometry.stride)


def _cost_and_shape(module: nn.Module) -> tuple[int, Geometry | None]:
    """The cost of a fold and its geometry; None for one value per channel, or where nothing folds."""
    if isinstance(module, Fixed):
        return 0, module.geometry
    if isinstance(module, nn.Linear | _ConvNd):
        return 0, kernel_of(module).geometry
    if not isinstance(module, nn.Sequential | Branches):
        return 0, None
    parts = [_cost_and_shape(part) for part in module]
    inner = sum(cost for cost, _ in parts)
    shapes = tuple(shape for _, shape in parts if shape is not None)
    if not shapes:
        return inner, None
    if isinstance(module, Branches):
        common = alignment(shapes)
        return inner, None if isinstance(common, str) else common.result
    order = association(shapes)
    if isinstance(order, str):
        return 0, None
    outer, shape = _cost(order, shapes)
    return inner + outer, shape


def _cost(order: Association, geometries: Sequence[Geometry]) -> tuple[int, Geometry]:
    if isinstance(order, int):
        return 0, geometries[order]
    (before, inner), (after, outer) = (_cost(part, geometries) for part in order)
    joined = composition(outer, inner)
    assert not isinstance(joined, str)  # an association holds exact compositions only
    return before + after + composition_macs(outer, inner), joined.result


def _fold(module: nn.Module, leaf: Callable[[nn.Module], Kernel]) -> Kernel:
    if isinstance(module, Branches):
        first, *others = [_fold(branch, leaf) for branch in module]
        for other in others:
            first = add(first, other)
        return first
    if not isinstance(module, nn.Sequential):
        return leaf(module)
    kernels: list[Kernel] = []
    for part in module:
        if isinstance(part, Scale) and kernels:
            # The factor before it, which is smaller than the product.
            kernels[-1] = scale(kernels[-1], leaf(part).weight.flatten())
        else:
            kernels.append(_fold(part, leaf))
    inner = compose_all(kernels)
    if not isinstance(module, Skip):
        return inner
    around = identity(inner.out_channels, inner.rank, like=inner.weight, groups=inner.groups)
    return add(around, inner)
