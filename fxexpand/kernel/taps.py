"""Laws on the weights of kernels: ``(out, in/groups, *k)`` as another layout, another grouping, more taps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxexpand.kernel.alignment import Placement
from fxexpand.kernel.geometry import Composition

CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def exchanged(weight: Tensor, groups: int) -> Tensor:
    """(g a, b, *k) as (g b, a, *k): from torch's layout of a transposed weight to a kernel's, and back."""
    if groups == 1:
        return weight.transpose(0, 1)
    size = weight.shape[2:]
    blocks = weight.reshape(groups, -1, weight.shape[1], *size).transpose(1, 2)
    return blocks.reshape(-1, blocks.shape[2], *size)


def regrouped(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """(out, in/groups, *k) as (out, in/fewer, *k): old blocks on the diagonals of new ones, else zeros."""
    if groups == fewer:
        return weight
    out, columns, *size = weight.shape
    blocks = weight.reshape(fewer, groups // fewer, out // groups, columns, *size).movedim(1, -1)
    return torch.diag_embed(blocks, dim1=1, dim2=3).reshape(out, -1, *size)


def flipped(weight: Tensor) -> Tensor:
    """The taps in reverse order, in every spatial dimension."""
    dims = [dim for dim in range(2, weight.ndim) if weight.shape[dim] > 1]
    return weight.flip(dims) if dims else weight


def embedded(weight: Tensor, place: Placement, size: tuple[int, ...]) -> Tensor:
    """The taps at their places among ``size`` taps, zeros elsewhere."""
    if place.flip:
        weight = flipped(weight)
    if tuple(weight.shape[2:]) == size:
        return weight
    for dim, spacing in enumerate(place.spacing, start=2):
        taps = weight.shape[dim]
        if spacing > 1 and taps > 1:
            gaps = [0, 0] * (weight.ndim - dim - 1) + [0, spacing - 1]
            weight = F.pad(weight.unsqueeze(dim + 1), gaps).flatten(dim, dim + 1)
            weight = weight.narrow(dim, 0, (taps - 1) * spacing + 1)
    sides: list[int] = []
    for offset, taps, total in zip(place.offset, weight.shape[2:], size, strict=True):
        sides = [offset, total - taps - offset, *sides]
    return F.pad(weight, sides)


def product(last: Tensor, last_groups: int, first: Tensor, first_groups: int, plan: Composition) -> Tensor:
    """``w[spacing b + inner_spacing a] += last[b] first[a]``, channels multiplied as matrices, per group.

    last (out, hid/g2, *k2), first (hid, in/g1, *k1), where one of g1, g2 divides the other. No zeros are
    filled in: each group of the finer grouping meets its own rows or columns of the coarser one.
    """
    size, last_size, first_size = plan.result.kernel_size, last.shape[2:], first.shape[2:]
    out, (hidden, columns) = last.shape[0], first.shape[:2]
    groups, rows = max(last_groups, first_groups), out // last_groups
    parts = groups // last_groups  # groups of the finer grouping per group of the outer kernel
    if all(k == 1 for k in last_size):  # (g, rows, hid/g) @ (g, hid/g, in/g1 k1)
        channels_last = _is_channels_last(first)
        source = first.movedim(1, -1) if channels_last else first
        shape = source.shape[1:]
        if groups == 1:
            product = last.reshape(out, hidden) @ source.reshape(hidden, -1)
        else:
            factor = last.reshape(last_groups, rows, parts, hidden // groups).transpose(1, 2)
            source = source.reshape(groups, hidden // groups, -1)
            product = factor.reshape(groups, rows, hidden // groups) @ source
        product = product.reshape(last_groups, parts, rows, *shape).transpose(1, 2)
        product = product.movedim(-1, 3) if channels_last else product
        return product.reshape(out, -1, *size)
    if all(k == 1 for k in first_size):  # (g, rows k2, hid/g) @ (g, hid/g, in/g1)
        channels_last = _is_channels_last(last)
        taps = last.reshape(last_groups, rows, parts, hidden // groups, *last_size)
        taps = taps.transpose(1, 2).movedim(3, -1).reshape(groups, -1, hidden // groups)
        product = taps @ first.reshape(groups, hidden // groups, columns)
        product = product.reshape(last_groups, parts, rows, *last_size, columns).transpose(1, 2)
        product = product.movedim(-1, 3).reshape(out, -1, *size)
        return product if channels_last else product.contiguous()
    # The outer taps are images, which a transposed convolution spreads by the inner taps.
    images = last.reshape(last_groups, rows, -1, *last_size).transpose(0, 1).reshape(rows, hidden, *last_size)
    spread = CONV_TRANSPOSE[len(size)]
    product = spread(images, first, None, plan.spacing, 0, 0, groups, plan.inner_spacing)
    return product.reshape(rows, last_groups, -1, *size).transpose(0, 1).reshape(out, -1, *size)


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.movedim(1, -1).is_contiguous()
