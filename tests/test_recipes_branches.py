"""Branches and DO-Conv against the formulas of their papers, written out here without the kernel laws."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxexpand.errors import InexactError, SelectionError
from fxexpand.kernel.algebra import Kernel, apply
from fxexpand.kernel.modules import kernel_of
from fxexpand.recipes import DBB, OREPA, ACNet, DOConv, MobileOne, Recipe, RepVGG, fold
from tests.compare import assert_different, assert_same
from tests.networks import perturb

LAYERS: dict[str, Callable[[], Any]] = {
    "2d": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "2d square": lambda: nn.Conv2d(5, 5, 3, padding=1, bias=False),
    "2d valid": lambda: nn.Conv2d(3, 4, 5, bias=False),
    "2d half valid": lambda: nn.Conv2d(3, 4, (5, 3), padding=(0, 2), stride=(2, 1)),
    "2d wide padding": lambda: nn.Conv2d(4, 4, 3, padding=2, stride=2),
    "2d dilated": lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    "2d same": lambda: nn.Conv2d(3, 4, (3, 5), padding="same"),
    "2d grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "2d eight groups": lambda: nn.Conv2d(16, 8, 3, padding=1, groups=8),
    "2d depthwise": lambda: nn.Conv2d(6, 6, (5, 3), padding=(2, 1), groups=6, bias=False),
    "2d depthwise strided": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, stride=2),
    "2d multiplier": lambda: nn.Conv2d(3, 9, 3, padding=1, groups=3),
    "2d reflect": lambda: nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect"),
    "2d circular": lambda: nn.Conv2d(4, 5, (5, 3), padding=(0, 1), padding_mode="circular"),
    "1d": lambda: nn.Conv1d(3, 5, 5, padding=2, stride=2),
    "1d square": lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2),
    "3d": lambda: nn.Conv3d(2, 2, (3, 1, 5), padding=(1, 0, 2), bias=False),
}
RECIPES: dict[str, Recipe] = {
    "RepVGG": RepVGG(),
    "MobileOne": MobileOne(k=2),
    "ACNet": ACNet(),
    "DBB": DBB(),
    "OREPA": OREPA(),
    "DOConv": DOConv(),
}
AFFINE = {name: RECIPES[name] for name in ("OREPA", "DOConv")}
PAIRS = [
    pytest.param(RECIPES[r], LAYERS[name], id=f"{r} {name}")
    for r in RECIPES
    for name in LAYERS
    if r != "ACNet" or name.startswith("2d")
]


def sample(layer: Any) -> Tensor:
    size = (11, 9, 8)[: layer.weight.ndim - 2]
    return torch.randn(2, layer.in_channels, *size, dtype=torch.float64)


def randomised(block: Any) -> Any:
    """All parameters moved, all statistics away from their start, in evaluation mode."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return perturb(block).eval()


def built(recipe: Recipe, layer: Any, **options: Any) -> Any:
    return recipe.build(kernel_of(layer), **options)


@pytest.mark.parametrize(("recipe", "make"), PAIRS)
def test_the_block_computes_what_the_layer_did(recipe: Recipe, make: Callable[[], Any]) -> None:
    layer = make().double()
    block = built(recipe, layer).eval()
    x = sample(layer)
    assert_same(block(x), layer(x), rel=1e-10)
    folded = fold(block)
    assert_same(folded.weight, layer.weight, rel=1e-10)
    assert_different(apply(replace(folded, weight=folded.weight * 1.001), x), layer(x), rel=1e-5)


@pytest.mark.parametrize(("recipe", "make"), PAIRS)
def test_the_fold_computes_what_the_block_does(recipe: Recipe, make: Callable[[], Any]) -> None:
    layer = make().double()
    block = randomised(built(recipe, layer, init="kaiming"))
    kernel, folded, x = kernel_of(layer), fold(block), sample(layer)
    assert_same(apply(folded, x), block(x), rel=1e-10)
    assert replace(folded.geometry, bias=kernel.geometry.bias) == kernel.geometry
    assert_different(apply(folded, x), layer(x), rel=1e-2)


