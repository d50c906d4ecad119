"""A model on a GPU: what is computed of it is right, and stays there. ``pytest -m gpu`` on a CUDA device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand import (
    DBB,
    OREPA,
    ACNet,
    Chain,
    DOConv,
    ExpandNetCK,
    ExpandNetCL,
    MobileOne,
    Recipe,
    RepVGG,
    TrainedRankPruning,
    accumulate,
    count_flops,
    expand,
    factorize,
    fuse,
    fused_state_dict,
    param_groups,
    rank_report,
    report,
)
from tests.block_table import BLOCKS
from tests.compare import assert_same
from tests.networks import ConvNet, Language, perturb, train_steps

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
EXACT = 1e-10

RECIPES: dict[str, Recipe] = {
    "chain": Chain(),
    "chain with norms": Chain(depth=3, width=1, batch_norm=True),
    "chain with a residual": Chain(depth=4, residual=2),
    "expandnet-cl": ExpandNetCL(),
    "expandnet-ck": ExpandNetCK(),
    "repvgg": RepVGG(),
    "mobileone": MobileOne(),
    "acnet": ACNet(),
    "dbb": DBB(),
    "do-conv": DOConv(),
    "orepa": OREPA(),
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutions": (ConvNet, lambda: torch.randn(3, 3, 12, 10, dtype=torch.float64)),
    "language": (Language, lambda: torch.randint(0, 11, (2, 5))),
}


def there(model: nn.Module) -> nn.Module:
    """A copy of it on the GPU."""
    return copy.deepcopy(model).to(DEVICE)


def assert_there(model: nn.Module) -> None:
    """Every parameter and buffer is on the GPU."""
    where = {name: t.device for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert set(where.values()) <= {DEVICE}, where


@pytest.mark.parametrize("name", BLOCKS)
def test_fuse(name: str) -> None:
    model = perturb(BLOCKS[name].make().double()).eval()
    x = torch.randn(BLOCKS[name].shape, dtype=torch.float64)
    for inputs in ((), (x.to(DEVICE),)):
        fused = fuse(there(model), inputs or None)
        assert_there(fused)
        assert_same(fused(x.to(DEVICE)), model(x), EXACT)
        assert report(fused).summary == report(fuse(model, (x,) if inputs else None)).summary


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_expand_train_and_fuse(network: str, recipe: str) -> None:
    make, given = NETWORKS[network]
    model, x = perturb(make().double()), given()
    expanded = expand(there(model.eval()), RECIPES[recipe], generator=torch.Generator().manual_seed(0))
    assert_there(expanded)
    assert_same(expanded(x.to(DEVICE)), model(x), EXACT)
    here = expand(model, RECIPES[recipe], generator=torch.Generator().manual_seed(0))
    losses = train_steps(expanded.train(), x.to(DEVICE))
    assert losses == pytest.approx(train_steps(here.train(), x), rel=1e-6)
    trained = expanded.eval()(x.to(DEVICE))
    weights = fused_state_dict(expanded)
    assert {weight.device for weight in weights.values()} == {DEVICE}
    for scope in ("expanded", "all"):
        fused = fuse(expanded, scope=scope)
        assert_there(fused)
        assert_same(fused(x.to(DEVICE)), trained, EXACT)
    plain = fuse(expanded, scope="expanded").state_dict()
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weight, plain[name]) for name, weight in weights.items())


@pytest.mark.parametrize("network", NETWORKS)
def test_an_original_checkpoint_loads(network: str) -> None:
    make, given = NETWORKS[network]
    model, x = perturb(make().double()).eval(), given()
    expanded = expand(there(make().double().eval()))
    expanded.load_state_dict(model.state_dict())  # tensors of the CPU
    assert_there(expanded)
    assert_same(expanded(x.to(DEVICE)), model(x), EXACT)


@pytest.mark.parametrize("init", ["preserve", "matched", "kaiming"])
def test_a_generator_of_the_gpu(init: Any) -> None:
    model = ConvNet().to(DEVICE)
    one, two = (expand(model, init=init, generator=torch.Generator(DEVICE).manual_seed(3)) for _ in range(2))
    assert_there(one)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_accumulate_is_the_plain_loop() -> None:
    model = expand(ConvNet().double().to(DEVICE))
    x = torch.randn(8, 3, 12, 10, dtype=torch.float64, device=DEVICE)
    other = copy.deepcopy(model)
    with accumulate(model):
        for part in x.chunk(4):
            model(part).square().mean().backward()
    for part in x.chunk(4):
        other(part).square().mean().backward()
    twins = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        expected = twins[name].grad
        assert parameter.grad is not None and expected is not None
        assert_same(parameter.grad, expected, 1e-9)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "options",
    [
        {"energy": 0.9},
        {"params": 0.96},
        {"energy": 0.9, "method": "lp", "p": 1.0},
        {"params": 0.96, "calibration": True},
    ],
)
def test_factorize(network: str, options: dict[str, Any]) -> None:
    make, given = NETWORKS[network]
    model, x = perturb(make().double()).eval(), given()
    here, device = dict(options), dict(options)
    if options.get("calibration"):
        here["calibration"], device["calibration"] = [(x,)], [(x.to(DEVICE),)]
    small = factorize(there(model), (x.to(DEVICE),), **device)
    assert_there(small)
    assert_same(small(x.to(DEVICE)), factorize(model, (x,), **here)(x), 1e-6)
    assert_same(fuse(small, scope="expanded")(x.to(DEVICE)), small(x.to(DEVICE)), EXACT)


def test_measures() -> None:
    model, x = perturb(ConvNet().double()).eval(), torch.randn(3, 3, 12, 10, dtype=torch.float64)
    assert count_flops(there(model), x.to(DEVICE)).total == count_flops(model, x).total
    ours, expected = (rank_report(*pair).to_dict() for pair in ((there(model), x.to(DEVICE)), (model, x)))
    for part in ("weights", "features"):
        assert len(ours[part]) == len(expected[part]) > 0
        for row, twin in zip(ours[part], expected[part], strict=True):
            for key, value in twin.items():
                wanted = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
                assert row[key] == wanted, key


def test_trained_rank_pruning_and_weight_decay() -> None:
    x = torch.randn(3, 3, 12, 10, device=DEVICE)
    model, expanded = ConvNet().to(DEVICE), expand(ConvNet().to(DEVICE))
    groups = param_groups(expanded, weight_decay=0.1, on="effective")
    assert {p.device for group in groups for p in group["params"]} == {DEVICE}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruning = TrainedRankPruning(model, every=1, exclude=()).attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    pruning.finish()
    assert_there(model)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
