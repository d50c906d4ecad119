"""Training-time blocks of the literature as their users write them, each of them affine or nearly so.

From the formulas of the papers; nothing here knows of fxexpand. ``BLOCKS`` says of each what is left of it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


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


class K(NamedTuple):
    """The one convolution a block computes; of size () it is a Linear."""

    size: tuple[int, ...]
    stride: int = 1
    padding: tuple[int, ...] | int = 0
    groups: int = 1


@dataclass(frozen=True)
class Block:
    """A block and what is known of it.

    Attributes:
        make: the block, with random parameters.
        shape: of an input.
        one: the convolution it computes; of a refused block, that which it computes away from the border.
        left: how many convs, linears, norms, average pools, sums, products and concatenations fusing leaves.
        refused: words of the reason why something stays that could be thought to fold; "" if nothing does.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    one: K | None = None
    left: int = 1
    refused: str = ""


S, C, L, N, N1 = nn.Sequential, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d
LINEAR, POINT, VALID, SAME, HALF = K(()), K((1, 1)), K((3, 3)), K((3, 3), 1, 1), K((3, 3), 2, 1)
ALL, CAT = slice(None), functools.partial(torch.cat, dim=1)
SUM = functools.partial(functools.reduce, operator.add)  # without the zero that ``sum`` starts with