@pytest.mark.parametrize(("recipe", "make"), PAIRS)
def test_gradients_of_the_fold_are_those_of_the_block(recipe: Recipe, make: Callable[[], Any]) -> None:
    layer = make().double()
    block = randomised(built(recipe, layer, init="kaiming"))
    x, parameters = sample(layer), list(block.parameters())
    towards = torch.randn_like(block(x))
    by_block = torch.autograd.grad((block(x) * towards).sum(), parameters)
    by_fold = torch.autograd.grad((apply(fold(block), x) * towards).sum(), parameters)
    for a, b in zip(by_fold, by_block, strict=True):
        assert_same(a, b, rel=1e-9)
        assert float(b.abs().max()) > 0.0


def test_branches_start_as_in_the_papers() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    scales = [branch[-1].weight.detach() for branch in built(OREPA(), layer, init="kaiming")[0]]
    assert [float(s[0]) for s in scales] == [0.25, 0.25, 0.0, 1.0, 0.5, 0.5]
    assert all(bool((s == s[0]).all()) for s in scales)
    for init in ("kaiming", "preserve"):
        assert not built(OREPA(), layer, init=init)[0][4][0][0].weight.any()
        assert not built(DBB(), layer, init=init)[0][3][1][0].weight.any()
        assert not built(DOConv(), layer, init=init)[0][1].weight.any()
    main = built(RepVGG(), nn.Conv2d(64, 64, 3, padding=1), init="kaiming")[0][0][0].weight.detach()
    assert float(main.abs().max()) == pytest.approx(1 / math.sqrt(64 * 9), rel=1e-2), "torch's own bound"


def test_identity_only_where_channels_and_size_are_kept() -> None:
    def count(**changes: Any) -> int:
        options = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1} | changes
        return len(built(RepVGG(), nn.Conv2d(**options))[0])

    assert count() == count(padding=2, dilation=2) == count(groups=2) == 3
    assert count(out_channels=6) == count(stride=2) == count(padding=0) == count(padding=2) == 2
    assert len(built(MobileOne(k=1), nn.Conv2d(4, 4, 1))[0]) == 2, "no 1x1 beside a 1x1"
    assert len(built(MobileOne(k=3), nn.Conv2d(4, 6, 1))[0]) == 3


def test_training_normalises_every_branch_by_its_batch() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1).double()
    block = randomised(built(RepVGG(), layer)).train()
    large, small, same = block[0]
    x = sample(layer)

    def batch_norm(y: Tensor, norm: Any) -> Tensor:
        mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), correction=0, keepdim=True)
        weight, bias = norm.weight.reshape(1, -1, 1, 1), norm.bias.reshape(1, -1, 1, 1)
        result: Tensor = (y - mean) / torch.sqrt(variance + norm.eps) * weight + bias
        return result

    expected = (
        batch_norm(F.conv2d(x, large[0].weight, padding=1), large[1])
        + batch_norm(F.conv2d(x, small[0].weight), small[1])
        + batch_norm(x, same[0])
    )
    assert_same(block(x), expected, rel=1e-10)
    with pytest.raises(InexactError, match="training mode"):
        fold(block)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_matched_keeps_the_norm(recipe: Recipe) -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    layer.weight.data *= 7.0
    block = built(recipe, layer, init="matched").eval()
    weight = fold(block).weight.detach()
    assert float(weight.norm() / layer.weight.detach().norm()) == pytest.approx(1.0, abs=1e-5)
    assert_different(weight, layer.weight, rel=0.5)
    assert_same(fold(block).bias, layer.bias, rel=1e-6)  # type: ignore[arg-type]
    layer.weight.data.zero_()
    still_random = fold(built(recipe, layer, init="matched").eval()).weight
    assert bool(still_random.isfinite().all()) and bool(still_random.any())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("init", ["preserve", "matched", "kaiming"])
