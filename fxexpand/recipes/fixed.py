"""Kernels that do not train: padding, averages, cosines, and all taps side by side.

Their numbers are computed from the geometry whenever they are needed, so a block has no parameter and no
buffer for them: there is nothing to save, and nothing that an optimizer could change. Each acts on every
channel by itself, ``(channels, *size)`` to ``(times * channels, *size)``, with the outputs of a channel next
to each other.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxexpand.kernel.algebra import Kernel, apply, filled, padded
from fxexpand.kernel.geometry import Padding


class Fixed(nn.Module):
    """A depthwise convolution with fixed taps.

    Args:
        like: the kernel that gives size, stride, padding, dilation and padding mode.
        channels: number of input channels.
        times: number of outputs per channel.
    """

    def __init__(self, like: Kernel, channels: int, times: int = 1) -> None:
        super().__init__()
        self.geometry = replace(
            like.geometry,
            out_channels=times * channels,
            in_channels=channels,
            groups=channels,
            transposed=False,
            bias=False,
        )

    @abstractmethod
    def taps(self, like: Tensor) -> Tensor:
        """The weight ``(times * channels, 1, *k)``, in the dtype and on the device of ``like``."""

    def kernel(self, like: Tensor) -> Kernel:
        """The kernel, in the dtype and on the device of ``like``."""
        return filled(self.geometry, self.taps(like))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *size)`` to ``(batch, times * channels, *size)``."""
        return apply(self.kernel(x), x)

    def extra_repr(self) -> str:
        """Channels, size and padding."""
        g = self.geometry
        return f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, padding={g.padding}"


class Average(Fixed):
    """The mean over the taps, padding counted; with one tap and ``times > 1`` it copies every channel."""

    def taps(self, like: Tensor) -> Tensor:
        """``1 / number of taps`` everywhere."""
        size = self.geometry.kernel_size
        return like.new_full((self.geometry.out_channels, 1, *size), 1.0 / math.prod(size))


class Taps(Fixed):
    """Each tap as an output channel (im2col); ``times`` is the number of taps."""

    def __init__(self, like: Kernel, channels: int) -> None:
        super().__init__(like, channels, math.prod(like.kernel_size))

    def taps(self, like: Tensor) -> Tensor:
        """The identity matrix, one row per tap, for every channel."""
        size = self.geometry.kernel_size
        each = torch.eye(math.prod(size), dtype=like.dtype, device=like.device)
        return each.reshape(-1, 1, *size).repeat(self.geometry.in_channels, *(1,) * (len(size) + 1))


class Cosine(Fixed):
    """One frequency per channel, along one dimension: ``cos(π (a + ½) n / k)`` at tap a of k.

    The channels are divided evenly among the dimensions of more than one tap, and n counts from 1 in each
    part.

    Source: the frequency prior of the code released with OREPA (arXiv 2204.00826), with k in place of 3.
    """

    def taps(self, like: Tensor) -> Tensor:
        """Cosines in float64, as the frequencies go up to the number of channels, then cast."""
        size, channels = self.geometry.kernel_size, self.geometry.out_channels
        dims = [dim for dim, k in enumerate(size) if k > 1]
        share = channels / len(dims)
        parts = []
        for place, dim in enumerate(dims):
            start, stop = math.ceil(place * share), math.ceil((place + 1) * share)
            order = torch.arange(start, stop, dtype=torch.float64, device=like.device) + (1 - place * share)
            taps = torch.arange(size[dim], dtype=torch.float64, device=like.device) + 0.5
            wave = torch.cos(torch.outer(order, taps) * (math.pi / size[dim]))
            shape = [size[dim] if d == dim else 1 for d in range(len(size))]
            parts.append(wave.reshape(-1, 1, *shape).expand(-1, 1, *size))
        return torch.cat(parts).to(like.dtype)


class Pad(Fixed):
    """The identity with padding, in front of a block whose parts pad nothing; negative values crop."""

    def __init__(self, like: Kernel, padding: Padding) -> None:
        super().__init__(like, like.in_channels)
        ones = (1,) * like.rank
        self.geometry = replace(self.geometry, kernel_size=ones, stride=ones, padding=padding, dilation=ones)

    def taps(self, like: Tensor) -> Tensor:
        """A one for every channel."""
        return like.new_ones((self.geometry.out_channels, 1, *self.geometry.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *size)``, padded; no convolution is needed."""
        return padded(x, self.geometry.padding, self.geometry.mode or "zeros")
