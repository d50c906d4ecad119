"""The geometry of affine maps: which positions a kernel reads, and when two kernels are one kernel.

Everything here is integers. A plain kernel with taps a, stride s, dilation d and padding p (before) computes

    y[n] = Σ_a w[a] x[s n + d a − p] + b

and a transposed one, whose padding counts the rows cropped from its full output, adds ``w[a] x[n]`` to

    y[s n + d a − p]        (and b everywhere),

per spatial dimension; all spatial dimensions are independent of each other. The functions answer with a plan
for the weights, or with the reason (a string) why no single kernel computes the same for every input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, prod
from typing import TypeAlias

import torch

Padding: TypeAlias = tuple[tuple[int, int], ...]
Tree: TypeAlias = "int | tuple[Tree, Tree]"

AFTER_BIAS = "zero padding follows a bias. Put the bias on the last factor."
AFTER_TAPS = (
    "the outer kernel pads with zeros an intermediate result that the inner kernel would not compute as "
    "zero. Put all padding on the first factor."
)


@dataclass(frozen=True)
class Geometry:
    """All of a kernel but its numbers; see :class:`fxexpand.kernel.Kernel` for the fields."""

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
        """Whether a plain kernel reads anything but its input, so that its padding mode matters."""
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
    """How the taps of two kernels make those of one.

    On the lattice of the result's taps, outer tap b and inner tap a meet at ``spacing b + inner_spacing a``.
    """

    result: Geometry
    flip_outer: bool
    flip_inner: bool
    spacing: tuple[int, ...]
    inner_spacing: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Where the taps of one kernel lie on the lattice of the common one: tap a at ``offset + spacing a``."""

    flip: bool
    offset: tuple[int, ...]
    spacing: tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """The common geometry of several kernels (channels as the first one's), and where each lies in it."""

    result: Geometry
    placements: tuple[Placement, ...]


def composition(outer: Geometry, inner: Geometry) -> Composition | str:
    """The geometry of ``outer`` after ``inner``, or the reason why it is not that of one kernel.

    The laws are those of :func:`fxexpand.kernel.compose`. Answers are remembered: training asks every step.
    """
    if torch.compiler.is_compiling():  # dynamo follows plain Python, but warns at a cache
        return _composition(outer, inner)
    return _remembered_composition(outer, inner)


