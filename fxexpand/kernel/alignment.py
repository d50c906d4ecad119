"""Alignment: several kernels of one source and of the same output positions on one lattice of taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

from fxexpand.kernel.geometry import Geometry, common_form, rank_reason


@dataclass(frozen=True)
class Placement:
    """The taps of one kernel on the common lattice: tap a lies at ``offset + spacing a``, after the flip."""

    flip: bool
    offset: tuple[int, ...]
    spacing: tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """The common geometry of several kernels (channels as the first one's), and the place of each in it."""

    result: Geometry
    placements: tuple[Placement, ...]


def alignment(geometries: Sequence[Geometry]) -> Alignment | str:
    """One geometry that holds all kernels, or the reason why there is none.

    Exact iff spatial ranks, input channels and strides are equal, all kernels can be written in one form
    (plain or transposed), at most one padding mode matters, and padding − span is equal in every dimension,
    so that output lengths agree for every input. Groups become their greatest common divisor.
    """
    first = geometries[0]
    for other in geometries[1:]:
        if reason := _mismatch(first, other):
            return reason
    transposed = common_form(geometries)
    if transposed is None:
        return "one kernel is transposed, one plain, and a stride or a padding mode keeps them apart."
    flips = [g.transposed != transposed for g in geometries]
    turned = [g.turned() if flip else g for g, flip in zip(geometries, flips, strict=True)]
    modes = sorted({g.mode for g in turned if g.mode is not None})
    if len(modes) > 1:
        return f"the kernels pad in different modes: {' and '.join(modes)}."
    if any(len({sum(g.padding[dim]) - g.span[dim] for g in turned}) > 1 for dim in range(first.rank)):
        return "the kernels give outputs of different lengths: padding − dilation (size − 1) differs."
    return _aligned(turned, flips, modes[0] if modes else "zeros")


def _mismatch(one: Geometry, two: Geometry) -> str:
    """The reason why two kernels have no common source or output positions; "" where they may have."""
    if two.rank != one.rank:
        return rank_reason(one, two)
    if two.in_channels != one.in_channels:
        return f"the kernels take {one.in_channels} and {two.in_channels} channels."
    if two.stride != one.stride:
        return f"the kernels differ in stride: {one.stride} and {two.stride}."
    return ""


def _aligned(turned: Sequence[Geometry], flips: Sequence[bool], mode: str) -> Alignment:
    lattices = [_lattice(turned, dim) for dim in range(turned[0].rank)]
    size, step, padding, offsets, spacings = zip(*lattices, strict=True) if lattices else ((),) * 5
    result = replace(
        turned[0],
        kernel_size=size,
        padding=padding,
        dilation=step,
        groups=gcd(*(g.groups for g in turned)),
        padding_mode=mode,
        bias=any(g.bias for g in turned),
    )
    placements = []
    for k, flip in enumerate(flips):
        offset, spacing = [each[k] for each in offsets], [each[k] for each in spacings]
        placements.append(Placement(flip, tuple(offset), tuple(spacing)))
    return Alignment(result, tuple(placements))


def _lattice(
    geometries: Sequence[Geometry], dim: int
) -> tuple[int, int, tuple[int, int], tuple[int, ...], tuple[int, ...]]:
    """Size, step and padding of the smallest regular lattice with the taps ``d a − p`` of every kernel along
    one dimension, and the offset and the spacing of each kernel's own taps.

    With span d (k − 1), padding p before and p' after, and maxima over the kernels::

        P       = max p
        step    = gcd of all P − p, and of d where k > 1
        offset  = (P − p) / step
        spacing = d / step
        size    = S / step + 1,    S = max(P − p + span)
        after   = (p + p' − span) + S − P
    """
    before = max(g.padding[dim][0] for g in geometries)
    shifts = [before - g.padding[dim][0] for g in geometries]
    dilations = [g.dilation[dim] for g in geometries if g.kernel_size[dim] > 1]
    # If all kernels have one tap at one place, any step is right, and the first kernel's dilation is kept.
    step = gcd(*dilations, *shifts) or geometries[0].dilation[dim]
    span = max(shift + g.span[dim] for shift, g in zip(shifts, geometries, strict=True))
    length = sum(geometries[0].padding[dim]) - geometries[0].span[dim]
    offsets = tuple(shift // step for shift in shifts)
    spacings = tuple(g.dilation[dim] // step if g.kernel_size[dim] > 1 else 1 for g in geometries)
    return span // step + 1, step, (before, length + span - before), offsets, spacings
