"""Channels-last stays channels-last, contiguous stays contiguous: whatever the first factor looks like."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand import Chain, ExpandNetCL, ExpandNetFC, expand, fuse
from fxexpand.kernel.lower import is_channels_last, laid_out_as
from fxexpand.recipes import OREPA, ACNet, DOConv, Recipe, RepVGG

LAST, PLAIN = torch.channels_last, torch.contiguous_format
LAYERS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "one tap": lambda: nn.Conv2d(4, 6, 1),
    "one channel": lambda: nn.Conv2d(1, 6, 3),
}
RECIPES: list[Recipe] = [Chain(3, 1), ExpandNetCL(2), ExpandNetFC(2), DOConv(), OREPA(), RepVGG(), ACNet()]
FITTING = [
    (layer, recipe)
    for layer, recipe in itertools.product(LAYERS, RECIPES)
    if (layer == "one tap" and isinstance(recipe, Chain | ExpandNetCL | ExpandNetFC))
    or (layer != "one tap" and not isinstance(recipe, ExpandNetFC))
]


@pytest.mark.parametrize("form", [LAST, PLAIN], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("layer, recipe", FITTING, ids=str)
def test_weights_and_outputs_keep_the_format(
    layer: str, recipe: Recipe, form: torch.memory_format, late: bool
) -> None:
    model = nn.Sequential(LAYERS[layer]()).eval()
    big: Any = expand(model if late else model.to(memory_format=form), recipe)
    if late:
        big, model = big.to(memory_format=form), model.to(memory_format=form)
    small: Any = fuse(big, scope="expanded")
    wanted = model[0].get_parameter("weight")
    assert big[0].weight.stride() == small[0].weight.stride() == wanted.stride()
    for x in (torch.randn(2, wanted.shape[1] * 6 if layer == "depthwise" else wanted.shape[1], 5, 5),):
        for shown in (x.contiguous(memory_format=LAST), x):
            with torch.no_grad():
                expected: Tensor = model(shown)
                assert big(shown).stride() == small(shown).stride() == expected.stride()


@pytest.mark.parametrize(
    "shape", [(6, 4, 3, 3), (6, 1, 3, 3), (6, 4, 1, 1), (6, 4, 1, 3), (6, 1, 3, 1), (6, 4, 1, 1, 1)]
)
def test_a_layout_is_told_by_strides(shape: tuple[int, ...]) -> None:
    form = LAST if len(shape) == 4 else torch.channels_last_3d
    plain = torch.randn(shape)
    last = torch.empty(shape, memory_format=form).copy_(plain)
    assert is_channels_last(last) and not is_channels_last(plain)
    for weight, like in itertools.product((plain, last), repeat=2):
        result = laid_out_as(weight, like)
        assert result.stride() == like.stride() and torch.equal(result, plain)
        assert (result is weight) == (weight is like)
    crooked = plain.transpose(0, 1).clone().transpose(0, 1)
    assert laid_out_as(crooked, plain).stride() == plain.stride()
    assert not is_channels_last(torch.randn(3, 1, 1, 1))
