"""``param_groups``: every parameter once, and a decay that does what is said of it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand import Chain, expand, fused_state_dict
from fxexpand.errors import InexactError, SelectionError
from fxexpand.layers.param_groups import DECAYED, param_groups
from fxexpand.recipes import ACNet, DOConv, Recipe, RepVGG
from tests.compare import assert_same
from tests.networks import ConvNet, Language, perturb

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda groups, lr: torch.optim.SGD(groups, lr=lr),
    "AdamW": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
}


def decay_only(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Tensor]:
    """The effective weights after steps with gradients of zero."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return fused_state_dict(model)


@pytest.mark.parametrize("recipe", [Chain(2, 1), Chain(4, 1.5), Chain(1, 1)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [ConvNet, Language])
def test_effective_decay_is_that_of_the_original_network(make: Any, name: str, recipe: Chain) -> None:
    original = perturb(make()).double()
    big = expand(original, recipe)
    lr, decay, steps = 0.1, 0.02, 5
    plain = OPTIMIZERS[name](param_groups(original, decay), lr)
    ours = OPTIMIZERS[name](param_groups(big, decay, on="effective"), lr)
    before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    expected = decay_only(original, plain, steps)
    actual = decay_only(big, ours, steps)
    for key, tensor in actual.items():
        assert_same(tensor, expected[key], rel=steps * (lr * decay) ** 2)
        if before[key].ndim >= 2:
            assert_same(expected[key], before[key] * (1 - lr * decay) ** steps, rel=1e-12)
        else:
            assert torch.equal(tensor, before[key]), "biases and norms do not decay"


@pytest.mark.parametrize("depth", [2, 3])
def test_factor_decay_is_as_many_times_faster(depth: int) -> None:
    big: Any = expand(nn.Sequential(nn.Linear(4, 3).double()), Chain(depth, 1))
    before = big[0].weight.detach()
    groups = param_groups(big, 0.02)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.02]
    after = decay_only(big, torch.optim.SGD(groups, lr=0.1), 4)
    assert_same(after["0.weight"], before * (1 - 0.002) ** (4 * depth), rel=1e-12)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_least_factor_penalty_is_a_quasi_norm_of_the_product(depth: int) -> None:
    """As documented: ``1/2 Σ ||W_i||² >= d/2 Σ σ_j^(2/d)``, with equality for balanced factors."""
    weight = torch.randn(4, 5, dtype=torch.float64)
    layer = nn.Linear(5, 4, bias=False).double()
    layer.weight.data = weight
    big = expand(layer, Chain(depth, 1))
    values = torch.linalg.svdvals(weight)
    least = depth / 2 * values.pow(2 / depth).sum()
    assert_same(sum(p.detach().square().sum() for p in big.parameters()) / 2 + 0 * least, least, rel=1e-9)


def test_a_skip_around_everything_is_refused() -> None:
    model = expand(nn.Sequential(nn.Linear(6, 6)), Chain(4, 1, residual=2))
    with pytest.raises(InexactError, match=r"0: multiplying the factors .* a skip"):
        param_groups(model, 0.1, on="effective")


@pytest.mark.parametrize(
    "recipe, shares",
    [
        (Chain(3, 1), [1 / 3] * 3),
        (DOConv(), [0.0, 1.0]),
        (Chain(3, 1, residual=2), [0.5, 0.5, 0.0]),  # the skip is around the last factor
    ],
    ids=str,
)
def test_shares(recipe: Recipe, shares: list[float]) -> None:
    model = expand(nn.Conv2d(6, 8, 3, padding=1, bias=False).double(), recipe)
    groups = param_groups(model, 0.1, on="effective")
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    given = [decays[id(p)] for p in model.parameters()]
    assert all(math.isclose(a, 0.1 * b) for a, b in zip(given, shares, strict=True))
    weight = copy.deepcopy(model).weight.detach()
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert_same(decay_only(model, optimizer, 1)["weight"], weight * (1 - 0.01), rel=1e-4)


def test_each_parameter_is_in_one_group() -> None:
    model: Any = expand(perturb(Language()))
    model.position.requires_grad_(False)
    for on in DECAYED:
        groups = param_groups(model, 0.01, on=on)
        listed = [id(p) for group in groups for p in group["params"]]
        assert len(listed) == len(set(listed))
        assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
        decays = [group["weight_decay"] for group in groups]
        assert len(decays) == len(set(decays))
    everything = param_groups(model, 0.01, decay_vectors=True)
    assert [group["weight_decay"] for group in everything] == [0.01]


def test_a_batch_norm_inside_is_refused() -> None:
    for recipe in (Chain(2, 1, batch_norm=True), RepVGG(), ACNet()):
        model = expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), recipe)
        assert len(param_groups(model, 0.1)) == 2
        with pytest.raises(InexactError, match="0: a BatchNorm inside"):
            param_groups(model, 0.1, on="effective")


def test_values_out_of_range() -> None:
    with pytest.raises(SelectionError, match="on='product'"):
        param_groups(nn.Linear(2, 2), 0.1, on="product")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="weight_decay=-1"):
        param_groups(nn.Linear(2, 2), -1)
