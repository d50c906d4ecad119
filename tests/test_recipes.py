"""Chains: the same function as the kernel they replace, the right sizes, and a start that trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError, SelectionError
from fxexpand.kernel.algebra import apply
from fxexpand.kernel.modules import kernel_of
from fxexpand.recipes import Chain, Skip, fold
from fxexpand.recipes.factors import balanced_factors, gram
from tests.compare import assert_different, assert_same, relative_error

LAYERS: dict[str, Callable[[], Any]] = {
    "linear tall": lambda: nn.Linear(5, 11),
    "linear wide": lambda: nn.Linear(11, 5, bias=False),
    "linear to one": lambda: nn.Linear(7, 1),
    "conv1d": lambda: nn.Conv1d(3, 8, 5, padding=2, stride=2),
    "conv2d": lambda: nn.Conv2d(3, 8, (3, 5), padding=(1, 0), stride=(1, 2), dilation=(2, 1)),
    "conv2d grouped": lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3),
    "conv2d depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
    "conv2d multiplier": lambda: nn.Conv2d(4, 12, 3, groups=4),
    "conv2d same": lambda: nn.Conv2d(3, 4, (2, 4), padding="same"),
    "conv2d reflect": lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"),
    "conv2d circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)),
    "transposed 1d": lambda: nn.ConvTranspose1d(3, 5, 4, stride=2, padding=1, output_padding=1),
    "transposed 2d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=1, groups=2, dilation=2),
    "transposed 3d": lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, bias=False),
}
RECIPES = {
    "default": Chain(),
    "one": Chain(depth=1),
    "deep and thin": Chain(depth=5, width=0.1),
    "norm": Chain(depth=2, width=1.5, batch_norm=True),
}


def sample(layer: Any) -> Tensor:
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    rank = layer.weight.ndim - 2
    return torch.randn(2, channels, *(9, 7, 6)[:rank], dtype=torch.float64)


# torch's own advice on even kernels under padding="same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_block_computes_what_the_layer_did(make: Callable[[], Any], recipe: Chain) -> None:
    layer = make().double()
    block = recipe.build(kernel_of(layer)).eval()
    x = sample(layer)
    assert_same(block(x), layer(x), rel=1e-12)
    folded = fold(block)
    assert_same(apply(folded, x), layer(x), rel=1e-12)
    scaled = replace(folded, weight=folded.weight * 1.001)
    assert_different(apply(scaled, x), layer(x), rel=1e-5)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_gradients_of_the_fold_are_those_of_the_chain(make: Callable[[], Any]) -> None:
    layer = make().double()
    block = Chain(depth=3, width=1.5).build(kernel_of(layer), init="kaiming")
    x = sample(layer)
    towards = torch.randn_like(block(x))
    by_chain = torch.autograd.grad((block(x) * towards).sum(), list(block.parameters()))
    by_fold = torch.autograd.grad((apply(fold(block), x) * towards).sum(), list(block.parameters()))
    for a, b in zip(by_fold, by_chain, strict=True):
        assert_same(a, b, rel=1e-9)


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 4, 9), (1, 9, 4), (3, 5, 5)])
def test_factors_are_balanced(shape: tuple[int, int, int], depth: int) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    factors = balanced_factors(matrix, 11, depth)
    for inner, outer in pairwise(factors):
        assert_same(outer.mT @ outer, inner @ inner.mT, rel=1e-9)
    for factor in factors:
        assert bool((factor.abs() > 1e-12).all()), "every hidden unit takes part"


@pytest.mark.parametrize("rows", [1, 255, 517, 1100])
def test_gram_by_blocks_is_the_product_with_the_transpose(rows: int) -> None:
    matrix = torch.randn(2, rows, 37, dtype=torch.float64)
    result = gram(matrix)
    assert_same(result, matrix @ matrix.mT, rel=1e-13)
    assert_same(result, result.mT, rel=1e-15)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_weight_with_vanishing_directions_is_exact_and_trains(scale: float) -> None:
    target = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64) * scale
    layer = nn.Linear(8, 6, bias=False).double()
    layer.weight.data = target
    block = Chain(depth=3, width=2).build(kernel_of(layer))
    assert_same(fold(block).weight, target, rel=1e-11)
    towards: Any = fold(block).weight.sum()
    towards.backward()
    hidden_by_rank = torch.linalg.matrix_rank(block[0].weight.grad)
    assert hidden_by_rank >= 1
    zero = nn.Linear(8, 6, bias=False).double()
    zero.weight.data.zero_()
    block = Chain(depth=3, width=2).build(kernel_of(zero))
    x = torch.randn(16, 8, dtype=torch.float64)
    assert_same(block(x), torch.zeros(16, 6, dtype=torch.float64), rel=0.0)
    wanted = torch.randn(16, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss: Any = (block(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0], "an all-zero start would be a saddle that no gradient leaves"


def test_sizes_are_those_of_the_paper() -> None:
    block = Chain(depth=3, width=2).build(kernel_of(nn.Conv2d(3, 8, 5, stride=2, padding=2)))
    assert [tuple(p.shape) for p in block.parameters()] == [
        (16, 3, 5, 5),
        (16, 16, 1, 1),
        (8, 16, 1, 1),
        (8,),
    ]
    assert block[0].stride == (2, 2) and block[0].padding == (2, 2) and block[1].stride == (1, 1)
    thin = Chain(depth=2, width=0.1).build(kernel_of(nn.Linear(10, 6)))
    assert thin[0].weight.shape == (6, 10), "never below full rank unless asked for"
    neck = Chain(depth=2, width=0.4, bottleneck=True)
    assert neck.build(kernel_of(nn.Linear(10, 6)), init="kaiming")[0].weight.shape == (3, 10)
    with pytest.raises(InexactError, match="below the rank"):
        neck.build(kernel_of(nn.Linear(10, 6)))


def test_a_lopsided_weight_does_not_explode() -> None:
    chain = Chain(depth=3, width=2)
    head = chain.build(kernel_of(nn.Linear(64, 20_000, bias=False, device="meta")))
    assert [p.shape[0] for p in head.parameters()] == [512, 512, 20_000]
    usual = chain.build(kernel_of(nn.Linear(64, 256, bias=False, device="meta")))  # as in ResNet-50: 2 * 256
    assert [p.shape[0] for p in usual.parameters()] == [512, 512, 256]


@pytest.mark.parametrize("residual", [-1, 1, 2, 3])
def test_residuals_fold(residual: int) -> None:
    for layer in (
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Linear(6, 6),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=2),
    ):
        layer = layer.double()
        for init in ("preserve", "kaiming"):
            block = Chain(depth=4, width=1, residual=residual).build(kernel_of(layer), init=init)
            assert any(isinstance(part, Skip) for part in block)
            x = sample(layer)
            assert_same(apply(fold(block), x), block(x), rel=1e-12)
            if init == "preserve":
                assert_same(block(x), layer(x), rel=1e-11)


def test_a_residual_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(InexactError, match="no run of factors"):
        Chain(depth=3, width=1, residual=-1).build(kernel_of(nn.Conv2d(3, 8, 3)))
    with pytest.raises(InexactError, match="not defined with a residual"):
        Chain(depth=2, width=1, residual=-1).build(kernel_of(nn.Linear(4, 4)), init="matched")


def test_matched_keeps_the_norm_and_kaiming_the_variance() -> None:
    layer = nn.Conv2d(16, 32, 3)
    layer.weight.data *= 7.0
    kernel = kernel_of(layer)
    matched = fold(Chain(depth=4).build(kernel, init="matched"))
    assert abs(float((matched.weight.norm() / layer.weight.norm()).detach()) - 1.0) < 1e-5
    assert relative_error(matched.weight, layer.weight) > 0.5
    kaiming = fold(Chain(depth=3, width=2).build(kernel_of(nn.Linear(256, 256)), init="kaiming"))
    assert 0.8 < float(kaiming.weight.detach().var() * 256 / 2.0) < 1.25


def test_a_generator_decides_every_draw() -> None:
    kernel = kernel_of(nn.Linear(6, 5))
    for init in ("preserve", "matched", "kaiming"):
        one, two, other = (
            fold_parameters(Chain().build(kernel, init=init, generator=torch.Generator().manual_seed(seed)))
            for seed in (1, 1, 2)
        )
        assert torch.equal(one, two)
        assert not torch.equal(one, other)


def fold_parameters(block: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in block.parameters()])


@pytest.mark.parametrize(
    "arguments",
    [{"depth": 0}, {"depth": 2.5}, {"width": 0}, {"width": float("nan")}, {"width": -1}, {"residual": -2}],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(SelectionError, match="choose"):
        Chain(**arguments)


def test_meta_kernels_have_shapes_only() -> None:
    block = Chain().build(kernel_of(nn.Conv2d(300, 400, 3, device="meta")))
    assert all(p.is_meta for p in block.parameters())
