"""The kernel: one value for an affine map, and the laws by which kernels combine.

A Linear, a convolution, a transposed convolution, BatchNorm in evaluation mode, a scale and the identity are
all kernels. The laws are pure functions, differentiable in torch and free of data-dependent checks (so that
they run on the meta device and under ``torch.compile``). A law that is not exact for its arguments raises
InexactError with the reason. Shapes: weight (out, in/groups, *k), bias (out,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxexpand.errors import InexactError
from fxexpand.kernel.alignment import alignment
from fxexpand.kernel.geometry import Association, Geometry, Padding, association, composition, output_padding
from fxexpand.kernel.taps import CONV_TRANSPOSE, embedded, exchanged, flipped, product, regrouped

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class Kernel:
    """An affine map on channels-first data. A kernel of rank 0 (a Linear) acts on the last dimension.

    Attributes:
        weight: (out, in/groups, *k), for transposed kernels too.
        bias: (out,), or None.
        stride: one per spatial dimension; () stands for ones.
        padding: (before, after) per spatial dimension, in rows; negative values crop; () stands for zeros. A
            transposed kernel crops these rows from its full output: (padding, padding − output_padding) of
            the module; negative values add rows that hold the bias.
        dilation: one per spatial dimension; () stands for ones.
        groups: number of blocks of channels that do not mix.
        transposed: whether the kernel is a transposed convolution.
        padding_mode: as in ``torch.nn.Conv2d``; a transposed kernel has none.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: Padding = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        rank = self.rank
        for name, value in (("stride", 1), ("padding", (0, 0)), ("dilation", 1)):
            given = getattr(self, name)
            if len(given) == rank:
                continue
            if given:
                raise ValueError(f"Kernel: {name} {given} does not fit {rank} spatial dimensions.")
            object.__setattr__(self, name, (value,) * rank)

    @property
    def rank(self) -> int:
        """The number of spatial dimensions; 0 for a Linear."""
        return self.weight.ndim - 2

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1] * self.groups

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps per spatial dimension."""
        return tuple(self.weight.shape[2:])

    @property
    def pointwise(self) -> bool:
        """Whether it has one tap, stride 1 and no padding, so that each output depends on one position."""
        return self.geometry.pointwise

    @property
    def geometry(self) -> Geometry:
        """The kernel without its numbers."""
        return Geometry(
            out_channels=self.out_channels,
            in_channels=self.in_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            transposed=self.transposed,
            padding_mode=self.padding_mode,
            bias=self.bias is not None,
        )


def compose(outer: Kernel, inner: Kernel) -> Kernel:
    """``outer`` after ``inner`` as one kernel.

    Plain (1 inner, 2 outer, taps a and b): ``y1[n] = Σ_a w1[a] x[s1 n + d1 a − p1] + b1`` and
    ``y2[m] = Σ_b w2[b] y1[s2 m + d2 b − p2] + b2`` give, by substitution::

        taps     w[s1 d2 b + d1 a] += w2[b] w1[a]
        stride   s1 s2,    padding  p1 + s1 p2  (before and after alike),    bias  b2 + Σ_b w2[b] b1

    with equal output lengths for every input (nested floors). Exact iff the outer kernel pads nothing, or its
    padding equals the continued inner kernel: zeros need no b1 and an inner kernel that reads nothing but
    zeros there (one tap, or padded in full); other modes need one tap, stride 1 and no padding.

    Transposed: ``w[d2 b + s2 d1 a] += w2[b] w1[a]``, crop ``p2 + s2 p1``, stride ``s1 s2``. Exact iff the
    inner kernel crops nothing that the outer one spreads into the result, and b1 is None unless each output
    sums all outer taps. A plain kernel of stride 1 is a transposed one with flipped taps: so are mixed pairs.

    Groups: the greatest common divisor of both.

    Raises: InexactError with the reason.
    Source: Guo et al., ExpandNets (arXiv 1811.10495); Ding et al., Diverse Branch Block (arXiv 2103.13425),
    transforms I and III; for borders and strides, the substitution above.
    """
    plan = composition(outer.geometry, inner.geometry)
    if isinstance(plan, str):
        raise InexactError(plan)
    last = flipped(outer.weight) if plan.flip_outer else outer.weight
    first = flipped(inner.weight) if plan.flip_inner else inner.weight
    bias = outer.bias
    if inner.bias is not None:
        taps = last.flatten(2).sum(2) if outer.rank else last
        blocks = taps.reshape(outer.groups, -1, taps.shape[1])
        constant = (blocks @ inner.bias.reshape(outer.groups, -1, 1)).flatten()
        bias = constant if bias is None else bias + constant
    groups = inner.groups
    if plan.result.groups not in (groups, outer.groups):
        first, groups = regrouped(first, groups, plan.result.groups), plan.result.groups
    return filled(plan.result, product(last, outer.groups, first, groups, plan), bias)


def compose_all(kernels: Sequence[Kernel]) -> Kernel:
    """The kernels one after the other, first applied first, in the association with the fewest multiply-adds.

    Raises: InexactError with the reason where no association is exact; ValueError for no kernels.
    """
    if not kernels:
        raise ValueError("compose_all: no kernels, so no channel count. Start from identity().")
    order = association(tuple(kernel.geometry for kernel in kernels))
    if isinstance(order, str):
        raise InexactError(order)
    return _in_order(order, kernels)


def add(a: Kernel, b: Kernel) -> Kernel:
    """The sum of two maps of one source: ``w[t] = a.w[t] + b.w[t]`` with t = d a − p, the position of a tap.

    The taps of both are embedded in the smallest common lattice (a centred 1x1 in a 3x3, a 3x3 of dilation 2
    beside one of dilation 1 in a 5x5); groups become the greatest common divisor; biases add.

    Exact iff stride and output length agree for every input, and no two padding modes meet (a kernel without
    padding goes with any mode).

    Raises: InexactError with the reason.
    Source: Ding et al., RepVGG (arXiv 2101.03697), section 3.3; Diverse Branch Block, transforms II and VI.
    """
    if a.out_channels != b.out_channels:
        raise InexactError(f"the kernels give {a.out_channels} and {b.out_channels} channels.")
    plan = alignment((a.geometry, b.geometry))
    if isinstance(plan, str):
        raise InexactError(plan)
    groups, size = plan.result.groups, plan.result.kernel_size
    one = embedded(regrouped(a.weight, a.groups, groups), plan.placements[0], size)
    two = embedded(regrouped(b.weight, b.groups, groups), plan.placements[1], size)
    bias = a.bias if b.bias is None else b.bias if a.bias is None else a.bias + b.bias
    return filled(plan.result, one + two, bias)


def scale(kernel: Kernel, factor: Tensor | float) -> Kernel:
    """The outputs times ``factor``, a scalar or one value per output channel: ``f w``, ``f b``. Always exact.

    Raises: InexactError for a factor of another shape.
    Source: linearity; LayerScale, Touvron et al. (arXiv 2103.17239), is one.
    """
    rows = factor
    if isinstance(factor, Tensor) and factor.ndim > 0:
        if factor.shape != (kernel.out_channels,):
            raise InexactError(
                f"a factor of shape {tuple(factor.shape)} is not one value for each of "
                f"{kernel.out_channels} output channels."
            )
        rows = factor.reshape(-1, *(1,) * (kernel.rank + 1))
    bias = None if kernel.bias is None else kernel.bias * factor
    return replace(kernel, weight=kernel.weight * rows, bias=bias)


def identity(channels: int, rank: int, *, like: Tensor, groups: int = 1) -> Kernel:
    """The identity: a Dirac weight (channels, channels/groups, 1...) of the dtype and device of ``like``.

    Raises: InexactError where ``groups`` does not divide ``channels``.
    """
    if groups < 1 or channels % groups:
        raise InexactError(f"{channels} channels do not divide into {groups} groups.")
    block = torch.eye(channels // groups, dtype=like.dtype, device=like.device)
    return Kernel(block.repeat(groups, 1).reshape(channels, -1, *(1,) * rank), groups=groups)


def concat(kernels: Sequence[Kernel]) -> Kernel:
    """The outputs of maps of one source, stacked on the channels: weights and biases are stacked.

    Kernels of different sizes are embedded as in :func:`add`, whose condition for exactness holds here too,
    output channels aside; a missing bias counts as zeros. Groups become 1, as every part reads the whole
    source.

    Raises: InexactError with the reason; ValueError for no kernels.
    """
    if not kernels:
        raise ValueError("concat: no kernels.")
    if len(kernels) == 1:
        return kernels[0]
    dense = [regroup(kernel, 1) for kernel in kernels]
    plan = alignment(tuple(kernel.geometry for kernel in dense))
    if isinstance(plan, str):
        raise InexactError(plan)
    placed = zip(dense, plan.placements, strict=True)
    weight = torch.cat([embedded(k.weight, place, plan.result.kernel_size) for k, place in placed])
    bias = None
    if plan.result.bias:
        bias = torch.cat([k.weight.new_zeros(k.out_channels) if k.bias is None else k.bias for k in dense])
    return filled(plan.result, weight, bias)


def split(kernel: Kernel, sizes: Sequence[int]) -> list[Kernel]:
    """The maps to consecutive blocks of output channels: rows of weight and bias. Always exact.

    Groups become 1, as every part reads the whole source.

    Raises: InexactError where the sizes do not add up to the output channels.
    """
    if sum(sizes) != kernel.out_channels or any(size < 0 for size in sizes):
        raise InexactError(f"sizes {tuple(sizes)} do not add up to {kernel.out_channels} output channels.")
    if len(sizes) == 1:
        return [kernel]
    dense = regroup(kernel, 1)
    weights = torch.split(dense.weight, list(sizes))
    biases = [None] * len(sizes) if dense.bias is None else torch.split(dense.bias, list(sizes))
    return [replace(dense, weight=w, bias=b) for w, b in zip(weights, biases, strict=True)]


def regroup(kernel: Kernel, groups: int) -> Kernel:
    """The same map with fewer groups, and zeros filled in. Exact iff ``groups`` divides the kernel's groups.

    Raises: InexactError where it does not.
    """
    if groups < 1 or kernel.groups % groups:
        raise InexactError(f"a kernel of {kernel.groups} groups cannot be written with {groups}.")
    if groups == kernel.groups:
        return kernel
    return replace(kernel, weight=regrouped(kernel.weight, kernel.groups, groups), groups=groups)


def cast(kernel: Kernel, dtype: torch.dtype) -> Kernel:
    """The kernel in another dtype; folds accumulate in float64 and cast once."""
    bias = None if kernel.bias is None else kernel.bias.to(dtype)
    return replace(kernel, weight=kernel.weight.to(dtype), bias=bias)


def macs(kernel: Kernel) -> int:
    """Multiply-adds per output position (per input position when transposed): the elements of the weight."""
    return kernel.weight.numel()


def apply(kernel: Kernel, x: Tensor) -> Tensor:
    """Run the kernel on ``x``: (*, in) for rank 0, else (batch, in, *spatial) or (in, *spatial)."""
    if kernel.rank == 0:
        return F.linear(x, regrouped(kernel.weight, kernel.groups, 1), kernel.bias)
    if kernel.transposed:
        return _apply_transposed(kernel, x)
    before = tuple(side[0] for side in kernel.padding)
    symmetric = all(first == last >= 0 for first, last in kernel.padding)
    if not symmetric or kernel.geometry.mode not in (None, "zeros"):
        x, before = padded(x, kernel.padding, kernel.padding_mode), (0,) * kernel.rank
    convolve = _CONV[kernel.rank]
    return convolve(x, kernel.weight, kernel.bias, kernel.stride, before, kernel.dilation, kernel.groups)


def native_weight(kernel: Kernel) -> Tensor:
    """The weight in torch's layout: (in, out/groups, *k) if transposed, else (out, in/groups, *k)."""
    return exchanged(kernel.weight, kernel.groups) if kernel.transposed else kernel.weight


