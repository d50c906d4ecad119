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
    lattices = []
    for i in range(first.rank):
        lattice = _lattice(turned, i)
        if lattice is None:
            return "the kernels give outputs of different lengths: padding − dilation (size − 1) differs."
        lattices.append(lattice)
    return _aligned(turned, flips, lattices, modes[0] if modes else "zeros")


def _mismatch(one: Geometry, two: Geometry) -> str:
    """The reason why two kernels have no common source or output positions; "" where they may have."""
    if two.rank != one.rank:
        return rank_reason(one, two)
    if two.in_channels != one.in_channels:
        return f"the kernels take {one.in_channels} and {two.in_channels} channels."
    if two.stride != one.stride:
        return f"the kernels differ in stride: {one.stride} and {two.stride}."
    return ""


@dataclass(frozen=True)
class _Lattice:
    """Common taps along one dimension, with the offset and the spacing of each kernel's own taps."""

    size: int
    step: int
    padding: tuple[int, int]
    offsets: tuple[int, ...]
    spacings: tuple[int, ...]


def _lattice(geometries: Sequence[Geometry], dim: int) -> _Lattice | None:
    """The smallest regular lattice with the taps ``d a − p`` of every kernel; None where lengths differ.

    With span d (k − 1), padding p before and p' after, and maxima over the kernels::

        P       = max p
        step    = gcd of all P − p, and of d where k > 1
        offset  = (P − p) / step
        spacing = d / step
        size    = S / step + 1,    S = max(P − p + span)
        after   = (p + p' − span) + S − P
    """
    lengths = {sum(g.padding[dim]) - g.span[dim] for g in geometries}
    if len(lengths) > 1:
        return None
    before = max(g.padding[dim][0] for g in geometries)
    shifts = [before - g.padding[dim][0] for g in geometries]
    dilations = [g.dilation[dim] for g in geometries if g.kernel_size[dim] > 1]
    # If all kernels have one tap at one place, any step is right, and the first kernel's dilation is kept.
    step = gcd(*dilations, *shifts) or geometries[0].dilation[dim]
    span = max(shift + g.span[dim] for shift, g in zip(shifts, geometries, strict=True))
    return _Lattice(
        span // step + 1,
        step,
        (before, lengths.pop() + span - before),
        tuple(shift // step for shift in shifts),
        tuple(g.dilation[dim] // step if g.kernel_size[dim] > 1 else 1 for g in geometries),
    )


def _aligned(
    turned: Sequence[Geometry], flips: Sequence[bool], lattices: Sequence[_Lattice], mode: str
) -> Alignment:
    """The common geometry, with one lattice per dimension."""
    result = replace(
        turned[0],
        kernel_size=tuple(lattice.size for lattice in lattices),
        padding=tuple(lattice.padding for lattice in lattices),
        dilation=tuple(lattice.step for lattice in lattices),
        groups=gcd(*(g.groups for g in turned)),
        padding_mode=mode,
        bias=any(g.bias for g in turned),
    )
    placements = []
    for k, flip in enumerate(flips):
        offset, spacing = [each.offsets[k] for each in lattices], [each.spacings[k] for each in lattices]
        placements.append(Placement(flip, tuple(offset), tuple(spacing)))
    return Alignment(result, tuple(placements))
