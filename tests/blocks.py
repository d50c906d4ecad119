"""Training-time blocks of the literature as their users write them, each of them affine or nearly so.

From the formulas of the papers; nothing here knows of fxexpand. ``BLOCKS`` says of each what is left of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inp: int, out: int, size: int | tuple[int, int], **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, out, size, bias=False, **options), nn.BatchNorm2d(out))


def norm_linear(inp: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(inp), nn.Dropout(0.3), nn.Linear(inp, out))


def random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class RepVGG(nn.Module):
    """Ding et al. 2021: 3 x 3, 1 x 1 and, where the shape is kept, the input, each with a BatchNorm."""

    def __init__(self, inp: int, out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_bn(inp, out, 3, stride=stride, padding=1, groups=groups)
        self.point = conv_bn(inp, out, 1, stride=stride, groups=groups)
        self.skip = nn.BatchNorm2d(inp) if inp == out and stride == 1 else None

    def forward(self, x: Tensor) -> Any:
        skip = 0 if self.skip is None else self.skip(x)
        return self.dense(x) + self.point(x) + skip


class ACNet(nn.Module):
    """Ding et al. 2019: k x k, 1 x k and k x 1, the narrow ones padded to lie on its cross."""

    def __init__(self, inp: int, out: int, size: int, stride: int, padding: int, groups: int = 1) -> None:
        super().__init__()
        less = padding - size // 2
        self.square = conv_bn(inp, out, size, stride=stride, padding=padding, groups=groups)
        self.row = conv_bn(inp, out, (1, size), stride=stride, padding=(less, padding), groups=groups)
        self.column = conv_bn(inp, out, (size, 1), stride=stride, padding=(padding, less), groups=groups)

    def forward(self, x: Tensor) -> Any:
        y = self.square(x)
        y += self.row(x)
        y += self.column(x)
        return y


class PaddedBatchNorm2d(nn.Module):
    """BatchNorm by its running statistics, padded with what it makes of zeros: its folded bias."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.bn, self.padding = nn.BatchNorm2d(channels), padding

    def forward(self, x: Tensor) -> Any:
        bn: Any = self.bn
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        shift = bn.bias - bn.running_mean * scale
        return F.pad(x * scale[:, None, None], [self.padding] * 4) + shift[:, None, None]


