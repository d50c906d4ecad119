"""Weights that hooks compute before each call: legacy weight_norm and spectral_norm, pruning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxexpand
from tests.compare import assert_same
from tests.networks import perturb

EXACT = 1e-12


def conv_with(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates some, but checkpoints have them
        return nn.Sequential(change(nn.Conv2d(3, 5, 3, 2, 1)), nn.BatchNorm2d(5))


def pruned(conv: nn.Module, *names: str) -> nn.Module:
    for name in names:
        prune.random_unstructured(conv, name, 0.5)  # type: ignore[no-untyped-call]
    return conv


HOOKED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: conv_with(nn.utils.weight_norm),
    "spectral norm": lambda: conv_with(nn.utils.spectral_norm),
    "pruned": lambda: conv_with(lambda conv: pruned(conv, "weight")),
    "pruned twice": lambda: conv_with(lambda conv: pruned(conv, "weight", "bias", "weight")),
}


@pytest.mark.parametrize("name", HOOKED)
def test_weights_that_hooks_compute_are_folded(name: str) -> None:
    model: Any = perturb(HOOKED[name]().double()).eval()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    expected, keys = model(x), list(model.state_dict())
    alone, both = fxexpand.fuse(nn.Sequential(model[0])), fxexpand.fuse(model)
    assert_same(alone(x), model[0](x), EXACT)
    assert_same(both(x), expected, EXACT)
    assert set(alone.state_dict()) == set(both.state_dict()) == {"0.weight", "0.bias"}
    assert list(model.state_dict()) == keys
    assert_same(model(x), expected, EXACT)


def test_a_spectral_norm_in_training_mode_is_refused() -> None:
    model = HOOKED["spectral norm"]().train()
    result = fxexpand.fuse(model)
    assert any("spectral norm" in row.reason for row in fxexpand.report(result).refusals)


def test_a_weight_hook_beside_another_hook_is_refused() -> None:
    model: Any = HOOKED["weight norm"]().eval()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(2, 3, 7, 6)
    result = fxexpand.fuse(model)
    assert_same(result(x), model(x), 1e-6)
    assert any("hook" in row.reason for row in fxexpand.report(result).refusals)