def test_a_generator_decides_every_draw(recipe: Recipe, init: Any) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    one, two, other = (
        torch.cat(
            [
                p.detach().flatten()
                for p in built(
                    recipe, layer, init=init, generator=torch.Generator().manual_seed(seed)
                ).parameters()
            ]
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert torch.equal(one, other) == (isinstance(recipe, DOConv) and init == "preserve")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("init", ["preserve", "matched", "kaiming"])
def test_dtype_device_training_and_copies(recipe: Recipe, init: Any) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    block = built(recipe, layer, init=init).eval()
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    trained = [p for p in block.parameters() if p.requires_grad]
    assert [p.shape for p in trained] == [layer.bias.shape], "the bias alone was trained"  # type: ignore[union-attr]
    x = torch.randn(1, 4, 5, 5, dtype=torch.bfloat16)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
        assert torch.equal(fold(twin).weight, fold(block).weight)
    empty = nn.Conv2d(4, 4, 3, padding=1, device="meta")
    state = torch.get_rng_state()
    on_meta = built(recipe, empty, init=init)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert all(t.is_meta for t in on_meta.parameters())
    assert [p.shape for p in on_meta.parameters()] == [p.shape for p in block.parameters()]
    assert list(on_meta.state_dict()) == list(block.state_dict())


REFUSALS = [
    (RECIPES, lambda: nn.Linear(4, 4), "not for a Linear"),
    (RECIPES, lambda: nn.ConvTranspose2d(4, 4, 3), "not for transposed"),
    (RECIPES.keys() - {"ACNet"}, lambda: nn.Conv2d(0, 4, 3), "empty"),
    (RECIPES.keys() - {"DOConv"}, lambda: nn.Conv2d(4, 4, (3, 4)), "3x4. has no middle tap"),
    (("RepVGG", "DBB", "OREPA", "DOConv"), lambda: nn.Conv2d(4, 4, 1), "one tap"),
    (("ACNet",), lambda: nn.Conv2d(4, 4, (3, 1)), "3x1"),
    (("ACNet",), lambda: nn.Conv1d(4, 4, 3), "two spatial dimensions, not 1"),
    (("ACNet",), lambda: nn.Conv3d(4, 4, 3), "two spatial dimensions, not 3"),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        pytest.param(name, make, reason, id=f"{name} {reason}")
        for names, make, reason in REFUSALS
        for name in sorted(names)
    ],
)
def test_what_cannot_be_represented_is_refused(name: str, make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(InexactError, match=reason):
        built(RECIPES[name], make())


def test_arguments_out_of_range() -> None:
    for k in (0, 1.5, -1):
        with pytest.raises(SelectionError, match="choose"):
            MobileOne(k=k)  # type: ignore[arg-type]
    for recipe in RECIPES.values():
        with pytest.raises(SelectionError, match="choose from"):
            built(recipe, nn.Conv2d(4, 4, 3), init="other")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_even_kernels_and_uneven_padding() -> None:
    kernel = Kernel(torch.randn(3, 2, 4, dtype=torch.float64), padding=((1, 2),))
    block = DOConv().build(kernel)
    x = torch.randn(1, 2, 7, dtype=torch.float64)
    assert_same(block(x), apply(kernel, x), rel=1e-12)
    with pytest.raises(InexactError, match="differs before and after"):
        RepVGG().build(Kernel(torch.randn(2, 2, 3), padding=((0, 2),)))


@pytest.mark.parametrize("recipe", AFFINE.values(), ids=AFFINE)
def test_factors_may_be_given_to_the_fold(recipe: Recipe) -> None:
    layer = nn.Conv2d(8, 8, 3, groups=8, bias=False).double()
    block = randomised(built(recipe, layer))
    structure = copy.deepcopy(block).to("meta")
    assert torch.equal(fold(structure, list(block.parameters())).weight, fold(block).weight)
    assert fold(structure).weight.is_meta