BLOCKS: dict[str, Block] = {
    "repvgg": Block(lambda: RepVGG(5, 5), (2, 5, 7, 9), SAME),
    "repvgg, stride": Block(lambda: RepVGG(4, 6, stride=2), (2, 4, 7, 8), HALF),
    "repvgg, groups": Block(lambda: RepVGG(6, 6, groups=3), (2, 6, 5, 7), K((3, 3), 1, 1, 3)),
    "repvgg, stride and groups": Block(lambda: RepVGG(6, 9, 2, 3), (2, 6, 7, 6), K((3, 3), 2, 1, 3)),
    "repvgg, twice": Block(lambda: S(RepVGG(4, 6, 2), nn.ReLU(), RepVGG(6, 6)), (2, 4, 9, 7), left=2),
    "acnet": Block(lambda: ACNet(3, 5, 3, stride=2, padding=1), (2, 3, 7, 8), HALF),
    "acnet, groups": Block(lambda: ACNet(4, 6, 5, 1, 2, groups=2), (2, 4, 7, 9), K((5, 5), 1, 2, 2)),
    "acnet, wide padding": Block(lambda: ACNet(3, 4, 3, 1, 2), (2, 3, 6, 5), K((3, 3), 1, 2)),
    "dbb": Block(lambda: DBB(3, 5, 3, "conv"), (2, 3, 7, 6), SAME),
    "dbb, zeros before the norm": Block(lambda: DBB(3, 5, 3, "zeros", stride=2), (2, 3, 7, 8), HALF),
    "dbb, padding norm": Block(lambda: DBB(4, 3, 5, "module"), (2, 4, 7, 8), K((5, 5), 1, 2)),
    "dbb, depthwise": Block(lambda: DBB(6, 6, 3, "conv", groups=6), (2, 6, 5, 7), K((3, 3), 1, 1, 6)),
    "mobileone, depthwise": Block(lambda: MobileOne(6, 6, 3, 4, groups=6), (2, 6, 5, 7), K((3, 3), 1, 1, 6)),
    "mobileone, stride": Block(lambda: MobileOne(4, 8, 5, 3, 2, 4), (2, 4, 9, 8), K((5, 5), 2, 2, 4)),
    "mobileone, pointwise": Block(lambda: MobileOne(5, 5, 1, 4), (2, 5, 4, 6), POINT),
    "mobileone, channels": Block(lambda: MobileOne(5, 7, 1, 2), (2, 5, 4, 6), POINT),
    "repmixer": Block(lambda: RepMixer(6, 3), (2, 6, 7, 5), K((3, 3), 1, 1, 6)),
    "orepa": Block(lambda: OREPA(3, 5, 3), (2, 3, 7, 6), SAME),
    "orepa, stride": Block(lambda: OREPA(4, 6, 5, stride=2), (2, 4, 9, 8), K((5, 5), 2, 2)),
    "orepa, collapsed": Block(lambda: CollapsedOREPA(3, 5, 3), (2, 3, 7, 6), SAME),
    "do-conv": Block(lambda: S(DOConv2d(3, 5, 3, 2, 1), N(5)), (2, 3, 7, 8), HALF),
    "sesr": Block(lambda: SESR(4, 16, 5), (2, 4, 7, 8), K((5, 5), 1, 2)),
    "sesr, collapsed": Block(lambda: CollapsedSESR(4, 16, 5), (2, 4, 7, 8), K((5, 5), 1, 2)),
    "expandnet-cl": Block(
        lambda: S(C(3, 12, 1, 1, 1), C(12, 20, 3, 2), C(20, 5, 1), N(5)), (2, 3, 7, 8), HALF),
    "expandnet-cl, depthwise": Block(
        lambda: S(C(4, 16, 1, 1, 1, groups=4), C(16, 16, 3, 2, groups=4), C(16, 4, 1, groups=4)),
        (2, 4, 9, 7), K((3, 3), 2, 1, 4)),
    "expandnet-ck": Block(
        lambda: S(C(2, 8, 3, 1, 3), C(8, 20, 3), C(20, 5, 3), N(5)), (1, 2, 9, 8), K((7, 7), 1, 3)),
    "expandnet-fc": Block(lambda: S(L(6, 24), L(24, 20), L(20, 5)), (3, 6), LINEAR),
    "huh": Block(lambda: HuhChain([3, 8, 7, 5], [5, 3, 1], stride=2), (1, 3, 9, 11), K((7, 7), 2, 3)),
    "huh, residual interval": Block(lambda: HuhChain([5] * 5, [3, 1, 1, 1], every=2), (2, 5, 6, 7), SAME),
    "huh, residual end to end": Block(lambda: HuhChain([5] * 5, [1, 3, 1, 1], every=4), (2, 5, 6, 7), SAME),
    "standardised weight": Block(lambda: S(StdConv2d(3, 5, 3, 2, 1), N(5)), (2, 3, 7, 6), HALF),
    "weight norm": Block(lambda: S(weight_norm(C(3, 5, 3, 2, 1)), N(5)), (2, 3, 7, 6), HALF),
    "spectral norm": Block(lambda: S(spectral_norm(C(3, 5, 3, 1, 1)), N(5)), (2, 3, 7, 6), SAME),
    "two heads": Block(lambda: Call(two_heads, head=L(7, 4), distilled=L(7, 4)), (3, 7), LINEAR),
    "two heads with norms": Block(
        lambda: Call(two_heads, head=norm_linear(7, 4), distilled=norm_linear(7, 4)), (3, 7), LINEAR),
    "many heads": Block(lambda: Branches(*map(L, [7] * 3, [4] * 3), join=mean_of_stack), (3, 7), LINEAR),
    "norm, dropout, linear": Block(lambda: norm_linear(7, 5), (4, 7), LINEAR),
    "pre-activation": Block(  # the first norm and the sum stay
        lambda: Branches(
            nn.Identity(), S(N(4), nn.ReLU(), C(4, 6, 3, 1, 1), N(6), nn.ReLU(), C(6, 4, 1)), join=SUM),
        (2, 4, 6, 5), left=4),
    "three projections": Block(  # the concatenation stays
        lambda: S(N1(7), Branches(S(L(7, 5), nn.Tanh()), S(L(7, 3), nn.ELU()), L(7, 4), join=CAT)),
        (3, 7), left=4),
    "one projection": Block(lambda: S(N1(7), Branches(L(7, 5), L(7, 3), L(7, 4), join=CAT)), (3, 7), LINEAR),
    "layer scale": Block(
        lambda: Branches(nn.Identity(), S(C(5, 5, 3, 1, 1), N(5), Call(torch.mul, other=random(5, 1, 1)))),
        (2, 5, 6, 7), SAME),
    "in place": Block(
        lambda: Call(in_place, body=conv_bn(5, 5, 1), gamma=random(5, 1, 1)), (2, 5, 4, 3), POINT),
    "linear norm": Block(lambda: Call(linear_norm, linear=L(6, 5), norm=N1(5)), (2, 4, 6), LINEAR),
    "tokens": Block(lambda: S(*conv_bn(3, 6, 4, stride=4), Call(tokens), L(6, 5)), (2, 3, 8, 12)),
    "shared conv": Block(
        lambda: Call(shared_conv, conv=C(4, 4, 3, 1, 1), norm=N(4), other_norm=N(4)), (2, 4, 5, 6), left=2),
    "norm after sum": Block(
        lambda: S(Branches(C(3, 5, 3, 2, 1), C(3, 5, 1, 2, bias=False)), N(5)), (2, 3, 6, 7), HALF),
    "nested sums": Block(
        lambda: Branches(S(Branches(C(5, 5, 1), C(5, 5, (1, 3), 1, (0, 1))), N(5)), C(5, 5, 3, 1, 1), N(5)),
        (2, 5, 6, 7), SAME),
    "slice": Block(
        lambda: S(*conv_bn(3, 8, 3), Call(operator.getitem, (ALL, slice(2, 7)))), (2, 3, 6, 7), VALID),
    "permuted channels": Block(
        lambda: S(*conv_bn(3, 4, 3), Call(operator.getitem, (ALL, [2, 0, 3, 1]))), (2, 3, 6, 7), VALID),
    "halves": Block(lambda: S(*conv_bn(3, 8, 3), Call(halves)), (2, 3, 6, 7), VALID),
    "cat": Block(lambda: S(Branches(C(3, 4, 3, 1, 1), C(3, 5, 1), join=CAT), C(9, 4, 1)), (2, 3, 6, 7), SAME),
    "padding": Block(
        lambda: S(Call(F.pad, (1, 1, 2, 2)), *conv_bn(3, 5, (5, 3))), (2, 3, 6, 7), K((5, 3), 1, (2, 1))),
    "padding on one side": Block(lambda: S(nn.ZeroPad2d((0, 2, 1, 0)), *conv_bn(3, 5, 3)), (2, 3, 6, 7),
        refused="padding"),
    "average": Block(lambda: S(C(3, 5, 3, 1, 1), N(5), nn.AvgPool2d(2)), (2, 3, 6, 8), K((4, 4), 2, 1)),
    "arithmetic": Block(
        lambda: Call(arithmetic, weights=random(2, 6, 6), linear=L(6, 6), factor=random()), (3, 6), LINEAR),
    "lora": Block(lambda: Branches(L(8, 6), S(L(8, 2), L(2, 6), Call(torch.mul, 0.5))), (3, 8), LINEAR),
    "norm, conv": Block(lambda: S(N(3), C(3, 5, 3)), (2, 3, 6, 7), VALID),
    "transposed": Block(lambda: S(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), N(6)), (2, 4, 5, 3)),
    "one dimension": Block(
        lambda: S(nn.Conv1d(3, 4, 3, 2, 1), N1(4), nn.Conv1d(4, 5, 1)), (2, 3, 8), K((3,), 2, 1)),
    "three dimensions": Block(
        lambda: S(nn.Conv3d(2, 3, (1, 2, 3)), nn.BatchNorm3d(3)), (2, 2, 3, 4, 5), K((1, 2, 3))),
    # One kernel would cost more, or something else reads what is in between.
    "bottleneck": Block(lambda: S(L(9, 2), L(2, 8)), (3, 9), LINEAR, left=2),
    "average before a conv": Block(
        lambda: S(nn.AvgPool2d(2), *conv_bn(4, 6, 1)), (2, 4, 6, 8), K((2, 2), 2), left=2),
    "padded average": Block(
        lambda: S(C(3, 5, 1, bias=False), nn.AvgPool2d(3, 1, 1), N(5)), (2, 3, 6, 7), SAME, left=3),
    "read twice": Block(
        lambda: S(C(3, 5, 3, 2), Branches(nn.ReLU(), S(N(5), nn.Tanh()), join=CAT)), (2, 3, 7, 6), left=3),
    # No single kernel computes these: something must stay, with a reason.
    "bias, padding": Block(lambda: S(C(3, 4, 1), C(4, 5, 3, 1, 1)), (2, 3, 6, 7), SAME, 2, "padding"),
    "norm, padding": Block(lambda: S(N(4), C(4, 5, 3, 2, 1)), (2, 4, 6, 7), HALF, 2, "padding"),
    "dbb's chain without its border": Block(
        lambda: S(*conv_bn(3, 4, 1), *conv_bn(4, 5, 3, padding=1)), (2, 3, 6, 7), SAME, 2, "padding"),
    "average without the padding": Block(
        lambda: S(*conv_bn(3, 5, 3), nn.AvgPool2d(2, 2, 1, count_include_pad=False)), (2, 3, 8, 9),
        K((4, 4), 2, 1), 2, "count_include_pad"),
    "average of cut windows": Block(
        lambda: S(*conv_bn(3, 5, 3), nn.AvgPool2d(2, ceil_mode=True)), (2, 3, 7, 9), None, 2, "ceil"),
    "batch statistics": Block(
        lambda: S(C(3, 5, 3), N(5, track_running_stats=False)), (2, 3, 6, 7), None, 2, "statistics"),
}  # fmt: skip
