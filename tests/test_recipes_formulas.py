"""Branches and DO-Conv against the formulas of their papers, written out here without the kernel laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxexpand.recipes import DBB, OREPA, ACNet, DOConv, MobileOne, RepVGG, fold
from tests.compare import assert_same
from tests.test_recipes_branches import built, randomised

# The papers' folds.


def by_norm(weight: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """``K γ / sqrt(σ² + ε)`` and ``β − μ γ / sqrt(σ² + ε)``."""
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * factor.reshape(-1, 1, 1, 1), norm.bias - norm.running_mean * factor


def grown(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros around a smaller kernel."""
    up, left = (rows - weight.shape[2]) // 2, (columns - weight.shape[3]) // 2
    return F.pad(weight, (left, left, up, up))


def dirac(channels: int, groups: int, rows: int = 1, columns: int = 1) -> Tensor:
    weight = torch.zeros(channels, channels // groups, rows, columns, dtype=torch.float64)
    for channel in range(channels):
        weight[channel, channel % (channels // groups), rows // 2, columns // 2] = 1.0
    return weight


def in_sequence(first: Tensor, bias: Tensor, second: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """1 x 1 with a bias, then k x k, group by group: ``conv2d(K2, K1 transposed)`` and ``Σ K2 b1``."""
    weights, biases = [], []
    for one, b, two in zip(first.chunk(groups), bias.chunk(groups), second.chunk(groups), strict=True):
        weights.append(F.conv2d(two, one.permute(1, 0, 2, 3)))
        biases.append((two * b.reshape(1, -1, 1, 1)).sum((1, 2, 3)))
    return torch.cat(weights), torch.cat(biases)


def assert_folds_to(block: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> None:
    folded = fold(block)
    assert folded.bias is not None
    assert_same(folded.weight, sum(w for w, _ in parts), rel=1e-12)  # type: ignore[arg-type]
    assert_same(folded.bias, sum(b for _, b in parts), rel=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_repvgg_and_mobileone_are_sums_of_normalised_kernels(groups: int) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=groups).double()
    (branches,) = randomised(built(RepVGG(), layer))
    large, small, same = branches
    assert_folds_to(
        branches,
        [
            by_norm(large[0].weight, large[1]),
            by_norm(grown(small[0].weight, 3, 3), small[1]),
            by_norm(dirac(4, groups, 3, 3), same[0]),
        ],
    )
    (branches,) = randomised(built(MobileOne(k=3), layer))
    *alike, small, same = branches
    assert len(alike) == 3
    assert_folds_to(
        branches,
        [
            *(by_norm(branch[0].weight, branch[1]) for branch in alike),
            by_norm(grown(small[0].weight, 3, 3), small[1]),
            by_norm(dirac(4, groups, 3, 3), same[0]),
        ],
    )


def test_acnet_is_a_sum_of_a_square_and_its_skeleton() -> None:
    layer = nn.Conv2d(4, 6, (5, 3), padding=(2, 1)).double()
    (branches,) = randomised(built(ACNet(), layer))
    sizes = [tuple(branch[0].kernel_size) for branch in branches]
    assert sizes == [(5, 3), (5, 1), (1, 3)]
    assert_folds_to(
        branches,
        [by_norm(grown(branch[0].weight, 5, 3), branch[1]) for branch in branches],
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_dbb_is_the_sum_of_its_four_transforms(groups: int) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=groups).double()
    (branches,) = randomised(built(DBB(), layer))
    large, small, average, double = branches
    _, spread, (inner, mean, outer) = average[0], average[1], average[2:]
    pooled = torch.zeros(6, 6 // groups, 3, 3, dtype=torch.float64)
    for channel in range(6):
        pooled[channel, channel % (6 // groups)] = 1.0 / 9.0
    assert mean(torch.ones(1, 6, 3, 3, dtype=torch.float64)).flatten().tolist() == pytest.approx([1.0] * 6)
    average_weight, average_bias = in_sequence(*by_norm(spread.weight, inner), pooled, groups)
    _, skip, norm, last, end = double
    first = skip[0].weight + dirac(4, groups)
    double_weight, double_bias = in_sequence(*by_norm(first, norm), last.weight, groups)
    shifted = []
    for weight, bias, after in (
        (average_weight, average_bias, outer),
        (double_weight, double_bias, end),
    ):
        kernel, shift = by_norm(weight, after)
        shifted.append((kernel, shift + bias * after.weight / torch.sqrt(after.running_var + after.eps)))
    assert_folds_to(
        branches,
        [by_norm(large[0].weight, large[1]), by_norm(grown(small[0].weight, 3, 3), small[1]), *shifted],
    )


def test_dbb_leaves_out_what_a_depthwise_kernel_has_no_use_for() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    (branches,) = built(DBB(), layer)
    assert [len(branch) for branch in branches] == [2, 2, 5]
    assert branches[2][1].weight.shape == (8, 1, 1, 1) and branches[2][3].weight.shape == (4, 2, 3, 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_doconv_mixes_the_taps_of_every_input_channel(groups: int) -> None:
    layer = nn.Conv2d(4, 6, (3, 2), groups=groups).double()
    block = randomised(built(DOConv(), layer))
    mixing = block[0][1].weight.reshape(groups, 4 // groups, 6, 6)  # (g, c, from tap, to tap)
    mixing = mixing + torch.eye(6, dtype=torch.float64)
    weight = block[1].weight.reshape(groups, 6 // groups, 4 // groups, 6)
    expected = torch.einsum("gcst,gocs->goct", mixing, weight).reshape(6, 4 // groups, 3, 2)
    assert_same(fold(block).weight, expected, rel=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_orepa_is_one_kernel_of_six_scaled_branches(groups: int) -> None:
    layer = nn.Conv2d(16, 8, 3, padding=1, groups=groups, bias=False).double()
    (branches,) = randomised(built(OREPA(), layer, init="kaiming"))
    origin, average, prior, small, double, separable = (list(branch) for branch in branches)
    inner, outs = 16 // groups, 8 // groups
    waves = torch.empty(8, 3, 3, dtype=torch.float64)
    for i in range(8):
        for h in range(3):
            for w in range(3):
                place, order = (h, i + 1) if i < 4 else (w, i + 1 - 4)
                waves[i, h, w] = math.cos(math.pi * (place + 0.5) * order / 3)
    if groups > 4:
        conv, copies = double[0]
        first = conv.weight.reshape(groups, inner, 2, inner).clone()
        first = first + torch.eye(inner, dtype=torch.float64).unsqueeze(1)
        assert copies(torch.arange(16.0).reshape(1, 16, 1, 1)).flatten()[:4].tolist() == [0, 0, 1, 1]
    else:
        first = double[0][0].weight + dirac(16, groups)
    first = first.reshape(groups, -1, inner)
    second = double[1].weight.reshape(groups, outs, -1, 3, 3)
    dw = separable[0].weight.reshape(groups, inner, 8, 3, 3)
    pw = separable[1].weight.reshape(groups, outs, inner, 8)
    weights = [
        origin[0].weight,
        average[0].weight * torch.full((3, 3), 1 / 9, dtype=torch.float64),
        prior[0].weight * waves.unsqueeze(1),
        grown(small[0].weight, 3, 3),
        torch.einsum("gti,gothw->goihw", first, second).reshape(8, inner, 3, 3),
        torch.einsum("gcehw,goce->gochw", dw, pw).reshape(8, inner, 3, 3),
    ]
    scales = [branch[-1].weight.reshape(-1, 1, 1, 1) for branch in branches]
    expected: Any = sum(s * w for s, w in zip(scales, weights, strict=True))
    assert_same(fold(branches).weight, expected, rel=1e-12)
