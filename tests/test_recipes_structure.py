"""The parts that blocks are made of, one by one, against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxexpand.kernel.algebra import Kernel, apply
from fxexpand.kernel.modules import kernel_of
from fxexpand.recipes import OREPA, Branches, DOConv, RepVGG, Scale, fold
from fxexpand.recipes.fixed import Average, Cosine, Pad, Taps
from fxexpand.recipes.structure import fold_cost, leaves
from tests.compare import assert_same


def test_the_cost_of_a_fold() -> None:
    kernel = kernel_of(nn.Conv2d(8, 4, 3, padding=1))
    do, orepa = DOConv().build(kernel), OREPA().build(kernel)
    assert fold_cost(do) == 4 * 8 * 9 * 9
    averages, double, separable = 2 * 4 * 8 * 9, 4 * 8 * 8 * 9, 4 * 8 * 8 * 9
    assert fold_cost(orepa) == averages + double + separable
    assert fold_cost(RepVGG().build(kernel)) == 0
    assert [type(leaf) for leaf in leaves(do)] == [nn.Conv2d, nn.Conv2d]


def test_structures_by_themselves() -> None:
    scale = Scale(torch.tensor([2.0, -3.0]), rank=1)
    x = torch.randn(2, 2, 5)
    expected = x * torch.tensor([2.0, -3.0])[:, None]
    assert_same(scale(x), expected, rel=1e-6)
    assert_same(apply(fold(scale), x), expected, rel=1e-6)
    first = nn.Sequential(scale, nn.Conv1d(2, 3, 1))
    assert_same(apply(fold(first), x), first(x), rel=1e-5)
    assert_same(apply(fold(Branches([scale, scale])), x), 2 * expected, rel=1e-6)
    assert "2" in repr(scale)
    before = x.clone()
    assert_same(Branches([nn.Identity(), scale])(x), before + expected, rel=1e-6)
    assert torch.equal(x, before), "the input is not written to"


def test_fixed_kernels() -> None:
    like = Kernel(torch.empty(1, 2, 3, 1, 5, dtype=torch.float64))
    ones = torch.ones(1, 2, 3, 1, 5, dtype=torch.float64)
    assert Average(like, 2)(ones).flatten().tolist() == pytest.approx([1.0, 1.0])
    x = torch.randn(2, 2, 4, 2, 7, dtype=torch.float64)
    taps = Taps(like, 2)(x).reshape(2, 2, 15, 2, 2, 3)
    for tap, (i, j) in enumerate((i, j) for i in range(3) for j in range(5)):
        assert torch.equal(taps[:, :, tap], x[:, :, i : i + 2, :, j : j + 3])
    for channels in (5, 6):  # half of them, that may be 2.5, along each of the two dimensions that have taps
        weight, half = Cosine(like, channels).taps(x), channels / 2
        for c, h, w in itertools.product(range(channels), range(3), range(5)):
            angle = (h + 0.5) * (c + 1) / 3 if c < half else (w + 0.5) * (c + 1 - half) / 5
            assert float(weight[c, 0, h, 0, w]) == pytest.approx(math.cos(math.pi * angle), abs=1e-12)
    padding = ((-1, 0), (2, 1), (0, -2))
    assert torch.equal(Pad(like, padding)(x), F.pad(x, (0, -2, 2, 1, -1, 0)))
    for fixed in (Average(like, 2), Taps(like, 2), Cosine(like, 2), Pad(like, padding)):
        assert not list(fixed.state_dict())
        assert_same(apply(fold(fixed), x.float()), fixed(x.float()), rel=1e-6)
        assert "2" in repr(fixed)
