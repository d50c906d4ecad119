"""The geometry of affine maps: the positions that a kernel reads, and when two kernels in a row are one.

Everything here is integers. A plain kernel with taps a, stride s, dilation d and padding p (before) computes

    y[n] = Σ_a w[a] x[s n + d a − p] + b

and a transposed one, whose padding counts the rows cropped from its full output, adds ``w[a] x[n]`` to

    y[s n + d a − p]        (and b everywhere),

per spatial dimension; all spatial dimensions are independent of each other. The functions return a plan for
the weights, or the reason (a string) why no single kernel computes the same for every input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, prod
from typing import TypeAlias

import torch

Padding: TypeAlias = tuple[tuple[int, int], ...]
Association: TypeAlias = "int | tuple[Association, Association]"

AFTER_BIAS = "zero padding follows a bias. Put the bias on the last factor."
AFTER_TAPS = (
    "the outer kernel pads with zeros an intermediate result that the inner kernel would not compute as "
    "zero. Put all padding on the first factor."
)


@dataclass(frozen=True)
class Geometry:
    """A kernel without its numbers; :class:`fxexpand.kernel.Kernel` documents the fields."""

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    padding_mode: str
    bias: bool

    @property
    def rank(self) -> int:
        """The number of spatial dimensions; 0 for a Linear."""
        return len(self.kernel_size)

    @property
    def span(self) -> tuple[int, ...]:
        """The distance d (k − 1) from the first tap to the last."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))

    @property
    def macs(self) -> int:
        """Multiply-adds per output position (per input position when transposed)."""
        return self.out_channels * (self.in_channels // self.groups) * prod(self.kernel_size)

    @property
    def padded(self) -> bool:
        """Whether a plain kernel reads padding, so that its padding mode matters."""
        return not self.transposed and any(before > 0 or after > 0 for before, after in self.padding)

    @property
    def mode(self) -> str | None:
        """The padding mode where it matters, else None."""
        return self.padding_mode if self.padded else None

    @property
    def pointwise(self) -> bool:
        """Every output position depends on the input at the same position only."""
        return (
            all(k == 1 for k in self.kernel_size)
            and all(s == 1 for s in self.stride)
            and all(before == 0 == after for before, after in self.padding)
        )

    @property
    def turnable(self) -> bool:
        """Whether the map can be written plain and transposed: stride 1, no padding but zeros."""
        return all(s == 1 for s in self.stride) and self.mode in (None, "zeros")

    def turned(self) -> Geometry:
        """The same map written transposed if it is plain, plain if it is transposed, for flipped taps.

        With stride 1, ``j = n + d a − p`` (transposed) is ``n = j + d a' − (d (k − 1) − p)``, a' = k − 1 − a.
        """
        padding = tuple((d - b, d - a) for d, (b, a) in zip(self.span, self.padding, strict=True))
        return replace(self, padding=padding, transposed=not self.transposed, padding_mode="zeros")


@dataclass(frozen=True)
class Composition:
    """The geometry of two kernels in a row, and how their taps make those of the result.

    On the lattice of the result's taps, outer tap b and inner tap a meet at ``spacing b + inner_spacing a``.
    A kernel with a true ``flip`` is written in the other form first, with its taps in reverse order.
    """

    result: Geometry
    flip_outer: bool
    flip_inner: bool
    spacing: tuple[int, ...]
    inner_spacing: tuple[int, ...]


def composition(outer: Geometry, inner: Geometry) -> Composition | str:
    """The geometry of ``outer`` after ``inner``, or the reason why it is not that of one kernel.

    :func:`fxexpand.kernel.compose` states the laws. Answers are cached, as training asks at every step.
    """
    if torch.compiler.is_compiling():  # dynamo follows plain Python, but warns at a cache
        return _composition(outer, inner)
    return _remembered_composition(outer, inner)


def _composition(outer: Geometry, inner: Geometry) -> Composition | str:
    if outer.rank != inner.rank:
        return rank_reason(outer, inner)
    if outer.in_channels != inner.out_channels:
        return (
            f"the inner kernel gives {inner.out_channels} channels, the outer one takes {outer.in_channels}."
        )
    transposed = common_form((outer, inner))
    if transposed is None:
        return (
            "one kernel is transposed with a stride, the other plain with a stride or a padding mode: in "
            "general no single kernel does both. Put the stride on the transposed kernel."
        )
    flip_outer, flip_inner = outer.transposed != transposed, inner.transposed != transposed
    outer, inner = (outer.turned() if flip_outer else outer), (inner.turned() if flip_inner else inner)
    reason = _transposed_reason(outer, inner) if transposed else _plain_reason(outer, inner)
    if reason is not None:
        return reason

    result, spacing, inner_spacing = _merged(outer, inner)
    return Composition(result, flip_outer, flip_inner, spacing, inner_spacing)


def _merged(outer: Geometry, inner: Geometry) -> tuple[Geometry, tuple[int, ...], tuple[int, ...]]:
    """The geometry of two kernels of one form in a row, and the spacings of outer and inner taps in it.

    The stride s of one kernel, the inner of two plain ones and the outer of two transposed ones, spaces the
    taps and the padding of the other: its dilation counts s times, and the padding is ``p + s p_other``.
    """
    fine, coarse = (outer, inner) if outer.transposed else (inner, outer)
    size, dilation, padding, spacing, inner_spacing = [], [], [], [], []
    for i, stride in enumerate(fine.stride):
        k1, k2 = inner.kernel_size[i], outer.kernel_size[i]
        step1 = inner.dilation[i] * (stride if outer.transposed else 1)
        step2 = outer.dilation[i] * (1 if outer.transposed else stride)
        step = step1 if k2 == 1 else step2 if k1 == 1 else gcd(step1, step2)
        spacing.append(step2 // step if k2 > 1 else 1)
        inner_spacing.append(step1 // step if k1 > 1 else 1)
        size.append(spacing[-1] * (k2 - 1) + inner_spacing[-1] * (k1 - 1) + 1)
        dilation.append(step)
        p, q = fine.padding[i], coarse.padding[i]
        padding.append((p[0] + stride * q[0], p[1] + stride * q[1]))
    result = Geometry(
        out_channels=outer.out_channels,
        in_channels=inner.in_channels,
        kernel_size=tuple(size),
        stride=tuple(s * t for s, t in zip(outer.stride, inner.stride, strict=True)),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=gcd(outer.groups, inner.groups),
        transposed=outer.transposed,
        padding_mode=outer.mode or inner.mode or "zeros",
        bias=outer.bias or inner.bias,
    )
    return result, tuple(spacing), tuple(inner_spacing)


_remembered_composition = lru_cache(maxsize=4096)(_composition)


def common_form(geometries: Sequence[Geometry]) -> bool | None:
    """Whether to write all kernels transposed (True) or plain (False); None where neither form fits them all.

    The transposed form is preferred: a ConvTranspose and its pointwise factors stay a ConvTranspose.
    """
    forms = {g.transposed for g in geometries}
    if len(forms) == 1:
        return geometries[0].transposed
    for transposed in (True, False):
        if all(g.transposed == transposed or g.turnable for g in geometries):
            return transposed
    return None


def _plain_reason(outer: Geometry, inner: Geometry) -> str | None:
    """The reason why the outer kernel may not read past the ends of the inner one's output; None if it may.

    Zeros there are right where the inner kernel, continued, meets none of its input. Its last tap at position
    −v before the start, the nearest that is read, is at ``d1 (k1 − 1) − s1 v − p1``, which must be negative;
    its first tap one after the end lies past the input, for every input length, iff ``p1' ≥ d1 (k1 − 1)``.
    Other modes repeat the intermediate result, and commute with a kernel of one tap and stride 1.
    """
    mode = outer.mode
    if mode is None:
        return None
    if inner.mode not in (None, mode):
        return f"{mode!r} padding follows {inner.mode!r} padding: one kernel has one padding mode."
    for i, (before, after) in enumerate(outer.padding):
        (start, end), span, stride = inner.padding[i], inner.span[i], inner.stride[i]
        if mode == "zeros":
            if inner.bias and (before > 0 or after > 0):
                return AFTER_BIAS
            nearest = _nearest(outer, i, before)
            if (nearest and span - stride * nearest >= start) or (after > 0 and end < span):
                return AFTER_TAPS
        elif (before > 0 or after > 0) and (span, stride, start, end) != (0, 1, 0, 0):
            return (
                f"{mode!r} padding of an intermediate result commutes only with a kernel of one tap, stride "
                "1 and no padding. Put all padding on the first factor."
            )
    return None


def _transposed_reason(outer: Geometry, inner: Geometry) -> str | None:
    """The reason why two transposed kernels are not one; None where they are.

    The merged kernel sees the rows that the inner one crops. The nearest to the border, v rows out, reaches
    ``d2 (k2 − 1) − s2 v − p2``, which must be negative on both sides. A bias stays constant iff each output
    sums all taps.
    """
    for i, sides in enumerate(inner.padding):
        span, stride = outer.span[i], outer.stride[i]
        for crop, outer_crop in zip(sides, outer.padding[i], strict=True):
            nearest = _nearest(inner, i, crop)
            if nearest and span - stride * nearest >= outer_crop:
                return (
                    "the inner kernel crops rows that a transposed outer kernel would still spread into the "
                    "result. Put all cropping on the last factor."
                )
        if inner.bias and (stride > 1 or min(outer.padding[i]) < span):
            return (
                "a transposed kernel follows a bias, and spreads it unevenly at the borders or between "
                "strides. Put the bias on the last factor."
            )
    return None


def _nearest(geometry: Geometry, dim: int, padding: int) -> int:
    """The least distance outside the border of a tap ``s n + d a − padding`` (n ≥ 0); 0 for none outside."""
    stride, dilation = geometry.stride[dim], geometry.dilation[dim]
    outside = [dilation * tap - padding for tap in range(geometry.kernel_size[dim])]
    return min([stride - at % stride for at in outside if at < 0] or [0])


def association(geometries: tuple[Geometry, ...]) -> Association | str:
    """The association of a chain (first applied first) with the fewest multiply-adds, or why none is exact.

    The result is a nested pair of indices: ``((0, 1), 2)`` composes 1 after 0 first.

    Source: matrix-chain ordering (Cormen et al., Introduction to Algorithms, section 15.2), with kernel sizes
    in the cost, over the associations that are exact.
    """
    if torch.compiler.is_compiling():
        return _association(geometries)
    return _remembered_association(geometries)


def _association(geometries: tuple[Geometry, ...]) -> Association | str:
    count = len(geometries)
    best: dict[tuple[int, int], tuple[int, Geometry, Association]] = {
        (i, i + 1): (0, geometry, i) for i, geometry in enumerate(geometries)
    }
    for width in range(2, count + 1):
        for start in range(count - width + 1):
            stop = start + width
            for split in range(start + 1, stop):
                if (start, split) not in best or (split, stop) not in best:
                    continue
                inner_cost, inner, inner_order = best[start, split]
                outer_cost, outer, outer_order = best[split, stop]
                step = composition(outer, inner)
                if isinstance(step, str):
                    continue
                cost = inner_cost + outer_cost + composition_macs(outer, inner)
                if (start, stop) not in best or cost < best[start, stop][0]:
                    best[start, stop] = (cost, step.result, (inner_order, outer_order))
    if (0, count) in best:
        return best[0, count][2]
    result = geometries[0]
    for geometry in geometries[1:]:
        step = composition(geometry, result)
        if isinstance(step, str):
            return step
        result = step.result
    return "no association of the kernels is exact."


_remembered_association = lru_cache(maxsize=4096)(_association)


def composition_macs(outer: Geometry, inner: Geometry) -> int:
    """Multiply-adds to compose the weights of two kernels."""
    shared = gcd(outer.groups, inner.groups)
    regrouped = 1 if shared in (outer.groups, inner.groups) else inner.groups // shared
    return outer.macs * inner.macs * regrouped // max(inner.out_channels, 1)


def output_padding(geometry: Geometry) -> tuple[int, ...] | None:
    """The ``output_padding`` of torch's transposed convolution that crops these rows; None if none does."""
    sides = zip(geometry.padding, geometry.stride, geometry.dilation, strict=True)
    if any(p < 0 or not 0 <= p - q < max(s, d) for (p, q), s, d in sides):
        return None
    return tuple(p - q for p, q in geometry.padding)


def rank_reason(one: Geometry, two: Geometry) -> str:
    """The reason why kernels of different spatial ranks do not combine."""
    if 0 in (one.rank, two.rank):
        return (
            "a Linear mixes the last dimension, a convolution the channel dimension: "
            "they are one kernel only where the model says that these are the same."
        )
    return f"kernels of {one.rank} and {two.rank} spatial dimensions do not mix."
