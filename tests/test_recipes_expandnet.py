"""ExpandNets against the contraction formulas of the paper, written out here without the kernel laws."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxexpand
from fxexpand.errors import InexactError, SelectionError
from fxexpand.kernel.algebra import Kernel, apply
from fxexpand.kernel.modules import kernel_of
from fxexpand.layers.expanded import FORMS
from fxexpand.recipes import ExpandNetCK, ExpandNetCL, ExpandNetFC, Recipe, fold
from fxexpand.recipes.factors import balanced_factors
from tests.compare import assert_different, assert_same
from tests.networks import Language, StandardisedConv2d, train_steps

CONVOLUTIONS: dict[str, Callable[[], Any]] = {
    "2d": lambda: nn.Conv2d(4, 6, 5, padding=2),
    "2d seven": lambda: nn.Conv2d(3, 5, 7, padding=3, stride=2, bias=False),
    "2d nine": lambda: nn.Conv2d(2, 3, 9, padding=(4, 0)),
    "2d uneven": lambda: nn.Conv2d(3, 4, (7, 3), padding=(2, 0), stride=(2, 3), dilation=(1, 2)),
    "2d line": lambda: nn.Conv2d(3, 4, (1, 9), padding=(0, 4)),
    "2d grouped": lambda: nn.Conv2d(6, 9, 7, padding=3, groups=3),
    "2d depthwise": lambda: nn.Conv2d(5, 5, (5, 7), padding=(2, 3), groups=5, bias=False),
    "2d multiplier": lambda: nn.Conv2d(3, 9, 5, groups=3, stride=2),
    "2d dilated": lambda: nn.Conv2d(3, 4, 5, padding="same", dilation=2),
    "2d reflect": lambda: nn.Conv2d(3, 4, 5, padding=3, padding_mode="reflect"),
    "2d circular": lambda: nn.Conv2d(3, 4, (5, 7), padding=(2, 1), padding_mode="circular", stride=2),
    "1d": lambda: nn.Conv1d(3, 5, 9, padding=4, stride=2),
    "1d thirteen": lambda: nn.Conv1d(2, 3, 13, padding=1),
}
FOR_CL: dict[str, Callable[[], Any]] = {
    "2d three": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "2d even": lambda: nn.Conv2d(3, 4, (2, 4), padding="same"),
    "2d one": lambda: nn.Conv2d(6, 4, 1, stride=2),
    "2d depthwise three": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="replicate"),
    "3d": lambda: nn.Conv3d(2, 3, (3, 1, 5), padding=(1, 0, 2)),
}
LINEAR: dict[str, Callable[[], Any]] = {
    "tall": lambda: nn.Linear(5, 11),
    "wide": lambda: nn.Linear(11, 5, bias=False),
    "to one": lambda: nn.Linear(7, 1),
    "conv": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "grouped conv": lambda: nn.Conv1d(6, 9, 1, groups=3, padding=1),
}
PAIRS = [
    *(pytest.param(ExpandNetCL(), make, id=f"CL {name}") for name, make in (CONVOLUTIONS | FOR_CL).items()),
    *(pytest.param(ExpandNetCK(), make, id=f"CK {name}") for name, make in CONVOLUTIONS.items()),
    *(pytest.param(ExpandNetFC(), make, id=f"FC {name}") for name, make in LINEAR.items()),
    pytest.param(ExpandNetCL(rate=1), CONVOLUTIONS["2d grouped"], id="CL rate 1"),
    pytest.param(ExpandNetCL(rate=1.3), CONVOLUTIONS["2d grouped"], id="CL rate 1.3"),
    pytest.param(ExpandNetFC(rate=1), LINEAR["tall"], id="FC rate 1"),
    pytest.param(ExpandNetCK(rate=2), CONVOLUTIONS["1d"], id="CK rate 2"),
    pytest.param(ExpandNetCK(rate=8), lambda: nn.Conv3d(2, 1, (5, 5, 7), padding=2), id="CK 3d"),
    pytest.param(ExpandNetCK(rate=9), lambda: nn.Conv2d(1, 2, (11, 15)), id="CK fifteen"),
]
EACH: dict[str, tuple[Recipe, Callable[[], Any]]] = {
    "CL": (ExpandNetCL(), lambda: nn.Conv2d(4, 6, 5, padding=2)),
    "CK": (ExpandNetCK(), lambda: nn.Conv2d(4, 6, 7, padding=3)),
    "FC": (ExpandNetFC(), lambda: nn.Linear(4, 6)),
}

# torch's own advice on even kernels under padding="same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def sample(layer: Any) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(3, layer.in_features, dtype=torch.float64)
    size = (17, 16, 9)[: layer.weight.ndim - 2]
    return torch.randn(2, layer.in_channels, *size, dtype=torch.float64)


def built(recipe: Recipe, layer: Any, **options: Any) -> Any:
    return recipe.build(kernel_of(layer), **options)


@pytest.mark.parametrize(("recipe", "make"), PAIRS)
def test_the_block_computes_what_the_layer_did(recipe: Recipe, make: Callable[[], Any]) -> None:
    layer = make().double()
    block, x = built(recipe, layer), sample(layer)
    assert_same(block(x), layer(x), rel=1e-10)
    folded = fold(block)
    assert_same(folded.weight, layer.weight, rel=1e-10)
    assert_different(apply(replace(folded, weight=folded.weight * 1.001), x), layer(x), rel=1e-5)
    norms = torch.stack([p.detach().norm() for p in block.parameters() if p.ndim > 1])
    if not isinstance(recipe, ExpandNetFC):
        assert_same(norms, norms[:1].expand_as(norms), rel=1e-9)
    for factor in block.parameters():
        assert float(factor.detach().flatten(1).norm(dim=1).min()) > 1e-9 if factor.ndim > 1 else True


@pytest.mark.parametrize(("recipe", "make"), PAIRS)
def test_fold_and_gradients_are_those_of_the_chain(recipe: Recipe, make: Callable[[], Any]) -> None:
    layer = make().double()
    block = built(recipe, layer, init="kaiming")
    kernel, folded, x = kernel_of(layer), fold(block), sample(layer)
    assert_same(apply(folded, x), block(x), rel=1e-10)
    assert folded.geometry == kernel.geometry
    towards, parameters = torch.randn_like(block(x)), list(block.parameters())
    by_chain = torch.autograd.grad((block(x) * towards).sum(), parameters)
    by_fold = torch.autograd.grad((apply(folded, x) * towards).sum(), parameters)
    for a, b in zip(by_fold, by_chain, strict=True):
        assert_same(a, b, rel=1e-9)


@pytest.mark.parametrize("groups", [1, 3])
def test_cl_contracts_as_in_the_paper(groups: int) -> None:
    layer = nn.Conv2d(3, 6, (3, 4), groups=groups).double()
    first, middle, last = built(ExpandNetCL(rate=2), layer, init="kaiming")
    assert [tuple(f.weight.shape) for f in (first, middle, last)] == [
        (6, 3 // groups, 1, 1),
        (12, 6 // groups, 3, 4),
        (6, 12 // groups, 1, 1),
    ]
    f1, f2, f3 = (
        f.weight.flatten(2).reshape(groups, -1, *f.weight.flatten(2).shape[1:]) for f in (first, middle, last)
    )
    expected = torch.einsum("goqx,gqpt,gpiy->goit", f3, f2, f1).reshape(layer.weight.shape)
    assert_same(fold(nn.Sequential(first, middle, last)).weight, expected, rel=1e-12)


def test_ck_contracts_as_in_the_paper() -> None:
    layer = nn.Conv2d(3, 5, 7, padding=3, stride=2).double()
    block = built(ExpandNetCK(rate=2), layer, init="kaiming")
    assert [tuple(f.weight.shape) for f in block] == [(6, 3, 3, 3), (10, 6, 3, 3), (5, 10, 3, 3)]
    assert [f.padding for f in block] == [(3, 3), (0, 0), (0, 0)]
    assert [f.stride for f in block] == [(1, 1), (1, 1), (2, 2)]
    assert [f.bias is None for f in block] == [True, True, False]
    one, two, three = (f.weight for f in block)
    # As the released code does: the composed kernel is a transposed convolution of the outer one.
    expected = F.conv_transpose2d(F.conv_transpose2d(three, two), one)
    assert_same(fold(block).weight, expected, rel=1e-12)
    assert torch.equal(fold(block).bias, layer.bias)  # type: ignore[arg-type]


def test_ck_gives_a_short_dimension_fewer_factors() -> None:
    block = built(ExpandNetCK(), nn.Conv2d(3, 4, (9, 3)))
    assert [f.kernel_size for f in block] == [(3, 1), (3, 3), (3, 1), (3, 1)]


def test_fc_contracts_as_in_the_paper() -> None:
    layer = nn.Linear(5, 3).double()
    block = built(ExpandNetFC(rate=2), layer, init="kaiming")
    assert [tuple(f.weight.shape) for f in block] == [(10, 5), (6, 10), (3, 6)]
    one, two, three = (f.weight for f in block)
    assert_same(fold(block).weight, three @ two @ one, rel=1e-12)
    bound = 1 / math.sqrt(10)
    assert 0.8 * bound < float(two.detach().abs().max()) <= bound, "torch's own initialisation"


def test_depthwise_stays_depthwise() -> None:
    block = built(ExpandNetCL(), nn.Conv2d(4, 4, 3, groups=4))
    assert [(f.in_channels, f.out_channels, f.groups) for f in block] == [(4, 16, 4), (16, 16, 4), (16, 4, 4)]


def test_fc_starts_balanced() -> None:
    block = built(ExpandNetFC(rate=2), nn.Linear(7, 5).double())
    weights = [f.weight.detach() for f in block]
    for inner, outer in itertools.pairwise(weights):
        assert_same(outer.T @ outer, inner @ inner.T, rel=1e-9)


def test_balanced_factors_of_different_widths() -> None:
    for shape in ((2, 4, 9), (2, 9, 4)):
        matrix = torch.randn(shape, dtype=torch.float64)
        factors = balanced_factors(matrix, [7, 20, 5], 4)
        assert [f.shape[1] for f in factors] == [7, 20, 5, shape[1]]
        product = factors[3] @ factors[2] @ factors[1] @ factors[0]
        assert_same(product, matrix, rel=1e-11)
        for inner, outer in itertools.pairwise(factors):
            assert_same(outer.mT @ outer, inner @ inner.mT, rel=1e-9)
    thin = torch.randn(1, 4, 2, dtype=torch.float64) @ torch.randn(1, 2, 9, dtype=torch.float64)
    first, second, third = balanced_factors(thin, [7, 3], 3)
    assert_same(third @ second @ first, thin, rel=1e-11)
    with pytest.raises(InexactError, match="a hidden width of 3 is below the rank"):
        balanced_factors(torch.randn(1, 4, 9, dtype=torch.float64), [7, 3], 3)


@pytest.mark.parametrize(("recipe", "make"), EACH.values(), ids=EACH)
def test_a_zero_weight_trains(recipe: Recipe, make: Callable[[], Any]) -> None:
    layer = make().double()
    layer.weight.data.zero_()
    block, x = built(recipe, layer), sample(layer)
    assert not fold(block).weight.any()
    losses = train_steps(block, x, steps=1, lr=0.0)
    towards: Any = (block(x) - torch.randn_like(block(x))).square().mean()
    towards.backward()
    assert losses and any(bool(p.grad.abs().max() > 0) for p in block.parameters() if p.ndim > 1)


@pytest.mark.parametrize(("recipe", "make"), EACH.values(), ids=EACH)
def test_matched_keeps_the_norm(recipe: Recipe, make: Callable[[], Any]) -> None:
    layer = make()
    layer.weight.data *= 7.0
    weight = fold(built(recipe, layer, init="matched")).weight.detach()
    assert float(weight.norm() / layer.weight.detach().norm()) == pytest.approx(1.0, abs=1e-5)
    assert_different(weight, layer.weight, rel=0.3)


@pytest.mark.parametrize(("recipe", "make"), EACH.values(), ids=EACH)
@pytest.mark.parametrize("init", ["preserve", "matched", "kaiming"])
def test_generator_dtype_device_training_and_copies(
    recipe: Recipe, make: Callable[[], Any], init: Any
) -> None:
    layer = make().to(torch.bfloat16)
    layer.weight.requires_grad_(False)
    one, two, other = (
        built(recipe, layer, init=init, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one[0].weight, other[0].weight)
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in one.parameters()] == [False] * (len(one)) + [True]
    x = sample(layer).to(torch.bfloat16)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert torch.equal(twin(x), one(x))
    on_meta = built(recipe, copy.deepcopy(layer).to("meta"), init=init)
    assert all(p.is_meta for p in on_meta.parameters())
    assert [p.shape for p in on_meta.parameters()] == [p.shape for p in one.parameters()]


@pytest.mark.parametrize(
    ("recipe", "make", "reason"),
    [
        (ExpandNetCL(), lambda: nn.Linear(4, 4), "not for a Linear"),
        (ExpandNetCK(), lambda: nn.Linear(4, 4), "not for a Linear"),
        (ExpandNetCL(), lambda: nn.ConvTranspose2d(4, 4, 3), "not for transposed"),
        (ExpandNetCK(), lambda: nn.ConvTranspose2d(4, 4, 5), "not for transposed"),
        (ExpandNetFC(), lambda: nn.ConvTranspose2d(4, 4, 1), "for Linear layers and kernels of one tap"),
        (ExpandNetFC(), lambda: nn.Conv2d(4, 4, 3), "for Linear layers and kernels of one tap"),
        (ExpandNetCK(), lambda: nn.Conv2d(4, 4, 3), "larger than 3, and this one is 3x3"),
        (ExpandNetCK(), lambda: nn.Conv2d(4, 4, 1), "larger than 3, and this one is 1x1"),
        (ExpandNetCK(), lambda: nn.Conv2d(4, 4, (5, 4)), "this one is 5x4"),
        (ExpandNetCL(rate=0.5), lambda: nn.Conv2d(4, 4, 3), "Use rate=1, or"),
        (ExpandNetCK(rate=3), lambda: nn.Conv2d(4, 4, 5), "Use rate=4, or"),
        (ExpandNetCK(rate=4), lambda: nn.Conv2d(4, 4, 11), "Use rate=9, or"),
        (ExpandNetCK(rate=4), lambda: nn.Conv3d(2, 2, 5), "Use rate=8, or"),
        (ExpandNetFC(rate=0.5), lambda: nn.Linear(4, 4), "below the rank"),
    ],
)
def test_what_cannot_be_represented_is_refused(recipe: Recipe, make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(InexactError, match=reason):
        built(recipe, make())


def test_a_narrow_block_may_still_be_drawn() -> None:
    for recipe in (ExpandNetCL(rate=0.5), ExpandNetCK(rate=0.5)):
        assert built(recipe, nn.Conv2d(4, 4, 5), init="kaiming")[0].out_channels == 2


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "4"])
def test_rates_out_of_range_are_refused(rate: Any) -> None:
    for recipe in (ExpandNetCL, ExpandNetCK, ExpandNetFC):
        with pytest.raises(SelectionError, match=f"{recipe.__name__}.*choose"):
            recipe(rate=rate)
    with pytest.raises(SelectionError, match="choose from"):
        built(ExpandNetCL(), nn.Conv2d(4, 4, 3), init="other")


def test_uneven_padding() -> None:
    kernel = Kernel(torch.randn(3, 2, 4, dtype=torch.float64), padding=((1, 2),))
    x = torch.randn(1, 2, 7, dtype=torch.float64)
    assert_same(ExpandNetCL().build(kernel)(x), apply(kernel, x), rel=1e-12)


class SmallNet(nn.Module):
    """The shapes of the paper's network for 7 x 7 kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, padding=3)
        self.conv2 = nn.Conv2d(4, 6, 7, padding=3, bias=False)
        self.fc1 = nn.Linear(6 * 9, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return logits


@pytest.mark.parametrize("recipe", [ExpandNetCL(), ExpandNetCK()], ids=["CL", "CK"])
def test_expand_train_fuse(recipe: Recipe) -> None:
    model = SmallNet().double()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    results = []
    for form in FORMS:
        generator = torch.Generator().manual_seed(0)
        select: Any = {"conv*": recipe, "fc*": ExpandNetFC()}
        big = fxexpand.expand(
            model,
            select=select,
            form=form,
            generator=generator,
            example_inputs=x,
            strict=True,
        )
        assert_same(big(x), model(x), rel=1e-10)
        losses = train_steps(big, x, lr=1e-3)
        assert losses[-1] < losses[0]
        small = fxexpand.fuse(big, x, scope="expanded")
        assert_same(small(x), big(x), rel=1e-10)
        assert_different(small(x), model(x), rel=1e-4)
        fresh = SmallNet().double()
        fresh.load_state_dict(small.state_dict())
        assert_same(fresh(x), small(x), rel=1e-12)
        results.append((losses, small.state_dict()))
    (losses, state), *others = results
    for other_losses, other_state in others:
        assert other_losses == pytest.approx(losses, rel=1e-9)
        for name, value in state.items():
            assert_same(other_state[name], value, rel=1e-8)


@pytest.mark.parametrize("recipe", [ExpandNetCL(), ExpandNetCK()], ids=["CL", "CK"])
def test_convolutions_in_weight_space(recipe: Recipe) -> None:
    model = nn.Sequential(StandardisedConv2d(4, 6, 5, padding=1, groups=2), nn.ReLU()).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    big = fxexpand.expand(model, recipe)
    assert any(row.action == "expanded" for row in fxexpand.report(big).rows)
    assert_same(big(x), model(x), rel=1e-10)
    losses = train_steps(big, x)
    assert losses[-1] < losses[0]
    assert_same(fxexpand.fuse(big, scope="expanded")(x), big(x), rel=1e-10)


def test_matrices_in_weight_space() -> None:
    model = Language().double()
    tokens = torch.randint(0, 11, (3, 5))
    big = fxexpand.expand(model, ExpandNetFC(rate=2), example_inputs=tokens)
    sites = [row.site for row in fxexpand.report(big).rows if row.action == "expanded"]
    assert any("attention" in site for site in sites) and any("recurrent" in site for site in sites)
    losses = train_steps(big, tokens)
    assert losses[-1] < losses[0]
    assert_same(fxexpand.fuse(big, scope="expanded")(tokens), big(tokens), rel=1e-10)
