"""The expansion strategies of S. Guo, J. M. Alvarez, M. Salzmann, "ExpandNets" (arXiv 1811.10495)."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError, SelectionError
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.lower import laid_out_as, to_module
from fxexpand.recipes.chain import LOPSIDED
from fxexpand.recipes.factors import Turn, balanced_factors
from fxexpand.recipes.parts import Draw, match, require_convolution, require_init, require_weight
from fxexpand.recipes.recipe import Init, Recipe

REACH = 5  # number of taps per dimension that the first two 3 x 3 factors cover


@dataclass(frozen=True)
class ExpandNet(Recipe):
    """Layers in a row: first ``rate`` times the input channels, then ``rate`` times the output channels.

    Only the last factor has a bias, so each strategy is free to put the padding on an earlier factor.

    Attributes:
        rate: the expansion rate; the default of 4 is that of the paper.

    Raises: SelectionError: ``rate`` is no positive number.
    """

    rate: float = 4

    def __post_init__(self) -> None:
        if not (isinstance(self.rate, int | float) and 0 < self.rate < math.inf):
            raise SelectionError(
                f"{type(self).__name__}(rate={self.rate!r}): choose a positive number, 1 or more as a rule."
            )

    @abstractmethod
    def factors(self, kernel: Kernel) -> list[Kernel]:
        """The factors, first one first, with weights on the meta device and no bias.

        Raises: InexactError: the strategy has no factors for such a kernel.
        """

    @abstractmethod
    def preserving(
        self, kernel: Kernel, factors: Sequence[Kernel], generator: torch.Generator | None
    ) -> list[Tensor]:
        """Weights in float64 whose product is the kernel's.

        Raises: InexactError: the hidden layers are too narrow.
        """

    def build(
        self, kernel: Kernel, *, init: Init = "preserve", generator: torch.Generator | None = None
    ) -> nn.Sequential:
        """See ``Recipe.build``; "kaiming" is torch's own initialisation, which the released code uses."""
        require_init(init)
        factors = self.factors(kernel)
        draw = Draw(kernel, generator)
        if init == "preserve" and not kernel.weight.is_meta:
            weights = self.preserving(kernel, factors, generator)
        else:
            weights = [draw.kaiming(*factor.weight.shape) for factor in factors]
        factors = [
            replace(factor, weight=laid_out_as(weight.reshape(factor.weight.shape).to(draw.like), draw.like))
            for factor, weight in zip(factors, weights, strict=True)
        ]
        block = nn.Sequential(*(to_module(factor) for factor in factors))
        if init == "matched" and not kernel.weight.is_meta:
            match(block, kernel, list(block.parameters()), degree=len(factors))
        block.requires_grad_(kernel.weight.requires_grad)
        if kernel.bias is not None:
            bias = kernel.bias.detach().clone()
            block[-1].bias = nn.Parameter(bias, requires_grad=kernel.bias.requires_grad)
        return block

    def hidden(self, kernel: Kernel) -> tuple[int, int]:
        """Numbers of channels after the first factor and after the second, multiples of the groups."""
        groups, channels = kernel.groups, (kernel.in_channels, kernel.out_channels)
        first, second = (groups * math.ceil(self.rate * count / groups) for count in channels)
        return first, second


@dataclass(frozen=True)
class ExpandNetCL(ExpandNet):
    """1 x 1, k x k, 1 x 1; all three factors have the kernel's groups, also for depthwise kernels.

    Padding, stride and dilation are on the middle factor. (The paper pads the first factor: the same map at
    more work.) ``init="preserve"`` is ``W = Q_2^T (Q_2 W Q_1^T) Q_1`` with Q of random orthonormal columns
    and factors of one norm; it needs ``rate >= 1``.
    """

    def factors(self, kernel: Kernel) -> list[Kernel]:
        require_convolution(kernel, "ExpandNetCL")
        first, second = self.hidden(kernel)
        middle = _weight(kernel, second, first, kernel.kernel_size)
        return [
            _pointwise(kernel, first, kernel.in_channels),
            replace(kernel, weight=middle, bias=None),
            _pointwise(kernel, kernel.out_channels, second),
        ]

    def preserving(
        self, kernel: Kernel, factors: Sequence[Kernel], generator: torch.Generator | None
    ) -> list[Tensor]:
        weight = _blocks(kernel)
        _require_room(kernel, factors, 1, 1)
        here = [(0,) * kernel.rank]
        first = _moves(here, weight.shape[2], factors[0], weight)
        last = _moves(here, weight.shape[1], factors[2], weight)
        return turned([first, weight, last], factors, generator)


