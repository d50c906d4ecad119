"""Depthwise over-parameterisation: J. Cao et al., "DO-Conv" (IEEE Transactions on Image Processing, 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.lower import laid_out_as, to_module
from fxexpand.recipes.fixed import Taps
from fxexpand.recipes.parts import Draw, depthwise, match, require_convolution, require_init
from fxexpand.recipes.recipe import Init, Recipe
from fxexpand.recipes.structure import Branches


@dataclass(frozen=True)
class DOConv(Recipe):
    """``W'[o, c] = W[o, c] (I + D_c)``: a learnable matrix mixes the taps of every input channel.

    With k taps in all, ``W`` is ``(out, in/groups * k)`` and ``D`` is ``(in * k, 1, *k)``. D starts at zero,
    so the block starts as the kernel. The layers are the taps of each channel side by side plus a depthwise
    convolution D (with the kernel's geometry), then a 1 x 1 convolution W. This is the paper's "feature
    composition", at k times the work; ``form="auto"`` composes the kernel, as the paper does in training, at
    a cost that does not depend on the size of the image.

    Weight decay pulls D to zero, that is, the matrix to the identity, as in the released code. The kernel
    needs more than one tap, and may be even.
    """

    def build(
        self, kernel: Kernel, *, init: Init = "preserve", generator: torch.Generator | None = None
    ) -> nn.Sequential:
        require_init(init)
        require_convolution(kernel, "DOConv")
        taps = math.prod(kernel.kernel_size)
        if taps == 1:
            raise InexactError("DOConv mixes the taps of a kernel, and this one has one tap. Use Chain")
        channels, inner = kernel.in_channels, kernel.weight.shape[1]
        mixing = kernel.weight.detach().new_zeros((channels * taps, 1, *kernel.kernel_size))
        mixing = laid_out_as(mixing, kernel.weight)
        shape = (kernel.out_channels, inner * taps, *(1,) * kernel.rank)
        if init == "preserve":
            weight = kernel.weight.detach().reshape(shape).clone()
        else:
            weight = Draw(kernel, generator).kaiming(*shape)
        last = to_module(Kernel(weight, kernel.bias, groups=kernel.groups))
        block = nn.Sequential(Branches([Taps(kernel, channels), depthwise(kernel, mixing)]), last)
        if init == "matched" and not kernel.weight.is_meta:
            match(block, kernel, [last.get_parameter("weight")])
        for part in (block[0], last):
            part.requires_grad_(kernel.weight.requires_grad)
        if kernel.bias is not None:
            last.get_parameter("bias").requires_grad_(kernel.bias.requires_grad)
        return block
