"""The blocks of ``tests.blocks``, each with its one convolution and with the operators that fusing leaves."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.blocks import (
    DBB,
    OREPA,
    SESR,
    ACNet,
    Branches,
    Call,
    CollapsedOREPA,
    CollapsedSESR,
    DOConv2d,
    HuhChain,
    MobileOne,
    RepMixer,
    RepVGG,
    StdConv2d,
    arithmetic,
    conv_bn,
    halves,
    in_place,
    linear_norm,
    mean_of_stack,
    norm_linear,
    random,
    shared_conv,
    tokens,
    two_heads,
)
from tests.networks import perturb


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


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A block in evaluation mode, and an input."""
    model = perturb(BLOCKS[name].make().to(dtype)).eval()
    return model, torch.randn(BLOCKS[name].shape, dtype=dtype)
