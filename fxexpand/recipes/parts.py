"""Parts of several recipes: layers with the geometry of a kernel, initial weights, and conditions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError, SelectionError
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.lower import laid_out_as, to_module
from fxexpand.recipes.fixed import Pad
from fxexpand.recipes.recipe import INITS, Init
from fxexpand.recipes.structure import LastDimBatchNorm, fold

NORMS = (LastDimBatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # by spatial rank
# Slopes of the leaky ReLU in Kaiming's initialisation: that of a ReLU, and that of torch's layers.
RELU = 0.0
TORCH = math.sqrt(5)


class Draw:
    """Random initial weights.

    Args:
        kernel: kernel that gives dtype, device and memory format; on the meta device nothing is drawn.
        generator: source of the draws, which are made on its device; None takes torch's global one.
    """

    def __init__(self, kernel: Kernel, generator: torch.Generator | None) -> None:
        self.like = kernel.weight.detach()
        self.generator = generator

    def kaiming(self, *shape: int, slope: float = TORCH) -> Tensor:
        """A weight of this shape, uniform in ``± sqrt(6 / ((1 + slope²) fan_in))``.

        Source: K. He et al., ICCV 2015.
        """
        if self.like.is_meta:
            return self.like.new_empty(shape)
        device = self.generator.device if self.generator is not None else torch.device("cpu")
        weight = torch.empty(shape, dtype=torch.float32, device=device)
        nn.init.kaiming_uniform_(weight, a=slope, generator=self.generator)
        return laid_out_as(weight.to(self.like.device, self.like.dtype), self.like)


def require_convolution(kernel: Kernel, recipe: str) -> None:
    """Raises: InexactError: the kernel is no plain convolution, or an empty one, and ``recipe`` needs one."""
    if kernel.rank == 0:
        raise InexactError(
            f"{recipe} is defined for convolutions, not for a Linear. Use Chain or ExpandNetFC"
        )
    if kernel.transposed:
        raise InexactError(f"{recipe} is defined for convolutions, not for transposed ones. Use Chain")
    require_weight(kernel)


def require_weight(kernel: Kernel) -> None:
    """Raises: InexactError: the weight is empty."""
    if 0 in kernel.weight.shape:
        raise InexactError("the weight is empty. Leave it out by select")


def require_init(init: Init) -> None:
    """Raises: SelectionError: ``init`` is not in ``INITS``."""
    if init not in INITS:
        raise SelectionError(f"init={init!r}: choose from {', '.join(INITS)}.")


def conv(kernel: Kernel, weight: Tensor) -> nn.Module:
    """A convolution with another weight of this kernel size, and the kernel's stride, padding and so on."""
    return to_module(replace(kernel, weight=weight, bias=None), copy=False)


def depthwise(kernel: Kernel, weight: Tensor) -> nn.Module:
    """A convolution per channel, with the kernel's stride, padding and so on."""
    return conv(replace(kernel, groups=kernel.in_channels), weight)


def pointwise(kernel: Kernel, weight: Tensor) -> nn.Module:
    """A 1 x 1 convolution with the kernel's groups, at every position of its input."""
    return to_module(Kernel(weight, groups=kernel.groups), copy=False)


def centred(kernel: Kernel, weight: Tensor) -> list[nn.Module]:
    """A convolution of fewer taps, at the positions of the middle taps of ``kernel``.

    If the kernel pads less than the distance to its middle taps, a crop of the input comes first.
    """
    padding, crop = [], []
    for (before, after), d, many, few in zip(
        kernel.padding, kernel.dilation, kernel.kernel_size, weight.shape[2:], strict=True
    ):
        inwards = d * ((many - few) // 2)
        before, after = before - inwards, after - inwards
        padding.append((max(before, 0), max(after, 0)))
        crop.append((min(before, 0), min(after, 0)))
    layer = to_module(replace(kernel, weight=weight, bias=None, padding=tuple(padding)), copy=False)
    cropped = any(side < 0 for pair in crop for side in pair)
    return [Pad(kernel, tuple(crop)), layer] if cropped else [layer]


def silent_norm(like: Tensor, channels: int) -> nn.Module:
    """A BatchNorm for a weight like this; in evaluation mode it is the identity until it has seen data."""
    norm = NORMS[like.ndim - 2](channels, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        norm.weight.fill_(math.sqrt(1.0 + norm.eps))
    return norm.requires_grad_(like.requires_grad)


def keeps_size(kernel: Kernel) -> bool:
    """Whether the identity of equal size can be added: stride 1, and padding that centres a middle tap."""
    spans = [d * (k - 1) for d, k in zip(kernel.dilation, kernel.kernel_size, strict=True)]
    centred = all(
        k % 2 == 1 and before == after == span // 2
        for k, span, (before, after) in zip(kernel.kernel_size, spans, kernel.padding, strict=True)
    )
    return centred and not kernel.transposed and all(step == 1 for step in kernel.stride)


def folded_weight(block: nn.Module) -> Tensor:
    """The weight of the kernel of ``block`` in evaluation mode, in float64."""
    with torch.no_grad():
        return fold(copy.deepcopy(block).double().eval()).weight


def match(block: nn.Module, kernel: Kernel, parameters: Sequence[Tensor], degree: int = 1) -> None:
    """Scale ``parameters`` so that the folded weight has the Frobenius norm of the kernel's weight.

    A zero weight is left alone.

    Args:
        parameters: tensors whose common factor f multiplies the folded weight by ``f ** degree``.
    """
    norm, wanted = float(folded_weight(block).norm()), float(kernel.weight.detach().double().norm())
    if norm > 0.0 and wanted > 0.0:
        for parameter in parameters:
            parameter.detach().mul_((wanted / norm) ** (1.0 / degree))
