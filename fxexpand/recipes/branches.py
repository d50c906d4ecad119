"""Parallel branches: RepVGG, MobileOne, ACNet, DBB and OREPA."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError, SelectionError
from fxexpand.kernel.algebra import Kernel
from fxexpand.recipes import parts
from fxexpand.recipes.fixed import Average, Cosine, Pad
from fxexpand.recipes.recipe import Init, Recipe
from fxexpand.recipes.structure import Branches, Scale, Skip


class MultiBranch(Recipe):
    """A sum of branches, each ending in a BatchNorm or a Scale; the first is the convolution itself.

    ``init="preserve"`` starts the other branches as in the paper, and the first branch is the rest of the
    kernel. ``init="matched"`` starts all branches as in the paper, then scales their last layers. The bias of
    a kernel goes onto the first branch: onto its BatchNorm, or onto its convolution if a Scale follows.
    """

    @property
    def needs_activations(self) -> bool:
        return True

    @abstractmethod
    def branches(self, kernel: Kernel, draw: parts.Draw) -> list[nn.Sequential]:
        """The branches as in the paper, the main one first.

        Raises: InexactError: the recipe has no branches for such a kernel.
        """

    def build(
        self, kernel: Kernel, *, init: Init = "preserve", generator: torch.Generator | None = None
    ) -> nn.Sequential:
        parts.require_init(init)
        parts.require_convolution(kernel, type(self).__name__)
        branches = self.branches(kernel, parts.Draw(kernel, generator))
        block, main = nn.Sequential(Branches(branches)), branches[0]
        with torch.no_grad():
            if not kernel.weight.is_meta and init == "preserve":
                # The kernel less the other branches, over the gain of the BatchNorm or Scale.
                weight, gain = main[0].get_parameter("weight").zero_(), parts.folded_weight(main[-1])
                weight.copy_((kernel.weight.detach().double() - parts.folded_weight(block)) / gain)
            if not kernel.weight.is_meta and init == "matched":
                parts.match(block, kernel, [branch[-1].get_parameter("weight") for branch in branches])
            block.requires_grad_(kernel.weight.requires_grad)
            if kernel.bias is not None:
                value, trains = kernel.bias.detach().clone(), kernel.bias.requires_grad
                if isinstance(main[-1], Scale):
                    main[0].bias = nn.Parameter(value / main[-1].weight, requires_grad=trains)
                else:
                    main[-1].get_parameter("bias").copy_(value).requires_grad_(trains)
        return block


@dataclass(frozen=True)
class RepVGG(MultiBranch):
    """k x k, 1 x 1 and, where channels and size are kept, the identity; each with a BatchNorm.

    The kernel needs odd sizes and more than one tap. Padding, stride, dilation and groups are the kernel's.

    Source: X. Ding et al., "RepVGG" (arXiv 2101.03697), section 3.2.
    """

    def branches(self, kernel: Kernel, draw: parts.Draw) -> list[nn.Sequential]:
        _require_centre(kernel, "RepVGG")
        _require_taps(kernel, "RepVGG", "Use MobileOne")
        return [
            _normed(kernel, parts.conv(kernel, draw.kaiming(*kernel.weight.shape))),
            _normed(kernel, *parts.centred(kernel, _draw_pointwise(kernel, draw))),
            *_identity(kernel),
        ]


@dataclass(frozen=True)
class MobileOne(MultiBranch):
    """``k`` times the convolution, 1 x 1 beside a larger kernel and, where channels and size are kept, the
    identity; each with a BatchNorm.

    The kernel needs odd sizes; the paper uses depthwise k x k and 1 x 1 convolutions.

    Attributes:
        k: number of branches like the convolution; the paper's smallest network has 4, the others 1.

    Raises: SelectionError: ``k`` is no whole number of at least 1.
    Source: P. K. A. Vasu et al., "MobileOne" (arXiv 2206.04040), section 3.2.
    """

    k: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise SelectionError(f"MobileOne(k={self.k!r}): choose a whole number of branches, 1 or more.")

    def branches(self, kernel: Kernel, draw: parts.Draw) -> list[nn.Sequential]:
        _require_centre(kernel, "MobileOne")
        alike = [
            _normed(kernel, parts.conv(kernel, draw.kaiming(*kernel.weight.shape))) for _ in range(self.k)
        ]
        small = []
        if math.prod(kernel.kernel_size) > 1:
            small = [_normed(kernel, *parts.centred(kernel, _draw_pointwise(kernel, draw)))]
        return [*alike, *small, *_identity(kernel)]


@dataclass(frozen=True)
class ACNet(MultiBranch):
    """k x k, k x 1 and 1 x k, each with a BatchNorm: the middle row and column of a kernel are learned twice.

    The kernel needs two spatial dimensions, both odd and larger than 1.

    Source: X. Ding et al., "ACNet" (arXiv 1908.03930), section 3.2.
    """

    def branches(self, kernel: Kernel, draw: parts.Draw) -> list[nn.Sequential]:
        if kernel.rank != 2:
            raise InexactError(
                f"ACNet crosses rows and columns, so it needs two spatial dimensions, not {kernel.rank}"
            )
        _require_centre(kernel, "ACNet")
        rows, columns = kernel.kernel_size
        if min(rows, columns) == 1:
            raise InexactError(
                f"ACNet crosses a row and a column of the kernel, and this one is {rows}x{columns}"
            )
        out, inner = kernel.weight.shape[:2]
        return [
            _normed(kernel, *parts.centred(kernel, draw.kaiming(out, inner, *size)))
            for size in ((rows, columns), (rows, 1), (1, columns))
        ]


@dataclass(frozen=True)
class DBB(MultiBranch):
    """The diverse branch block: k x k, 1 x 1, 1 x 1 then average, 1 x 1 then k x k; BatchNorm after each.

    The kernel needs odd sizes and more than one tap. The first 1 x 1 of the last branch starts as the
    identity. For a depthwise kernel that 1 x 1 doubles the channels, there is no 1 x 1 branch, and no 1 x 1
    before the average. The average of a dilated kernel is over its own taps.

    The two branches with a BatchNorm in the middle are padded before their first layer, so that the BatchNorm
    turns the zeros of the border into its folded bias, and the fold is exact. In training the released code
    takes the statistics without the border; this code includes it.

    Source: X. Ding et al., "Diverse Branch Block" (arXiv 2103.13425), section 3.4.
    """

    def branches(self, kernel: Kernel, draw: parts.Draw) -> list[nn.Sequential]:
        _require_centre(kernel, "DBB")
        _require_taps(kernel, "DBB", "Use MobileOne")
        out, channels, inside = kernel.out_channels, kernel.in_channels, replace(kernel, padding=())
        main = _normed(kernel, parts.conv(kernel, draw.kaiming(*kernel.weight.shape)))
        if kernel.groups == channels == out:
            small, hidden = [], 2 * channels
            average = _normed(kernel, Average(kernel, channels))
            first: nn.Module = parts.pointwise(kernel, _draw_pointwise(kernel, draw, hidden))
        else:
            small = [_normed(kernel, *parts.centred(kernel, _draw_pointwise(kernel, draw)))]
            spread = parts.pointwise(kernel, _draw_pointwise(kernel, draw))
            average = _normed(kernel, *_pad(kernel), *_normed(kernel, spread), Average(inside, out))
            hidden = channels
            first = Skip(_zero_pointwise(kernel, hidden))
        last = parts.conv(inside, draw.kaiming(out, hidden // kernel.groups, *kernel.kernel_size))
        norm = parts.silent_norm(kernel.weight, hidden)
        return [main, *small, average, _normed(kernel, *_pad(kernel), first, norm, last)]


@dataclass(frozen=True)
class OREPA(MultiBranch):
    """The branches of online re-parameterisation, with a learnable scale per channel in place of BatchNorm.

    k x k, 1 x 1 then average, 1 x 1 then fixed cosines, 1 x 1, 1 x 1 then k x k, and depthwise k x k then
    1 x 1 with 8 times the channels. As no branch has a BatchNorm, ``form="auto"`` trains one kernel per step.
    The one BatchNorm of the paper, after the sum, is the BatchNorm of the network.

    The kernel needs odd sizes and more than one tap. The first 1 x 1 of the fifth branch starts as the
    identity, or as two copies of it with more than 4 groups.

    Source: M. Hu et al., "Online Convolutional Re-parameterization" (arXiv 2204.00826); the released code for
    the initial values.
    """

    @property
    def needs_activations(self) -> bool:
        return False

    def branches(self, kernel: Kernel, draw: parts.Draw) -> list[nn.Sequential]:
        _require_centre(kernel, "OREPA")
        _require_taps(kernel, "OREPA", "Use Chain")
        out, inner = kernel.weight.shape[:2]
        size, groups, channels = kernel.kernel_size, kernel.groups, kernel.in_channels
        copies = 1 if groups <= 4 else 2
        identity = _zero_pointwise(kernel, copies * channels)

        def spread() -> nn.Module:
            return parts.pointwise(kernel, _draw_pointwise(kernel, draw, slope=parts.RELU))

        return [
            _scaled(0.25, kernel, parts.conv(kernel, draw.kaiming(*kernel.weight.shape, slope=parts.RELU))),
            _scaled(0.25, kernel, spread(), Average(kernel, out)),
            _scaled(0.0, kernel, spread(), Cosine(kernel, out)),
            _scaled(1.0, kernel, *parts.centred(kernel, _draw_pointwise(kernel, draw, slope=parts.RELU))),
            _scaled(
                0.5,
                kernel,
                Skip(identity) if copies == 1 else Branches([identity, _copies(kernel, copies)]),
                parts.conv(kernel, draw.kaiming(out, copies * inner, *size, slope=parts.RELU)),
            ),
            _scaled(
                0.5,
                kernel,
                parts.depthwise(kernel, draw.kaiming(8 * channels, 1, *size, slope=parts.RELU)),
                parts.pointwise(kernel, draw.kaiming(out, 8 * inner, *(1,) * kernel.rank, slope=parts.RELU)),
            ),
        ]


def _normed(kernel: Kernel, *layers: nn.Module) -> nn.Sequential:
    """The layers, whose output has the kernel's channels, and a BatchNorm."""
    return nn.Sequential(*layers, parts.silent_norm(kernel.weight, kernel.out_channels))


