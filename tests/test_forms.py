"""The forms of an expanded layer: same function, same gradients, the cheapest work, and no surprises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from fxexpand import Chain, expand
from fxexpand.errors import InexactError
from fxexpand.kernel.modules import kernel_of
from fxexpand.layers.expanded import _on_rows, _unfolds
from fxexpand.layers.products import MatrixChain, Plan, matrix_chain
from fxexpand.recipes import fold
from tests.compare import assert_different, assert_same

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear of sequences": (lambda: nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 5, padding=2, stride=2), (2, 3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 5), padding=(1, 0), stride=(1, 2), dilation=(2, 1)), (2, 3, 9, 8)),
    "conv2d pointwise": (lambda: nn.Conv2d(4, 6, 1, stride=2, bias=False), (2, 4, 5, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (2, 6, 5, 4)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 4)),
    "conv2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 6)),
    "conv2d same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 5, 6)),
    "conv2d unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (1, 2, 4, 3, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 5, 4, stride=2, padding=1), (2, 3, 6)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (2, 4, 3, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, bias=False), (1, 2, 2, 3, 2)),
}


def layer(name: str, form: Any, recipe: Chain, channels_last: bool = False) -> tuple[Any, Tensor]:
    make, shape = LAYERS[name]
    original = make().double()
    if channels_last:
        original = original.to(memory_format=torch.channels_last)
    model = expand(original, recipe, init="kaiming", form=form, generator=torch.Generator().manual_seed(1))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return model, x.requires_grad_()


def results(model: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of every parameter and of the input."""
    output = model(x)
    towards = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(3))
    return [output, *torch.autograd.grad((output * towards).sum(), [*model.parameters(), x])]