class DBB(nn.Module):
    """Ding et al. 2021: k x k, 1 x 1, 1 x 1 then average, 1 x 1 then k x k, a BatchNorm after each operator.

    Behind the 1 x 1 the border holds the folded bias of its BatchNorm. ``border``: what puts it there.
    """

    def __init__(self, inp: int, out: int, size: int, border: str, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        hidden, pad = (inp if groups == 1 else 2 * inp), size // 2

        def first(channels: int) -> list[nn.Module]:
            if border == "conv":
                return [*conv_bn(inp, channels, 1, padding=pad, groups=groups)]
            conv, bn = conv_bn(inp, channels, 1, groups=groups)
            padded = PaddedBatchNorm2d(channels, pad)
            return [conv, nn.ZeroPad2d(pad), bn] if border == "zeros" else [conv, padded]

        self.origin = conv_bn(inp, out, size, stride=stride, padding=pad, groups=groups)
        self.point = conv_bn(inp, out, 1, stride=stride, groups=groups)
        self.average = nn.Sequential(*first(out), nn.AvgPool2d(size, stride), nn.BatchNorm2d(out))
        self.deep = nn.Sequential(*first(hidden), *conv_bn(hidden, out, size, stride=stride, groups=groups))

    def forward(self, x: Tensor) -> Any:
        return self.origin(x) + self.point(x) + self.average(x) + self.deep(x)


class MobileOne(nn.Module):
    """Vasu et al. 2023: several equal conv-BN branches, a 1 x 1 one, and a BatchNorm of the input."""

    def __init__(self, inp: int, out: int, size: int, count: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        options = {"stride": stride, "padding": size // 2, "groups": groups}
        self.convs = nn.ModuleList(conv_bn(inp, out, size, **options) for _ in range(count))
        self.scale = conv_bn(inp, out, 1, stride=stride, groups=groups) if size > 1 else None
        self.skip = nn.BatchNorm2d(inp) if inp == out and stride == 1 else None

    def forward(self, x: Tensor) -> Any:
        y = (0 if self.scale is None else self.scale(x)) + (0 if self.skip is None else self.skip(x))
        for conv in self.convs:
            y += conv(x)
        return y


class RepMixer(nn.Module):
    """Vasu et al., FastViT: ``x + γ (f(x) − g(x))`` of a MobileOne block f and a BatchNorm g."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mixer = MobileOne(channels, channels, size, 1, groups=channels)
        self.gamma = random(channels, 1, 1)

    def forward(self, x: Tensor) -> Any:
        return x + self.gamma * (self.mixer(x) - self.norm(x))


class OREPA(nn.Module):
    """Hu et al. 2022: linear branches, each times a scale per output channel; one BatchNorm after the sum."""

    prior: Tensor

    def __init__(self, inp: int, out: int, size: int, stride: int = 1) -> None:
        super().__init__()

        def conv(inp: int, out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
            return nn.Conv2d(inp, out, size, stride, size // 2, groups=groups, bias=False)

        self.origin, self.point = conv(inp, out, size, stride), conv(inp, out, 1, stride)
        self.averaged, self.filtered = conv(inp, out, 1), conv(inp, out, 1)
        self.before, self.after = conv(inp, inp, 1), conv(inp, out, size, stride)
        self.depthwise, self.pointwise = conv(inp, 8 * inp, size, stride, inp), conv(8 * inp, out, 1)
        rows, taps = torch.arange(out)[:, None], (torch.arange(size) + 0.5) * math.pi / size
        cosines = torch.cos(rows * taps)[:, :, None] * torch.cos((rows + 1) // 2 * taps)[:, None]
        self.register_buffer("prior", cosines[:, None])
        self.scales, self.bn = nn.Parameter(torch.rand(6, out) + 0.2), nn.BatchNorm2d(out)
        self.sliding: dict[str, Any] = {"stride": stride, "padding": size // 2}

    def forward(self, x: Tensor) -> Any:
        branches = (
            self.origin(x),
            F.avg_pool2d(self.averaged(x), self.origin.kernel_size, **self.sliding),
            F.conv2d(self.filtered(x), self.prior, **self.sliding, groups=self.origin.out_channels),
            self.point(x),
            self.after(self.before(x)),
            self.pointwise(self.depthwise(x)),
        )
        return self.bn(sum(branch * self.scales[i].view(-1, 1, 1) for i, branch in enumerate(branches)))


class CollapsedOREPA(OREPA):
    """The same block as OREPA trains it: one weight out of all branches, then one convolution."""

    def forward(self, x: Tensor) -> Any:
        out, inp, size, _ = self.origin.weight.shape
        mixing = self.pointwise.weight.view(out, inp, 8)
        branches = (
            self.origin.weight,
            self.averaged.weight.expand(-1, -1, size, size) / size**2,
            self.filtered.weight * self.prior,
            F.pad(self.point.weight, [size // 2] * 4),
            torch.einsum("ohyx,hi->oiyx", self.after.weight, self.before.weight[:, :, 0, 0]),
            torch.einsum("oie,ieyx->oiyx", mixing, self.depthwise.weight.view(inp, 8, size, size)),
        )
        weight = torch.einsum("bo,boiyx->oiyx", self.scales, torch.stack(branches))
        return self.bn(F.conv2d(x, weight, **self.sliding))


class DOConv2d(nn.Module):
    """Cao et al. 2022: ``W'[o, c] = D_c W[o, c]`` with D the identity plus a learnable part."""

    def __init__(self, inp: int, out: int, size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.shape, self.stride, self.padding, taps = (out, inp, size, size), stride, padding, size**2
        self.W = nn.Parameter(torch.randn(out, inp, taps) / math.sqrt(inp * taps))
        self.D = nn.Parameter(torch.randn(inp, taps, taps) * 0.3)
        self.register_buffer("eye", torch.eye(taps))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Any:
        weight = torch.einsum("ckd,ocd->ock", self.D + self.eye, self.W)  # type: ignore[operator]
        return F.conv2d(x, weight.reshape(self.shape), self.bias, self.stride, self.padding)


class SESR(nn.Module):
    """Bhardwaj et al. 2022: k x k to many channels, 1 x 1 back, plus the input."""

    def __init__(self, channels: int, hidden: int, size: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, hidden, size, padding=size // 2, bias=False)
        self.narrow = nn.Conv2d(hidden, channels, 1, bias=False)
        self.register_buffer("image", F.pad(torch.eye(channels)[:, :, None, None], [size // 2] * 4))

    def forward(self, x: Tensor) -> Any:
        return x + self.narrow(self.wide(x))


class CollapsedSESR(SESR):
    """The same block as SESR trains it: run on an image of the identity it gives its own kernel, flipped."""

    def forward(self, x: Tensor) -> Any:
        weight = self.narrow(self.wide(self.image)).flip(2, 3).transpose(0, 1) + self.image
        return F.conv2d(x, weight, padding=self.wide.padding)


class HuhChain(nn.Module):
    """Huh et al. 2023: padding on the first layer, stride on the last, a BatchNorm after each, residuals."""

    def __init__(self, channels: list[int], sizes: list[int], stride: int = 1, every: int = 0) -> None:
        super().__init__()
        self.every, self.layers = every, nn.ModuleList()
        padding, last = sum(size - 1 for size in sizes) // 2, len(sizes) - 1
        for i, size in enumerate(sizes):
            options: dict[str, Any] = {"stride": stride if i == last else 1, "padding": 0 if i else padding}
            conv = nn.Conv2d(channels[i], channels[i + 1], size, **options)
            self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(channels[i + 1])))

    def forward(self, x: Tensor) -> Any:
        start = x
        for i, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if self.every and i % self.every == 0:
                start = x = torch.add(x, start)
        return x


class StdConv2d(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019) by way of batch_norm, as timm writes it."""

    def forward(self, x: Tensor) -> Any:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Branches(nn.Module):
    """What several parts make of one input, joined; by default added up."""

    def __init__(self, *parts: nn.Module, join: Callable[[list[Any]], Any] = sum) -> None:
        super().__init__()
        self.parts, self.join = nn.ModuleList(parts), join

    def forward(self, x: Tensor) -> Any:
        return self.join([part(x) for part in self.parts])


class Call(nn.Module):
    """A function as a module, which holds the modules and parameters that the function takes by name."""

    def __init__(self, function: Callable[..., Any], *args: Any, **parts: Any) -> None:
        super().__init__()
        self.function, self.args, self.names = function, args, list(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.args, **{name: getattr(self, name) for name in self.names})


def two_heads(x: Any, head: Any, distilled: Any) -> Any:
    return (head(x) + distilled(x)) / 2


def mean_of_stack(heads: list[Any]) -> Any:
    return torch.stack(heads).mean(0)


def linear_norm(x: Any, linear: Any, norm: Any) -> Any:
    x = linear(x)
    return norm(x.flatten(0, 1)).reshape_as(x)


def tokens(x: Any) -> Any:
    return x.flatten(2).transpose(1, 2)


def halves(x: Any) -> Any:
    one, two = x.chunk(2, 1)
    return one - two


def shared_conv(x: Any, conv: Any, norm: Any, other_norm: Any) -> Any:
    return other_norm(conv(torch.tanh(norm(conv(x)))))


def in_place(x: Any, body: Any, gamma: Any) -> Any:
    return body(x).mul_(gamma).sub_(x, alpha=0.5).div_(3)


def arithmetic(x: Any, weights: Any, linear: Any, factor: Any) -> Any:
    y = F.linear(x, weights[0] + 0.5 * weights[1], factor * weights[0, 1])
    return 1.0 - (factor * -y + x / 3 - 2 * linear(x)) * 0.5
