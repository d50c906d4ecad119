"""``accumulate``: one product for many micro-batches, and the results of the plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fxexpand import Chain, expand, fuse
from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.layers.accumulation import accumulate
from fxexpand.layers.expanded import Expanded
from fxexpand.layers.parametrized import _KEPT, expanded_weights, originals
from fxexpand.recipes import Recipe
from tests.compare import assert_same
from tests.networks import ConvNet, Language, perturb

IMAGES = [torch.randn(2, 3, 10, 7, generator=torch.Generator().manual_seed(i)) for i in range(3)]
TOKENS = [torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(i)) for i in range(3)]
MODELS: dict[str, tuple[Callable[[], Any], list[Tensor]]] = {
    "convolutions": (ConvNet, IMAGES),
    "weight space": (Language, TOKENS),
}


def built(name: str, dtype: torch.dtype, **options: Any) -> tuple[Any, list[Tensor]]:
    make, batches = MODELS[name]
    big = expand(perturb(make()).to(dtype), **options)
    return big.train(), [x.to(dtype) if x.is_floating_point() else x for x in batches]


def loop(model: nn.Module, batches: list[Tensor], around: Any, scale: float = 1.0) -> list[float]:
    """Backward on every micro-batch, inside the context."""
    losses = []
    with around:
        for x in batches:
            loss = model(x).square().mean()
            (scale * loss).backward()
            losses.append(float(loss.detach()))
    return losses


def assert_same_gradients(one: nn.Module, two: nn.Module, rel: float) -> None:
    other = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        expected = other[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if parameter.grad is not None and expected is not None:
            assert bool(expected.abs().sum() > 0) or not bool(parameter.grad.abs().sum() > 0), name
            assert_same(parameter.grad, expected, rel)


@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("form", ["auto", "collapsed"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_plain_loop(
    name: str, form: Any, dtype: torch.dtype, rel: float
) -> None:
    model, batches = built(name, dtype, form=form)
    plain = copy.deepcopy(model)
    for _ in range(2):  # the second step starts from other factors
        ours = loop(model, batches, accumulate(model, batches=len(batches)))
        theirs = loop(plain, batches, nullcontext())
        for a, b in zip(ours, theirs, strict=True):
            assert abs(a - b) <= rel * abs(b)
        assert_same_gradients(model, plain, rel)
        for network in (model, plain):
            optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
            optimizer.step()
            optimizer.zero_grad()
    for (key, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        if a.is_floating_point():
            assert_same(a, b, 10 * rel)
        else:
            assert torch.equal(a, b), key


def products(model: nn.Module, batches: list[Tensor], around: Any) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        loop(model, batches, around)
    return int(counter.get_total_flops())


def test_products_are_formed_once() -> None:
    model = expand(nn.Sequential(nn.Conv2d(8, 8, 3, bias=False)), Chain(3, 2), form="collapsed")
    x = torch.randn(1, 8, 4, 4)
    once, *_ = [products(model, [x] * n, nullcontext()) for n in (1, 4)]
    four = products(model, [x] * 4, nullcontext())
    shared = products(model, [x] * 4, accumulate(model))
    convolution = 2 * (4 * 72 * 8) * 2  # forward, and backward for the weight: the input needs no gradient
    assert four == 4 * once
    assert shared == once + 3 * convolution


def test_the_number_of_batches_decides_the_form() -> None:
    model = expand(nn.Sequential(nn.Conv2d(64, 64, 3, bias=False)), Chain(3, 1))
    layer: Any = model[0]
    x = torch.randn(1, 64, 14, 14)  # 144 positions; 10 * 64^3 / (2 * 64^2) = 320 pay off
    assert len(layer._plan(x)) > 1
    with accumulate(model, batches=4):
        assert layer._plan(x) == ((0, 3),)
        model(x).sum().backward()
        assert layer.expansion[0].weight.grad is None
    assert len(layer._plan(x)) > 1
    assert all(p.grad is not None for p in model.parameters())


def test_a_weight_is_formed_once_per_forward_of_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model: Any = expand(attention)
    [(_, parametrization, expansion), *_] = expanded_weights(model)
    factor = originals(parametrization)[0]
    formed: list[Tensor] = []
    original = expansion._product

    def noted(*factors: Tensor) -> Tensor:
        formed.append(original(*factors))
        return formed[-1]

    monkeypatch.setattr(expansion, "_product", noted)
    x = torch.randn(2, 3, 8)
    output = model(x, x, x)[0]
    assert len(formed) == 1
    output.sum().backward()
    with torch.no_grad():
        model(x, x, x)
    model(x, x, x)[0].sum().backward()
    assert len(formed) == 3 and expansion not in _KEPT.products
    before = model.in_proj_weight.detach()
    with torch.no_grad():
        factor.mul_(2.0)
    assert_same(model.in_proj_weight.detach(), 2.0 * before, rel=1e-6)
    with torch.no_grad():
        factor.mul_(0.5)
    assert_same(output, attention(x, x, x)[0], rel=1e-5)


def test_evaluation_inside_uses_the_products_and_leaves_no_trace() -> None:
    model, batches = built("convolutions", torch.float64)
    plain = copy.deepcopy(model)

    def evaluate(network: Any) -> list[Tensor]:
        network.eval()
        with torch.inference_mode():
            second = network(batches[1])
        with torch.no_grad():
            first = network(batches[0])
            assert not network.stem.weight.requires_grad
        network.train()
        return [first, second]

    with accumulate(model):
        before = evaluate(model)
        model(batches[0]).square().mean().backward()
        between = evaluate(model)
        model(batches[1]).square().mean().backward()
    expected_before = evaluate(plain)
    plain(batches[0]).square().mean().backward()
    expected_between = evaluate(plain)
    plain(batches[1]).square().mean().backward()
    for a, b in zip([*before, *between], [*expected_before, *expected_between], strict=True):
        assert not a.requires_grad
        assert_same(a, b, rel=1e-12)
    assert_same_gradients(model, plain, rel=1e-12)


def test_loss_scaling() -> None:
    model, batches = built("convolutions", torch.float32)
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for network, around in ((model, accumulate(model)), (plain, nullcontext())):
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
        with around:
            for x in batches:
                scaler.scale(network(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same(a.detach(), b.detach(), rel=1e-5)


def test_autocast_keeps_products_in_float32() -> None:
    model, batches = built("convolutions", torch.float32, form="collapsed")
    with torch.autocast("cpu", dtype=torch.bfloat16), accumulate(model):
        loss = model(batches[0]).float().square().mean()
        assert model.stem.weight.dtype == torch.float32
        loss.backward()
        assert model.stem.weight.grad is not None  # that of the product, which is a leaf here
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside(reentrant: bool) -> None:
    model, batches = built("convolutions", torch.float64)
    plain = copy.deepcopy(model)

    def saved(network: Any) -> Callable[[Tensor], Any]:
        return lambda x: checkpoint(network, x.requires_grad_(reentrant), use_reentrant=reentrant)

    with accumulate(model):
        for x in batches:
            saved(model)(x).square().mean().backward()
    for x in batches:
        saved(plain)(x).square().mean().backward()
    assert_same_gradients(model, plain, rel=1e-12)


@pytest.mark.parametrize("recipe", [Chain(2, 1, batch_norm=True), Chain(3, 1)])
def test_chains_go_on_as_they_are(recipe: Recipe) -> None:
    model, batches = built("convolutions", torch.float64, recipe=recipe, form="chain")
    plain = copy.deepcopy(model)
    loop(model, batches, accumulate(model))
    loop(plain, batches, nullcontext())
    assert_same_gradients(model, plain, rel=1e-12)


def test_an_error_inside_leaves_nothing_behind() -> None:
    model, batches = built("weight space", torch.float64)
    with pytest.raises(ZeroDivisionError), accumulate(model):
        model(batches[0]).square().mean().backward()
        raise ZeroDivisionError
    factors = [p for name, p in model.named_parameters() if "parametrizations" in name or "expansion" in name]
    assert factors and all(p.grad is None for p in factors)
    model.zero_grad()
    plain = copy.deepcopy(model)
    loop(model, batches, accumulate(model))
    loop(plain, batches, nullcontext())
    assert_same_gradients(model, plain, rel=1e-12)
    assert not any(m.product_cache for m in model.modules() if isinstance(m, Expanded))


def test_a_step_inside_is_an_error() -> None:
    model, batches = built("convolutions", torch.float64, form="collapsed")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FxExpandError, match="changed inside"), accumulate(model):
        model(batches[0]).square().mean().backward()
        model.stem.expansion[0].weight.grad = torch.ones_like(model.stem.expansion[0].weight)
        optimizer.step()


def test_wrong_use_is_refused() -> None:
    model, batches = built("convolutions", torch.float64)
    with pytest.raises(SelectionError, match="batches=0"), accumulate(model, batches=0):
        pass
    with accumulate(model):
        with pytest.raises(FxExpandError, match=r"stem: is accumulating already"), accumulate(model):
            pass
        loop(model, batches, nullcontext())
    assert all(p.grad is not None for p in model.parameters())
    with accumulate(nn.Linear(2, 2)):
        pass


def test_the_model_fuses_after_the_block() -> None:
    model, batches = built("weight space", torch.float64)
    loop(model, batches, accumulate(model))
    model.eval()
    assert_same(fuse(model, scope="expanded")(batches[0]), model(batches[0]), rel=1e-10)


@pytest.mark.slow
def test_compiled_models() -> None:
    model = expand(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), form="collapsed")
    plain = copy.deepcopy(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    batches = [x.narrow(3, 0, 7) for x in IMAGES]
    for _ in range(3):
        loop(compiled, batches, accumulate(model))
        assert all(getattr(m, "product_cache", None) is None for m in model.modules())
    for _ in range(3):
        loop(plain, batches, nullcontext())
    assert_same_gradients(model, plain, rel=1e-4)