def _apply_transposed(kernel: Kernel, x: Tensor) -> Tensor:
    convolve, weight = CONV_TRANSPOSE[kernel.rank], native_weight(kernel)
    extra = output_padding(kernel.geometry)
    if extra is not None:
        crop = tuple(side[0] for side in kernel.padding)
        return convolve(x, weight, kernel.bias, kernel.stride, crop, extra, kernel.groups, kernel.dilation)
    full = convolve(x, weight, None, kernel.stride, 0, 0, kernel.groups, kernel.dilation)
    y = padded(full, tuple((-before, -after) for before, after in kernel.padding), "zeros")
    # The bias comes after the crop: rows past the full output hold it too.
    return y if kernel.bias is None else y + kernel.bias.reshape(-1, *(1,) * kernel.rank)


def padded(x: Tensor, padding: Padding, mode: str) -> Tensor:
    """``x`` padded, then cropped: a crop may reach into the padding, and modes copy from the whole input.

    Args:
        padding: (before, after) per spatial dimension; negative values crop.
        mode: as in ``torch.nn.Conv2d``.
    """
    sides = [side for pair in reversed(padding) for side in pair]  # torch counts from the last dimension
    if max(sides) > 0:
        x = F.pad(x, [max(side, 0) for side in sides], mode="constant" if mode == "zeros" else mode)
    return F.pad(x, [min(side, 0) for side in sides]) if min(sides) < 0 else x


def _in_order(order: Association, kernels: Sequence[Kernel]) -> Kernel:
    if isinstance(order, int):
        return kernels[order]
    inner, outer = order
    return compose(_in_order(outer, kernels), _in_order(inner, kernels))


def filled(g: Geometry, weight: Tensor, bias: Tensor | None = None) -> Kernel:
    """The kernel of a geometry with these numbers."""
    return Kernel(weight, bias, g.stride, g.padding, g.dilation, g.groups, g.transposed, g.padding_mode)
