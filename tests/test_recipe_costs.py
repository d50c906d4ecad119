"""What blocks cost: per position on activations, and their width where a layer is lopsided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training.training_steps import CPU, Steps
from fxexpand import Chain, ExpandNetCL, ExpandNetFC, expand
from fxexpand.kernel.modules import kernel_of
from fxexpand.recipes import DBB, OREPA, ACNet, DOConv, Recipe, RepVGG
from fxexpand.recipes.structure import chain_macs

RECIPES: list[Recipe] = [Chain(3, 2), DOConv(), OREPA(), RepVGG(), ACNet(), DBB(), ExpandNetCL(2)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_work_on_activations_is_counted(recipe: Recipe, stride: int) -> None:
    """Where nothing is at the border: parts in front of a stride see the square of it more positions."""
    layer = nn.Conv2d(4, 6, 3, stride=stride, padding=1)
    block = recipe.build(kernel_of(layer)).eval()
    positions = (40 // stride) ** 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(torch.randn(1, 4, 40, 40))
    counted = counter.get_total_flops() / 2 / positions
    assert chain_macs(block) == pytest.approx(counted, rel=0.1 if isinstance(recipe, DBB) else 1e-9)


def test_auto_collapses_where_fixed_parts_are_dear() -> None:
    big: Any = expand(nn.Conv2d(4, 4, 3, padding=1, bias=False), DOConv())
    # 9 * 4 * (9 + 9) for the taps, 9 * 4 * 4 for W, less 9 * 4 * 4; the fold mixes 4 * 4 * 9 taps with 9.
    assert big.collapse_from == pytest.approx(4 * 4 * 9 * 9 / (9 * 4 * 18))


@pytest.mark.parametrize("sizes", [(768, 50_000), (50_000, 768)])
def test_the_head_of_a_language_model_stays_of_a_size(sizes: tuple[int, int]) -> None:
    with torch.device("meta"):
        kernel = kernel_of(nn.Linear(*sizes))
    widths = [factor.out_channels for factor in ExpandNetFC(2).factors(kernel)]
    assert max(widths[:-1]) == 2 * 4 * 768 and min(widths[:-1]) == 2 * 768
    small = ExpandNetFC(2).factors(kernel_of(nn.Linear(6, 4)))
    assert [factor.out_channels for factor in small] == [12, 8, 4]
    lopsided = ExpandNetFC(2).build(kernel_of(nn.Linear(3, 40)))
    assert [part.out_features for part in lopsided] == [6, 24, 40]


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("width", [1, 3])
def test_what_auto_keeps_between_factors_is_less_than_the_factors(depth: int, width: float) -> None:
    original = nn.Linear(40, 40, bias=False)
    big = expand(original, Chain(depth, width), init="kaiming")
    between = 4 * sum(factor.numel() for factor in list(big.parameters())[1:])
    seen = set()
    for positions in (1, 10, 39, 60, 100, 1000):
        x = torch.randn(positions, 40)
        ours, theirs = (Steps(model, x, None, CPU).kept()[0] for model in (big, original))
        assert 0 <= ours - theirs <= between
        seen.add(ours > theirs)
    assert seen == {True, False}, "nothing is kept where one product is formed"
