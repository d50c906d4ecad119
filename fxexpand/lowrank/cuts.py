"""Cuts of a kernel in two: the matrix that is factored, and the kernels of its two factors.

A cut gives the taps of the first axes of a weight ``(out, in/g, *k)`` to the first factor, and those of the
other axes to the second. Per group the matrix is ``(out/g K2, in/g K1)``, with K1 and K2 taps in the two
factors; a factorisation of rank r is a kernel ``in -> g r`` of size k1 and one ``g r -> out`` of size k2. The
cut is exact for every stride, dilation, padding and padding mode: the first factor has no bias, so its output
for zeros is zero, as in the zero padding of the second; other paddings copy whole rows.

Source: Xu et al., TRP (arXiv 2004.14566), channel-wise and spatial-wise; Jaderberg et al. (arXiv 1405.3866).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.geometry import Geometry

Scheme: TypeAlias = Literal["channel", "spatial"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


@dataclass(frozen=True)
class Cut:
    """A scheme and a rank (per group).

    ``"channel"``: all taps in the first factor, the second is pointwise; for a Linear the only cut.
    ``"spatial"``: the taps of the first axis in the first factor, those of the others in the second.
    """

    scheme: Scheme
    rank: int


@dataclass(frozen=True)
class Extent:
    """The number of positions of a layer in one forward pass, over the batch and over all its calls.

    Attributes:
        outputs: positions of the result.
        between: positions between the factors of a spatial cut: output lengths along the first axis, input
            lengths along the others.
    """

    outputs: float
    between: float


def schemes_of(kernel: Kernel) -> tuple[Scheme, ...]:
    """The schemes that give different cuts of this kernel.

    Raises: InexactError: it is transposed.
    """
    if kernel.transposed:
        raise InexactError("a transposed convolution has no such cut here")
    return SCHEMES if kernel.rank > 1 and prod(kernel.kernel_size[1:]) > 1 else SCHEMES[:1]


def matrix_of(kernel: Kernel, scheme: Scheme) -> Tensor:
    """The matrix to factor, ``(g, out/g K2, in/g K1)``: a rearrangement of the weight."""
    first = _first_axes(kernel, scheme)
    weight = kernel.weight.reshape(kernel.groups, -1, *kernel.weight.shape[1:])
    axes = range(3, 3 + kernel.rank)
    order = (0, 1, *axes[first:], 2, *axes[:first])
    rows = kernel.out_channels // kernel.groups * prod(kernel.kernel_size[first:])
    return weight.permute(order).reshape(kernel.groups, rows, -1)


def weight_of(kernel: Kernel, scheme: Scheme, matrix: Tensor) -> Tensor:
    """The inverse of ``matrix_of``: a weight in the shape of the kernel's."""
    first, size = _first_axes(kernel, scheme), kernel.kernel_size
    groups, (out, columns) = kernel.groups, kernel.weight.shape[:2]
    blocks = matrix.reshape(groups, out // groups, *size[first:], columns, *size[:first])
    second = len(size) - first
    order = (0, 1, 2 + second, *range(3 + second, 3 + len(size)), *range(2, 2 + second))
    return blocks.permute(order).reshape(kernel.weight.shape)


def factors_of(kernel: Kernel, scheme: Scheme, left: Tensor, right: Tensor) -> tuple[Kernel, Kernel]:
    """The two kernels whose product is ``left @ right`` in place of the matrix.

    Args:
        left: ``(g, out/g K2, r)``.
        right: ``(g, r, in/g K1)``.
    """
    at, rank, size = _first_axes(kernel, scheme), left.shape[-1], kernel.kernel_size
    groups, (out, columns), spatial = kernel.groups, kernel.weight.shape[:2], kernel.rank
    ones, zeros = (1,) * spatial, ((0, 0),) * spatial
    one = right.reshape(groups * rank, columns, *size[:at], *ones[at:])
    rows = left.reshape(groups, out // groups, *size[at:], rank).movedim(-1, 2)
    two = rows.reshape(out, rank, *ones[:at], *size[at:])
    first = replace(
        kernel,
        weight=one,
        bias=None,
        stride=(*kernel.stride[:at], *ones[at:]),
        padding=(*kernel.padding[:at], *zeros[at:]),
        dilation=(*kernel.dilation[:at], *ones[at:]),
    )
    second = replace(
        kernel,
        weight=two,
        stride=(*ones[:at], *kernel.stride[at:]),
        padding=(*zeros[:at], *kernel.padding[at:]),
        dilation=(*ones[:at], *kernel.dilation[at:]),
    )
    return first, second


def parameters_of(geometry: Geometry, cut: Cut) -> int:
    """Elements of both factors."""
    one, two = _per_rank(geometry, cut.scheme)
    return cut.rank * (one + two)


def macs_of(geometry: Geometry, cut: Cut, extent: Extent) -> float:
    """Multiply-adds of both factors."""
    one, two = _per_rank(geometry, cut.scheme)
    between = extent.between if cut.scheme == "spatial" else extent.outputs
    return cut.rank * (one * between + two * extent.outputs)


def unit_extent(geometry: Geometry) -> Extent:
    """One position of the result, for sizes that are not known."""
    return Extent(1.0, float(prod(geometry.stride[1:])))


def _per_rank(geometry: Geometry, scheme: Scheme) -> tuple[int, int]:
    """Elements of the first and of the second factor for rank 1."""
    spatial = len(geometry.kernel_size)
    at = spatial if scheme == "channel" else 1
    first, second = prod(geometry.kernel_size[:at]), prod(geometry.kernel_size[at:])
    return geometry.in_channels * first, geometry.out_channels * second


def _first_axes(kernel: Kernel, scheme: Scheme) -> int:
    """The number of axes with their taps in the first factor."""
    return kernel.rank if scheme == "channel" else 1