@dataclass(frozen=True)
class ExpandNetCK(ExpandNet):
    """(k - 1) / 2 factors of 3 x 3, for odd kernels larger than 3 in some dimension.

    All padding is on the first factor and the stride on the last; dilation is on all. In a dimension of fewer
    taps than another, some factors have one tap.

    ``init="preserve"`` is exact at ``rate=4`` for two-dimensional kernels up to 9 x 9. The first factor
    shifts the input to four corners, and the second has the numbers; together they cover tiles of 5 x 5. The
    other factors shift the tiles to their places. Random orthonormal matrices then mix the hidden channels. A
    kernel of one dimension needs half the rate, one of three dimensions twice the rate.
    """

    def factors(self, kernel: Kernel) -> list[Kernel]:
        require_convolution(kernel, "ExpandNetCK")
        text = "x".join(map(str, kernel.kernel_size))
        if any(k % 2 == 0 for k in kernel.kernel_size):
            raise InexactError(f"3x3 kernels make odd ones, and this one is {text}. Use ExpandNetCL or Chain")
        # Of n taps in a dimension, (n - 1) / 2 factors have three: first the second one, then the first.
        depth = max(kernel.kernel_size) // 2
        if depth < 2:
            raise InexactError(
                f"ExpandNetCK is for kernels larger than 3, and this one is {text}. Use ExpandNetCL"
            )
        first, second = self.hidden(kernel)
        widths = [kernel.in_channels, first, *[second] * (depth - 2), kernel.out_channels]
        factors = []
        for i, (inputs, out) in enumerate(itertools.pairwise(widths)):
            turn = {0: 1, 1: 0}.get(i, i)
            size = tuple(3 if turn < k // 2 else 1 for k in kernel.kernel_size)
            weight = _weight(kernel, out, inputs, size)
            factors.append(Kernel(weight, dilation=kernel.dilation, groups=kernel.groups))
        factors[0] = replace(factors[0], padding=kernel.padding, padding_mode=kernel.padding_mode)
        factors[-1] = replace(factors[-1], stride=kernel.stride)
        return factors

    def preserving(
        self, kernel: Kernel, factors: Sequence[Kernel], generator: torch.Generator | None
    ) -> list[Tensor]:
        weight = _blocks(kernel)
        size = kernel.kernel_size
        corners = list(itertools.product(*((0, 2) if k >= REACH else (0,) for k in size)))
        tiles = list(itertools.product(*(_tiles(k) for k in size)))
        _require_room(kernel, factors, len(corners), len(tiles))
        first = _moves(corners, weight.shape[2], factors[0], weight)
        second = _numbers(weight, corners, tiles, factors[1].kernel_size)
        others = []
        for i in range(2, len(factors)):
            # Each factor shifts by up to two taps towards the place of its tile.
            steps = [tuple(min(2, max(0, to - 2 * (i - 2))) for to in tile) for tile in tiles]
            others.append(_moves(steps, weight.shape[1], factors[i], weight, apart=True))
        if others:  # the last factor sums the tiles
            last = others[-1]
            others[-1] = last.reshape(last.shape[0], -1, len(tiles), *last.shape[2:]).sum(2)
        return turned([first, second, *others], factors, generator)


@dataclass(frozen=True)
class ExpandNetFC(ExpandNet):
    """Three Linear layers in a row, the paper's "FC"; also three 1 x 1 convolutions.

    As in ``Chain``, inputs and outputs count at most ``LOPSIDED`` times the full rank, and the factors of
    ``init="preserve"`` are balanced.
    """

    def hidden(self, kernel: Kernel) -> tuple[int, int]:
        groups = kernel.groups
        sizes = kernel.in_channels // groups, kernel.out_channels // groups
        first, second = (groups * math.ceil(self.rate * min(size, LOPSIDED * min(sizes))) for size in sizes)
        return first, second

    def factors(self, kernel: Kernel) -> list[Kernel]:
        require_weight(kernel)
        if math.prod(kernel.kernel_size) > 1 or kernel.transposed:
            raise InexactError(
                "ExpandNetFC is for Linear layers and kernels of one tap. Use ExpandNetCL or ExpandNetCK"
            )
        first, second = self.hidden(kernel)
        start = _weight(kernel, first, kernel.in_channels, kernel.kernel_size)
        return [
            replace(kernel, weight=start, bias=None),
            _pointwise(kernel, second, first),
            _pointwise(kernel, kernel.out_channels, second),
        ]

    def preserving(
        self, kernel: Kernel, factors: Sequence[Kernel], generator: torch.Generator | None
    ) -> list[Tensor]:
        widths = [factor.out_channels // kernel.groups for factor in factors[:-1]]
        return balanced_factors(_blocks(kernel).flatten(2), widths, len(factors), generator)


def turned(
    blocks: Sequence[Tensor], factors: Sequence[Kernel], generator: torch.Generator | None
) -> list[Tensor]:
    """Factors with the product of ``blocks``, the widths of ``factors``, one norm, and no unused hidden unit.

    ``Q^T Q = 1``, with Q of random orthonormal columns, is inserted between two factors. If one factor is
    zero, the norms stay as they are: the other factors are not zero, so that the zero factor trains.

    Args:
        blocks: ``(groups, out, in, *k)`` or with the taps flattened; ``out`` of one is ``in`` of the next.
    """
    results = [block.flatten(3) for block in blocks]
    for i, factor in enumerate(factors[:-1]):
        inner, outer = results[i], results[i + 1]
        groups, core = inner.shape[:2]
        width = factor.out_channels // groups
        turn = Turn(groups, width, core, inner, generator)
        results[i] = turn.on_rows(inner.flatten(2)).reshape(groups, width, *inner.shape[2:])
        columns = turn.on_columns(outer.transpose(2, 3).flatten(1, 2))
        results[i + 1] = columns.reshape(groups, outer.shape[1], outer.shape[3], width).transpose(2, 3)
    norms = [float(result.norm()) for result in results]
    if min(norms) == 0.0:
        return results
    common = math.prod(norm ** (1.0 / len(norms)) for norm in norms)
    return [result * (common / norm) for result, norm in zip(results, norms, strict=True)]


def _blocks(kernel: Kernel) -> Tensor:
    """The weight in float64, ``(groups, out/groups, in/groups, *k)``."""
    weight = kernel.weight.detach().double()
    return weight.reshape(kernel.groups, -1, *weight.shape[1:])


def _weight(kernel: Kernel, out: int, inputs: int, size: Sequence[int]) -> Tensor:
    """A weight on the meta device, with the kernel's groups."""
    shape = (out, inputs // kernel.groups, *size)
    return torch.empty(shape, dtype=kernel.weight.dtype, device="meta")


def _pointwise(kernel: Kernel, out: int, inputs: int) -> Kernel:
    return Kernel(_weight(kernel, out, inputs, (1,) * kernel.rank), groups=kernel.groups)


def _require_room(kernel: Kernel, factors: Sequence[Kernel], corners: int, tiles: int) -> None:
    """Raises: InexactError: the hidden channels are too few to represent every kernel of this size."""
    needed = max(corners, tiles if len(factors) > 2 else 1)
    have = [factor.out_channels for factor in factors]
    if have[0] < corners * kernel.in_channels or (len(factors) > 2 and have[1] < tiles * kernel.out_channels):
        raise InexactError(
            f"hidden layers of {' and '.join(map(str, have[:-1]))} channels cannot hold every kernel of this "
            f"size, so init='preserve' is impossible. Use rate={needed}, or init='matched'"
        )


def _tiles(taps: int) -> list[int]:
    """The starts of tiles of ``REACH`` taps that cover a dimension of ``taps`` without crossing its ends."""
    rest = max(0, taps - REACH)
    count = math.ceil(taps / REACH) if rest else 1
    return [i * rest // max(1, count - 1) for i in range(count)]


def _moves(
    steps: Sequence[tuple[int, ...]], channels: int, factor: Kernel, like: Tensor, apart: bool = False
) -> Tensor:
    """The weight of a factor that reads one tap per output, ``(groups, channels * steps, in, *k)``.

    Args:
        steps: the tap that each output of a channel reads.
        apart: whether output (c, s) reads input (c, s); else it reads input c.
    """
    count, groups = len(steps), factor.groups
    weight = like.new_zeros(channels * count, channels * count if apart else channels, *factor.kernel_size)
    rows = torch.arange(channels, device=like.device) * count
    for s, tap in enumerate(steps):
        place: Any = (rows + s, rows + s if apart else rows // count, *tap)
        weight[place] = 1.0
    return weight.expand(groups, *weight.shape)


def _numbers(
    weight: Tensor, corners: Sequence[tuple[int, ...]], tiles: Sequence[tuple[int, ...]], taps: Sequence[int]
) -> Tensor:
    """The second factor: the taps at each tile and corner, divided evenly among all that cover them.

    Args:
        weight: ``(groups, out, in, *size)``.
        taps: kernel size of the second factor.

    Returns: ``(groups, out * tiles, in * corners, *taps)``.
    """
    places = [
        tuple(slice(t + c, t + c + k) for t, c, k in zip(tile, corner, taps, strict=True))
        for tile, corner in itertools.product(tiles, corners)
    ]
    reached = weight.new_zeros(weight.shape[3:])
    for place in places:
        reached[place] += 1.0
    shared = weight / reached
    blocks = torch.stack([shared[:, :, :, *place] for place in places], 3)
    groups, out, inner = weight.shape[:3]
    blocks = blocks.reshape(groups, out, inner, len(tiles), len(corners), *taps)
    return blocks.movedim(3, 2).reshape(groups, out * len(tiles), inner * len(corners), *taps)