def _scaled(value: float, kernel: Kernel, *layers: nn.Module) -> nn.Sequential:
    """The layers, whose output has the kernel's channels, and a Scale."""
    scale = kernel.weight.detach().new_full((kernel.out_channels,), value)
    return nn.Sequential(*layers, Scale(scale, kernel.rank))


def _identity(kernel: Kernel) -> list[nn.Sequential]:
    """The branch of a BatchNorm alone, where channels and size are kept."""
    kept = kernel.in_channels == kernel.out_channels and parts.keeps_size(kernel)
    return [_normed(kernel)] if kept else []


def _draw_pointwise(
    kernel: Kernel, draw: parts.Draw, channels: int | None = None, slope: float = parts.TORCH
) -> Tensor:
    """A 1 x 1 weight with the kernel's inputs and groups."""
    out = kernel.out_channels if channels is None else channels
    return draw.kaiming(out, kernel.weight.shape[1], *(1,) * kernel.rank, slope=slope)


def _zero_pointwise(kernel: Kernel, channels: int) -> nn.Module:
    """A 1 x 1 convolution of zeros, with the kernel's inputs and groups."""
    shape = (channels, kernel.weight.shape[1], *(1,) * kernel.rank)
    return parts.pointwise(kernel, kernel.weight.detach().new_zeros(shape))


def _pad(kernel: Kernel) -> list[nn.Module]:
    """A part with the kernel's padding; none if the kernel has no padding."""
    return [Pad(kernel, kernel.padding)] if any(side for pair in kernel.padding for side in pair) else []


def _copies(kernel: Kernel, times: int) -> nn.Module:
    """A part that repeats every channel of the input ``times`` times."""
    one = kernel.weight.detach().new_empty((1, 1, *(1,) * kernel.rank))
    return Average(Kernel(one), kernel.in_channels, times)


def _require_centre(kernel: Kernel, recipe: str) -> None:
    if any(k % 2 == 0 for k in kernel.kernel_size):
        raise InexactError(
            f"an even kernel ({'x'.join(map(str, kernel.kernel_size))}) has no middle tap, where {recipe} "
            "puts its smaller branches. Use Chain or DOConv"
        )


def _require_taps(kernel: Kernel, recipe: str, instead: str) -> None:
    if math.prod(kernel.kernel_size) == 1:
        raise InexactError(f"{recipe} puts a 1x1 beside a larger kernel, and this one has one tap. {instead}")
