"""Training expanded networks with torch's own tools: the products against the chain run on activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxexpand.layers.accumulation import accumulate
from fxexpand.recipes import DBB, OREPA, Chain, DOConv, ExpandNetCK, Recipe
from fxexpand.surgery.expand import expand
from fxexpand.surgery.fold import fused_state_dict
from fxexpand.surgery.fuse import fuse
from tests.compare import assert_different, assert_same
from tests.networks import ConvNet, Language, perturb

IMAGES = torch.randn(6, 3, 10, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(2))
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
}


def pair(recipe: Recipe = Chain(3, 2), **options: Any) -> tuple[nn.Module, nn.Module]:  # noqa: B008
    """One network twice: its products multiplied first, and its factors run on activations."""
    network = perturb(ConvNet()).double()
    torch.manual_seed(7)
    products = expand(network, recipe, form="collapsed", **options)
    chain = copy.deepcopy(products)
    for module in chain.modules():
        if hasattr(module, "form"):
            module.form = "chain"  # type: ignore[assignment]
    return products.train(), chain.train()


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor, clip: float = 0.0
) -> list[float]:
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(x) - 1.0).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        losses.append(float(loss.detach()))
        return loss

    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[arg-type]
    return losses


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=fn, use_buffers=True)


def assert_same_networks(one: nn.Module, two: nn.Module, rel: float) -> None:
    expected = two.state_dict()
    for name, value in one.state_dict().items():
        if value.is_floating_point():
            assert_same(value, expected[name], rel)


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_the_steps_it_takes_on_the_chain(name: str, clip: float) -> None:
    products, chain = pair()
    before = copy.deepcopy(products.state_dict())
    ours = trained(products, OPTIMIZERS[name](products.parameters()), 4, IMAGES, clip)
    theirs = trained(chain, OPTIMIZERS[name](chain.parameters()), 4, IMAGES, clip)
    assert len(ours) == len(theirs) and ours[-1] < ours[0]
    assert all(abs(a - b) < 1e-9 * abs(b) for a, b in zip(ours, theirs, strict=True))
    assert_same_networks(products, chain, rel=1e-7)
    key = next(key for key in before if "expansion" in key)
    assert_different(products.state_dict()[key], before[key], rel=1e-4)


@pytest.mark.parametrize("recipe", [OREPA(), ExpandNetCK(), DOConv()], ids=str)
def test_other_recipes_too(recipe: Recipe) -> None:
    products, chain = pair(recipe)
    ours = trained(products, OPTIMIZERS["AdamW"](products.parameters()), 3, IMAGES)
    theirs = trained(chain, OPTIMIZERS["AdamW"](chain.parameters()), 3, IMAGES)
    assert all(abs(a - b) < 1e-9 * abs(b) for a, b in zip(ours, theirs, strict=True))
    assert_same_networks(products, chain, rel=1e-7)


def test_clipping_sees_the_norm_of_the_gradients_of_the_factors() -> None:
    products, chain = pair()
    norms = []
    for model in (products, chain):
        model(IMAGES).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        by_hand = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert float(norm) > 1e-3 and abs(float(by_hand) - 1e-3) < 1e-8  # torch divides by norm + 1e-6
        norms.append(norm)
    assert_same(norms[0], norms[1], rel=1e-12)


@pytest.mark.parametrize("init", ["preserve", "matched", "kaiming"])
def test_a_seed_settles_everything(init: Any) -> None:
    def once(seed: int) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = expand(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(0.3), nn.Conv2d(6, 4, 3)), init=init,
                       generator=generator)  # fmt: skip
        losses = trained(model, torch.optim.AdamW(model.parameters(), 1e-2), 4, IMAGES.float())
        return losses, fused_state_dict(model)

    (one, weights), (two, again), (other, _) = once(1), once(1), once(2)
    assert one == two != other
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_loss_scaling_skips_a_step_that_overflows_and_finds_its_scale() -> None:
    products, _ = pair()
    model = products.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before, skipped, losses = fused_state_dict(model), 0, []
    for _ in range(45):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (model(IMAGES.float()).float() - 1.0).square().mean()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
        if scaler.get_scale() < scale:
            skipped += 1
            if skipped == len(losses):  # none was taken yet
                assert all(
                    torch.equal(v, fused_state_dict(model)[k]) for k, v in before.items() if "weight" in k
                )
    assert 1 <= skipped < 40 and losses[-1] < 0.5 * losses[0]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_half_precision_leaves_the_products_in_single_precision() -> None:
    """The product is formed in float32: gradients under autocast are off by the one rounding of the layer."""
    products, _ = pair(Chain(5, 2))
    exact = copy.deepcopy(products)
    model = products.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IMAGES.float()).float().square().mean()
    loss.backward()
    exact(IMAGES).square().mean().backward()
    layer: Any = model.head
    twin: Any = exact.head
    assert layer.weight.dtype == torch.float32
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == torch.float32
        assert_same(ours.grad.double(), theirs.grad, rel=0.05)


@pytest.mark.parametrize(("make", "x"), [(ConvNet, IMAGES), (Language, TOKENS)], ids=["layers", "weights"])
def test_a_moving_average_is_that_of_the_factors_and_fuses(make: Any, x: Tensor) -> None:
    model = expand(perturb(make()).double()).train()
    average = averaged(model, 0.7)
    by_hand: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(4):
        trained(model, optimizer, 1, x)
        average.update_parameters(model)
        for name, value in model.named_parameters():
            old = by_hand.get(name, value.detach())
            by_hand[name] = 0.7 * old + 0.3 * value.detach()
    for name, value in average.module.named_parameters():
        assert_same(value.detach(), by_hand[name], rel=1e-12)
    average.eval()
    fused = fuse(average.module, scope="expanded")
    assert_same(fused(x), average(x), rel=1e-10)
    assert_different(fused(x), fuse(model.eval(), scope="expanded")(x), rel=1e-5)
    assert type(fused) is make and list(fused.state_dict()) == list(make().state_dict())


def test_batch_norm_inside_trains_and_the_average_of_it_fuses() -> None:
    model: Any = expand(perturb(ConvNet()).double(), DBB(), select="stem").train()
    average = averaged(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        trained(model, optimizer, 1, IMAGES)
        average.update_parameters(model)
    average.eval()
    assert_same(fuse(average.module, scope="expanded")(IMAGES), average(IMAGES), rel=1e-10)


def test_accumulation_with_clipping_and_momentum() -> None:
    products, chain = pair()
    for model in (products, chain):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # it would see the micro-batches
    optimizer = OPTIMIZERS["SGD"](products.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        with accumulate(products, 3):
            for x in IMAGES.chunk(3):
                ((products(x) - 1.0).square().mean() / 3).backward()
        nn.utils.clip_grad_norm_(products.parameters(), 0.05)
        optimizer.step()
    trained(chain, OPTIMIZERS["SGD"](chain.parameters()), 3, IMAGES, clip=0.05)
    assert_same_networks(products, chain, rel=1e-9)
