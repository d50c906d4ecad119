"""Sizes of dimensions as numbers times unknown sizes, and what operators do to shapes made of them.

``x.flatten(2)`` of (B, C, H, W) is (B, C, H·W), and ``.view(B, C, H, W)`` of that is the shape before. An
unknown size is a symbol of its own; only equal symbols are taken to be equal, never equal numbers that an
example had.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx


@dataclass(frozen=True)
class Size:
    """A number times unknown sizes, each (node, dimension)."""

    number: int = 1
    unknown: tuple[tuple[str, int], ...] = ()

    def __mul__(self, other: Size) -> Size:
        return Size(self.number * other.number, tuple(sorted((*self.unknown, *other.unknown))))

    def at(self, known: Mapping[tuple[str, int], int]) -> int | None:
        """The number, for known sizes; None where one is missing."""
        values = [known[atom] for atom in self.unknown if atom in known]
        return self.number * math.prod(values) if len(values) == len(self.unknown) else None

    def over(self, other: Size) -> Size | None:
        """The quotient; None where it may not be whole."""
        mine, theirs = Counter(self.unknown), Counter(other.unknown)
        if theirs - mine or not other.number or self.number % other.number:
            return None
        return Size(self.number // other.number, tuple(sorted((mine - theirs).elements())))


Shape: TypeAlias = tuple[Size, ...]
ONE = Size()


def product(shape: Sequence[Size]) -> Size:
    """How many numbers a tensor of this shape holds."""
    return math.prod(shape, start=ONE)


def broadcast(one: Shape, two: Shape) -> Shape:
    """The shape of a sum of two tensors: dimensions are counted from the last, a 1 gives way."""
    long, short = sorted((one, two), key=len, reverse=True)
    padded = (*[ONE] * (len(long) - len(short)), *short)
    return tuple(b if a == ONE else a for a, b in zip(long, padded, strict=True))


def flattened(before: Shape, start: int, end: int) -> Shape:
    """The dimensions from ``start`` to ``end`` as one."""
    start, end = start % len(before), end % len(before)
    return (*before[:start], product(before[start : end + 1]), *before[end + 1 :])


def reduced(before: Shape, dims: Sequence[int], keepdim: bool) -> Shape:
    """The shape of a sum over ``dims``."""
    gone = {dim % len(before) for dim in dims}
    if keepdim:
        return tuple(ONE if i in gone else size for i, size in enumerate(before))
    return tuple(size for i, size in enumerate(before) if i not in gone)


def sliced(size: Size, part: slice) -> Size | None:
    """The length of a slice of a dimension; None where it depends on unknown sizes."""
    ends = part.start, part.stop, part.step
    if part == slice(None):
        return size
    if any(isinstance(end, fx.Node) for end in ends):
        return None
    if not size.unknown:
        return Size(len(range(size.number)[part]))
    return ONE if ends[2] in (None, 1) and ends[:2] in ((None, 1), (0, 1), (-1, None)) else None


def dim_after_reshape(before: Shape, after: Shape, dim: int) -> int | None:
    """Where a reshape, which keeps the order of the numbers, puts a dimension; None where it breaks it."""
    ahead = product(before[:dim])
    for at, size in enumerate(after):
        if size == before[dim] and size != ONE and product(after[:at]) == ahead:
            return at
    return None


def one_per_dimension(value: Any, rank: int) -> tuple[int, ...] | None:
    """An argument that is one integer for all dimensions or one for each; None for anything else."""
    if isinstance(value, int):
        return (value,) * rank
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, int) for v in value):
        values = tuple(value)
        return values * rank if len(values) == 1 else values if len(values) == rank else None
    return None


def listed(dims: Any) -> list[int] | None:
    """Dimensions, given as one integer or several; None for anything else."""
    found = [dims] if isinstance(dims, int) else dims
    integers = isinstance(found, list | tuple) and all(isinstance(dim, int) for dim in found)
    return list(found) if integers else None