@pytest.mark.parametrize("recipe", [Chain(1, 1), Chain(2, 1), Chain(3, 2), Chain(4, 1.5)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_activation_chain(name: str, recipe: Chain) -> None:
    model, x = layer(name, "chain", recipe)
    expected = results(model, x)
    for form in ("collapsed", "auto"):
        model.form = form
        for actual, wanted in zip(results(model, x), expected, strict=True):
            assert_same(actual, wanted, rel=1e-9)
    with torch.no_grad():
        model.expansion[0].weight.mul_(1.001)
    assert_different(model(x), expected[0], rel=1e-9)


def _always(plan: Plan, x: Tensor) -> Plan:
    return plan


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_every_way_of_cutting_a_chain(name: str, channels_last: bool) -> None:
    if channels_last and len(LAYERS[name][1]) != 4:
        pytest.skip("channels-last is for images")
    model, x = layer(name, "chain", Chain(4, 1.5), channels_last)
    expected = results(model, x)
    if model.chain is None:
        assert "transposed" in name
        return
    for count in range(4):
        for cut in itertools.combinations(range(1, 4), count):
            way = tuple(itertools.pairwise((0, *cut, 4)))
            model._plan = partial(_always, way)
            for actual, wanted in zip(results(model, x), expected, strict=True):
                assert_same(actual, wanted, rel=1e-9)
    assert model.weight.is_contiguous(memory_format=torch.channels_last) or not channels_last
    assert_same(model.weight, fold(model.expansion).weight, rel=1e-12)


@pytest.mark.parametrize("name", ["conv2d", "conv2d pointwise"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_few_positions_run_as_matrices(name: str, channels_last: bool) -> None:
    model, x = layer(name, "chain", Chain(3, 40))
    x = x[:1, :, :5, :7].detach()
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    weights = [part.weight for part in model.expansion]
    assert _unfolds(model, x, weights[0]) and not _unfolds(model, x.repeat(99, 1, 1, 1), weights[0])
    expected = results(model, x)
    model._in_runs = lambda x, way: _on_rows(model, x, weights, model.bias)
    model._plan = lambda x: ((0, 1), (1, 2), (2, 3))
    actual = results(model, x)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b, rel=1e-9)
    assert actual[0].stride() == expected[0].stride()


def brute_force(sizes: tuple[int, ...], positions: int) -> float:
    """The fewest multiply-adds of ``W_d ... W_1 X`` over the ways that never widen X's products again."""

    def product(start: int, stop: int) -> int:
        if stop - start == 1:
            return 0
        return min(
            product(start, k) + product(k, stop) + sizes[start] * sizes[k] * sizes[stop]
            for k in range(start + 1, stop)
        )

    count = len(sizes) - 1
    return min(
        sum(product(a, b) + positions * sizes[a] * sizes[b] for a, b in itertools.pairwise((0, *cut, count)))
        for n in range(count)
        for cut in itertools.combinations(range(1, count), n)
    )


@pytest.mark.parametrize(
    "channels, recipe", [((6, 6), Chain(3, 1)), ((3, 7), Chain(4, 3)), ((9, 2), Chain(5, 2))]
)
def test_auto_takes_the_fewest_multiply_adds(channels: tuple[int, int], recipe: Chain) -> None:
    block = recipe.build(kernel_of(nn.Conv2d(*channels, 3, bias=False)))
    chain = matrix_chain(block)
    assert chain is not None
    seen = set()
    for positions in [*range(1, 60), 100, 200, 400, 1000]:
        way = chain.plan(positions)
        seen.add(way)
        assert cost(chain, block, way, positions) == brute_force(chain.sizes, positions)
    assert len(seen) >= 2 and chain.plan(10**6) == (chain.whole,)


def cost(chain: MatrixChain, block: nn.Sequential, way: Any, positions: int) -> int:
    """As torch's counter sees it."""
    counter = FlopCounterMode(display=False)
    weights = [part.get_parameter("weight") for part in block]
    x = torch.randn(chain.sizes[0], positions)
    with counter:
        for segment in way:
            x = chain.product(weights, segment).flatten(1) @ x
    return int(counter.get_total_flops()) // 2


def test_a_deep_chain_is_prepared_fast() -> None:
    block = Chain(24, 1).build(kernel_of(nn.Linear(4, 4, bias=False)))
    chain = matrix_chain(block)
    assert chain is not None and {len(way) for _, way in chain.plans} == {1, 24}
    weights = [part.get_parameter("weight") for part in block]
    assert_same(chain.product(weights, chain.whole), fold(block).weight, rel=1e-5)


def test_a_factor_that_somebody_changed_is_not_multiplied() -> None:
    model, x = layer("conv2d", "collapsed", Chain(2, 1))
    model.expansion[1] = nn.Sequential(model.expansion[1], nn.Tanh())
    with pytest.raises(InexactError, match="Tanh is not a known affine map"):
        model(x)


def test_memory_for_activations_does_not_grow_with_depth() -> None:
    def saved(recipe: Chain) -> int:
        model = expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False)), recipe, form="collapsed")
        kept: dict[int, Tensor] = {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(torch.randn(2, 4, 20, 20))
        assert output.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    image, product, middle = 2 * 4 * 400 * 4, 4 * 36 * 4, 4 * 4 * 4
    assert saved(Chain(2, 1)) == image + product
    assert saved(Chain(5, 1)) <= image + product + 3 * middle


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_the_same_in_every_form(optimizer: str) -> None:
    def trained(form: Any) -> list[Tensor]:
        torch.manual_seed(5)
        original = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(120, 4))
        model = expand(original.double(), Chain(3, 1.5), form=form)
        x, wanted = torch.randn(6, 3, 5, 4).double(), torch.randn(6, 4).double()
        step = OPTIMIZERS[optimizer](model.parameters())

        def closure() -> Any:
            step.zero_grad()
            loss: Any = (model(x) - wanted).square().mean()
            loss.backward()
            if optimizer != "LBFGS":  # its line search needs the gradients of the loss itself
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            return loss

        for _ in range(3):
            step.step(closure)
        return [p.detach() for p in model.parameters()]

    chain, collapsed, auto, again = (trained(form) for form in ("chain", "collapsed", "auto", "auto"))
    for a, b, c, d in zip(chain, collapsed, auto, again, strict=True):
        assert_same(b, a, rel=1e-8)
        assert_same(c, a, rel=1e-8)
        assert torch.equal(c, d), "a seed decides everything"


def test_autocast_runs_products_in_float32_and_the_layer_in_half() -> None:
    model = expand(nn.Conv2d(16, 16, 3, bias=False), Chain(4, 2), form="collapsed")
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.weight, fold_in_float32(model))
        half = model(x)
        half.float().square().mean().backward()
    assert half.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert_same(half.float(), model(x), rel=2e-2)


def fold_in_float32(model: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        weight: Tensor = model.weight
        return weight


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_serves_all_batch_sizes(dynamic: bool | None) -> None:
    """No more compilations than before surgery, although the sizes cross where auto changes its mind."""

    def compilations(model: Any) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled: Any = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
        for batch in (4, 8, 16, 2, 64, 256, 3, 5, 7):
            compiled(torch.randn(batch, 3, 6, 5)).sum().backward()
        return int(counter.frame_count)

    original = nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(64, 50)
    )
    big: Any = expand(original, Chain(3, 1))
    ways = {len(big[2]._plan(torch.randn(batch, 32, 4, 3))) for batch in (2, 256)}
    assert len(ways) == 2, "the sizes must cross a change of form, or this shows nothing"
    assert compilations(big) <= compilations(original)
