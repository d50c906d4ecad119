"""Networks of branch recipes through the public functions: expanded, trained in every form, fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand.layers.expanded import FORMS
from fxexpand.recipes import DBB, OREPA, ACNet, DOConv, MobileOne, Recipe, RepVGG
from tests.compare import assert_different, assert_same
from tests.networks import StandardisedConv2d, perturb, train_steps

RECIPES: dict[str, Recipe] = {
    "RepVGG": RepVGG(),
    "MobileOne": MobileOne(k=2),
    "ACNet": ACNet(),
    "DBB": DBB(),
    "OREPA": OREPA(),
    "DOConv": DOConv(),
}
AFFINE = {name: RECIPES[name] for name in ("OREPA", "DOConv")}


class Net(nn.Module):
    """Convolutions of many shapes in front of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.pointwise(self.depthwise(x)))
        logits: Tensor = self.head(torch.relu(self.dilated(x)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_expand_train_fuse(recipe: Recipe) -> None:
    model = perturb(Net()).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    big = fxexpand.expand(model, recipe, example_inputs=x)
    actions = {row.site: row.action for row in fxexpand.report(big).rows}
    assert actions.pop("head") == "refused"
    assert actions.pop("pointwise") == ("expanded" if isinstance(recipe, MobileOne) else "refused")
    assert set(actions.values()) == {"expanded"}
    assert_same(big.eval()(x), model.eval()(x), rel=1e-10)
    losses = train_steps(big, x, lr=1e-3)
    assert losses[-1] < losses[0]
    small = fxexpand.fuse(big, x, scope="expanded")
    assert_same(small.eval()(x), big.eval()(x), rel=1e-10)
    assert_different(small(x), model(x), rel=1e-4)
    assert type(small.stem) is nn.Conv2d
    fresh = Net().double()
    if not recipe.needs_activations:  # a BatchNorm gives a layer without a bias one
        fresh.load_state_dict(small.state_dict())
        assert_same(fresh.eval()(x), small(x), rel=1e-12)


@pytest.mark.parametrize("recipe", AFFINE.values(), ids=AFFINE)
def test_collapsed_trains_as_the_branches_do(recipe: Recipe) -> None:
    model = perturb(Net()).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for form in FORMS:
        generator = torch.Generator().manual_seed(0)
        big = fxexpand.expand(model, recipe, form=form, generator=generator)
        results.append((train_steps(big, x, lr=1e-3), fxexpand.fuse(big, scope="expanded").state_dict()))
    (losses, state), *others = results
    for other_losses, other_state in others:
        assert other_losses == pytest.approx(losses, rel=1e-9)
        for name, value in state.items():
            assert_same(other_state[name], value, rel=1e-8)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_weight_space(recipe: Recipe) -> None:
    model = nn.Sequential(StandardisedConv2d(4, 6, 3, padding=1), nn.ReLU()).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    big = fxexpand.expand(model, recipe)
    (row,) = [row for row in fxexpand.report(big).rows if row.site.startswith("0")]
    if recipe.needs_activations:
        assert row.action == "refused" and "activations" in row.reason
        return
    assert row.action == "expanded"
    assert_same(big(x), model(x), rel=1e-10)
    losses = train_steps(big, x, lr=1e-2)
    assert losses[-1] < losses[0]
    assert_same(fxexpand.fuse(big, scope="expanded")(x), big(x), rel=1e-10)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_an_original_checkpoint_loads(recipe: Recipe) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).double().eval()
    other = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).double().eval()
    big: Any = fxexpand.expand(model, recipe)
    big.load_state_dict(other.state_dict())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_same(big(x), other(x), rel=1e-10)
    with torch.no_grad():
        big[0].weight = model.get_parameter("0.weight").detach()
    assert_same(big[0].weight, model.get_parameter("0.weight"), rel=1e-10)


def test_memory_format_is_kept() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).to(memory_format=torch.channels_last)
    for recipe in (RepVGG(), MobileOne(), ACNet(), DBB(), OREPA()):
        small = fxexpand.fuse(fxexpand.expand(model, recipe), scope="expanded")
        assert small[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("recipe", AFFINE.values(), ids=AFFINE)
def test_compiles_to_one_graph(recipe: Recipe) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    big = fxexpand.expand(model, recipe, form="collapsed")
    x = torch.randn(2, 4, 8, 8)
    compiled = torch.compile(big, fullgraph=True, backend="eager")
    assert_same(compiled(x), big(x), rel=1e-5)
