"""The training-time blocks against the formulas of their papers, without code of fxexpand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.block_table import BLOCKS, K, built
from tests.compare import assert_different, assert_same

EXACT = 1e-10  # relative, in float64
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def each(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * rank


@torch.no_grad()
def probed(model: nn.Module, x: Tensor, one: K) -> tuple[Tensor, Tensor]:
    """Weight (out, in, *k) and bias of ``model``: what it makes, away from the border, of unit impulses."""
    rank = len(one.size)
    if rank == 0:
        units = torch.eye(x.shape[-1], dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 2), x.shape[-1])
        bias = model(torch.zeros_like(units[:1])).flatten()
        return (model(units).flatten(1) - bias).T, bias
    padding, channels = each(one.padding, rank), x.shape[1]
    place = [math.ceil(side / one.stride) for side in padding]
    sides: list[int] = []
    for m, before, k, n in zip(place, padding, one.size, x.shape[2:], strict=True):
        start = m * one.stride - before
        sides = [start, n - start - k, *sides]
    count = channels * math.prod(one.size)
    units = F.pad(torch.eye(count, dtype=x.dtype).reshape(count, channels, *one.size), sides)
    at = (slice(None), slice(None), *place)
    bias = model(torch.zeros_like(units[:1]))[at][0]
    return (model(units)[at] - bias).T.reshape(-1, channels, *one.size), bias


def by_one_kernel(model: nn.Module, x: Tensor, one: K) -> Tensor:
    weight, bias = probed(model, x, one)
    if not one.size:
        return F.linear(x, weight, bias)
    rows, columns = weight.shape[0] // one.groups, weight.shape[1] // one.groups
    for g in range(one.groups):  # what other groups contribute is nothing
        others = weight[g * rows : (g + 1) * rows].clone()
        others[:, g * columns : (g + 1) * columns] = 0
        assert float(others.abs().max()) <= EXACT
    return CONVOLUTIONS[len(one.size)](x, weight, bias, one.stride, each(one.padding, len(one.size)))


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if block.one])
def test_a_block_is_the_one_kernel_of_the_table_or_has_another_border(name: str) -> None:
    (model, x), one = built(name), BLOCKS[name].one
    assert one is not None
    if BLOCKS[name].refused:
        assert_different(by_one_kernel(model, x, one), model(x), 1e-2)
    else:
        assert_same(by_one_kernel(model, x, one), model(x), EXACT)


Folded = tuple[Tensor, Tensor]


def with_norm(weight: Tensor, norm: Any, bias: Tensor | float = 0.0) -> Folded:
    """``K' = K γ / sqrt(σ² + ε)``, ``b' = β + (b − μ) γ / sqrt(σ² + ε)``."""
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * factor.reshape(-1, 1, 1, 1), norm.bias + (bias - norm.running_mean) * factor


def total(size: int, *terms: Folded) -> Folded:
    """The sum of kernels with equal centres."""
    padded = []
    for weight, _ in terms:
        high, wide = ((size - k) // 2 for k in weight.shape[2:])
        padded.append(F.pad(weight, [wide, wide, high, high]))
    return torch.stack(padded).sum(0), torch.stack([bias for _, bias in terms]).sum(0)


def chained(last: Folded, first: Folded) -> Folded:
    """1 x 1, then k x k; or k x k, then 1 x 1: one multiplication of matrices at each tap."""
    (weight, bias), (inner, inner_bias) = last, first
    product = torch.einsum("ohyx,hivu->oiyvxu", weight, inner).flatten(4, 5).flatten(2, 3)
    return product, weight.sum((2, 3)) @ inner_bias + bias


def dirac(channels: int, groups: int = 1) -> Tensor:
    return torch.eye(channels // groups, dtype=torch.float64).repeat(groups, 1)[:, :, None, None]


def repvgg(m: Any) -> Folded:
    skip = with_norm(dirac(len(m.skip.weight), m.dense[0].groups), m.skip)
    return total(3, with_norm(m.dense[0].weight, m.dense[1]), with_norm(m.point[0].weight, m.point[1]), skip)


def acnet(m: Any) -> Folded:
    return total(3, *(with_norm(part[0].weight, part[1]) for part in (m.square, m.row, m.column)))


def dbb(m: Any) -> Folded:
    average = dirac(5).expand(-1, -1, 3, 3) / 9
    return total(
        3,
        with_norm(m.origin[0].weight, m.origin[1]),
        with_norm(m.point[0].weight, m.point[1]),
        chained(with_norm(average, m.average[3]), with_norm(m.average[0].weight, m.average[1])),
        chained(with_norm(m.deep[2].weight, m.deep[3]), with_norm(m.deep[0].weight, m.deep[1])),
    )


def mobileone(m: Any) -> Folded:
    skip = with_norm(torch.ones(6, 1, 1, 1, dtype=torch.float64), m.skip)
    return total(3, skip, *(with_norm(part[0].weight, part[1]) for part in (*m.convs, m.scale)))


def repmixer(m: Any) -> Folded:
    (weight, bias), (less, shift) = mobileone(m.mixer), with_norm(torch.ones_like(m.gamma)[..., None], m.norm)
    scaled = m.gamma[..., None] * (weight - F.pad(less, [1] * 4))
    return total(3, (scaled, m.gamma.flatten() * (bias - shift)), (torch.ones_like(less), 0 * shift))


def doconv(m: Any) -> Folded:
    conv, norm = m
    weight = torch.empty(5, 3, 3, 3, dtype=torch.float64)
    for o in range(5):
        for c in range(3):
            weight[o, c] = ((conv.D[c] + torch.eye(9, dtype=torch.float64)) @ conv.W[o, c]).view(3, 3)
    return with_norm(weight, norm, conv.bias)


def expandnet(m: Any) -> Folded:
    first, second, third = ((conv.weight, conv.bias) for conv in m[:3])
    weight, bias = chained(third, chained(second, first))
    return with_norm(weight, m[3], bias)


FORMULAS: dict[str, Callable[[Any], Folded]] = {
    "repvgg": repvgg,
    "repvgg, groups": repvgg,
    "acnet": acnet,
    "dbb": dbb,
    "mobileone, depthwise": mobileone,
    "repmixer": repmixer,
    "do-conv": doconv,
    "expandnet-cl": expandnet,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_block_is_the_formula_of_its_paper(name: str) -> None:
    model, x = built(name)
    one = BLOCKS[name].one
    assert one is not None
    weight, bias = FORMULAS[name](model)
    assert_same(F.conv2d(x, weight, bias, one.stride, each(one.padding, 2), 1, one.groups), model(x), EXACT)


@pytest.mark.parametrize("name", ["orepa", "sesr"])
def test_a_collapsed_block_is_the_block_it_collapses(name: str) -> None:
    (model, x), (collapsed, _) = built(name), built(f"{name}, collapsed")
    collapsed.load_state_dict(model.state_dict())
    assert_same(collapsed(x), model(x), EXACT)