def _composition(outer: Geometry, inner: Geometry) -> Composition | str:
    if outer.rank != inner.rank:
        return _rank_reason(outer, inner)
    if outer.in_channels != inner.out_channels:
        return (
            f"the inner kernel gives {inner.out_channels} channels, the outer one takes {outer.in_channels}."
        )
    flip_outer = flip_inner = False
    if outer.transposed != inner.transposed:
        plain, other = (inner, outer) if outer.transposed else (outer, inner)
        # The transposed form is preferred: a ConvTranspose and its pointwise factors stay a ConvTranspose.
        turn_plain = plain.turnable
        if not turn_plain and not other.turnable:
            return (
                "one kernel is transposed with a stride, the other plain with a stride or a padding mode: in "
                "general no single kernel does both. Put the stride on the transposed kernel."
            )
        flip_outer = turn_plain != outer.transposed
        flip_inner = not flip_outer
        outer, inner = (outer.turned(), inner) if flip_outer else (outer, inner.turned())
    reason = _transposed_reason(outer, inner) if outer.transposed else _plain_reason(outer, inner)
    if reason is not None:
        return reason

    size, dilation, padding, spacing, inner_spacing = [], [], [], [], []
    for i in range(outer.rank):
        k1, k2, d1, d2 = inner.kernel_size[i], outer.kernel_size[i], inner.dilation[i], outer.dilation[i]
        if outer.transposed:
            scale = outer.stride[i]
            step1, step2, p, q = scale * d1, d2, inner.padding[i], outer.padding[i]
        else:
            scale = inner.stride[i]
            step1, step2, p, q = d1, scale * d2, outer.padding[i], inner.padding[i]
        step = step1 if k2 == 1 else step2 if k1 == 1 else gcd(step1, step2)
        spacing.append(step2 // step if k2 > 1 else 1)
        inner_spacing.append(step1 // step if k1 > 1 else 1)
        size.append(spacing[-1] * (k2 - 1) + inner_spacing[-1] * (k1 - 1) + 1)
        dilation.append(step)
        padding.append((q[0] + scale * p[0], q[1] + scale * p[1]))
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
    return Composition(result, flip_outer, flip_inner, tuple(spacing), tuple(inner_spacing))


_remembered_composition = lru_cache(maxsize=4096)(_composition)


def _plain_reason(outer: Geometry, inner: Geometry) -> str | None:
    """Why the outer kernel may not read past the ends of the inner one's output; None where it may.

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
    """Why two transposed kernels are not one; None where they are.

    The merged kernel sees the rows that the inner one crops. The nearest to the border, v rows out, reaches
    ``d2 (k2 − 1) − s2 v − p2``, which must be negative too: both sides alike. A bias stays constant iff each
    output sums all taps.
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
    """How near outside the border a tap ``s n + d a − padding`` comes (n ≥ 0); 0 where none is outside."""
    stride, dilation = geometry.stride[dim], geometry.dilation[dim]
    outside = [dilation * tap - padding for tap in range(geometry.kernel_size[dim])]
    return min([stride - at % stride for at in outside if at < 0] or [0])


def association(geometries: tuple[Geometry, ...]) -> Tree | str:
    """The association of a chain (first applied first) with the fewest multiply-adds, or why there is none.

    A tree of indices: ``((0, 1), 2)`` composes 1 after 0 first. Matrix-chain ordering (Cormen et al.,
    Introduction to Algorithms, section 15.2), kernel sizes counted, over the associations that are exact.
    """
    if torch.compiler.is_compiling():
        return _association(geometries)
    return _remembered_association(geometries)


def _association(geometries: tuple[Geometry, ...]) -> Tree | str:
    count = len(geometries)
    best: dict[tuple[int, int], tuple[int, Geometry, Tree]] = {
        (i, i + 1): (0, geometry, i) for i, geometry in enumerate(geometries)
    }
    for width in range(2, count + 1):
        for start in range(count - width + 1):
            stop = start + width
            for split in range(start + 1, stop):
                if (start, split) not in best or (split, stop) not in best:
                    continue
                inner_cost, inner, inner_tree = best[start, split]
                outer_cost, outer, outer_tree = best[split, stop]
                step = composition(outer, inner)
                if isinstance(step, str):
                    continue
                cost = inner_cost + outer_cost + composition_macs(outer, inner)
                if (start, stop) not in best or cost < best[start, stop][0]:
                    best[start, stop] = (cost, step.result, (inner_tree, outer_tree))
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
    """The multiply-adds it takes to compose the weights of two kernels."""
    shared = gcd(outer.groups, inner.groups)
    regrouped = 1 if shared in (outer.groups, inner.groups) else inner.groups // shared
    return outer.macs * inner.macs * regrouped // max(inner.out_channels, 1)


def output_padding(geometry: Geometry) -> tuple[int, ...] | None:
    """The ``output_padding`` with which torch's transposed convolution crops as asked; None if it cannot."""
    sides = zip(geometry.padding, geometry.stride, geometry.dilation, strict=True)
    if any(p < 0 or not 0 <= p - q < max(s, d) for (p, q), s, d in sides):
        return None
    return tuple(p - q for p, q in geometry.padding)


def alignment(geometries: Sequence[Geometry]) -> Alignment | str:
    """One geometry that holds several kernels of the same source and output positions, or why there is none.

    Tap a of a kernel lies at ``d a − p``, plain or transposed; the common taps are the smallest regular
    lattice that holds all. The output lengths agree for every input iff stride and padding − span do.
    """
    first = geometries[0]
    for other in geometries[1:]:
        if other.rank != first.rank:
            return _rank_reason(first, other)
        if other.in_channels != first.in_channels:
            return f"the kernels take {first.in_channels} and {other.in_channels} channels."
        if other.stride != first.stride:
            return f"the kernels differ in stride: {first.stride} and {other.stride}."
    turned = [False] * len(geometries)
    if len({g.transposed for g in geometries}) == 2:
        transposed = all(g.transposed or g.turnable for g in geometries)
        if not transposed and not all(g.turnable for g in geometries if g.transposed):
            return "one kernel is transposed, one plain, and a stride or a padding mode keeps them apart."
        turned = [g.transposed != transposed for g in geometries]
    shapes = [g.turned() if turn else g for g, turn in zip(geometries, turned, strict=True)]
    modes = sorted({g.mode for g in shapes if g.mode is not None})
    if len(modes) > 1:
        return f"the kernels pad in different modes: {' and '.join(modes)}."
    size, padding, dilation = [], [], []
    offsets: list[list[int]] = [[] for _ in shapes]
    spacings: list[list[int]] = [[] for _ in shapes]
    for i in range(first.rank):
        lengths = {sum(g.padding[i]) - g.span[i] for g in shapes}
        if len(lengths) > 1:
            return "the kernels give outputs of different lengths: padding − dilation (size − 1) differs."
        before = max(g.padding[i][0] for g in shapes)
        steps = [g.dilation[i] for g in shapes if g.kernel_size[i] > 1]
        # All of one tap at one place: any dilation is right, and the first one's is kept.
        step = gcd(*steps, *(before - g.padding[i][0] for g in shapes)) or shapes[0].dilation[i]
        span = max(before - g.padding[i][0] + g.span[i] for g in shapes)
        for g, offset, spacing in zip(shapes, offsets, spacings, strict=True):
            offset.append((before - g.padding[i][0]) // step)
            spacing.append(g.dilation[i] // step if g.kernel_size[i] > 1 else 1)
        size.append(span // step + 1)
        dilation.append(step)
        padding.append((before, lengths.pop() + span - before))
    result = replace(
        shapes[0],
        kernel_size=tuple(size),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=gcd(*(g.groups for g in shapes)),
        padding_mode=modes[0] if modes else "zeros",
        bias=any(g.bias for g in shapes),
    )
    placed = zip(turned, offsets, spacings, strict=True)
    return Alignment(result, tuple(Placement(t, tuple(o), tuple(s)) for t, o, s in placed))


def _rank_reason(one: Geometry, two: Geometry) -> str:
    if 0 in (one.rank, two.rank):
        return (
            "a Linear mixes the last dimension, a convolution the channel dimension: "
            "they are one kernel only where the model says that these are the same."
        )
    return f"kernels of {one.rank} and {two.rank} spatial dimensions do not mix."
