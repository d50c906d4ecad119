"""Modules of which one part is affine: norm+act modules of timm, and LayerNorm before Linear layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxexpand import fuse, report
from fxexpand.passes import Fuse
from fxexpand.tracing.graphs import trace
from tests.compare import assert_different, assert_same

norm_act = pytest.importorskip("timm.layers.norm_act")
timm_norm = pytest.importorskip("timm.layers.norm")
EXACT = 1e-12


def shaken(model: nn.Module) -> Any:
    """In float64, eval mode, with other scales, shifts and statistics than the initial ones."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(parameter)
    for tensor in model.buffers():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return model.double().eval()


def check(model: nn.Module, x: Tensor) -> Any:
    """Fused as a model, again, and as a graph: the same outputs; returns the first."""
    expected = model(x)
    fused = fuse(model)
    assert_same(fused(x), expected, EXACT)
    assert_same(fuse(fused)(x), expected, EXACT)
    assert_same(Fuse()(trace(model)).graph_module(x), expected, EXACT)
    return fused


class Branching(nn.Module):
    """A norm before two Linear layers, as before queries and keys; the size is read too."""

    def __init__(self, norm: Any, bias: bool = True) -> None:
        super().__init__()
        self.norm: Any = norm
        self.one, self.two = nn.Linear(6, 5, bias=bias), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z: Tensor = (self.one(y) * self.two(y)).reshape(y.shape[0], -1)
        return z


class Residual(nn.Module):
    """A norm that is read beside the Linear layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z: Tensor = torch.tanh(y) * self.linear(y)
        return z


class Twice(nn.Module):
    """One norm+act module, called where its BatchNorm folds and where it does not."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), norm

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.norm(torch.tanh(self.norm(self.conv(x))))
        return z


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6), timm_norm.LayerNorm(6)], ids=repr
)
def test_a_layer_norm_gives_its_scale_and_shift_to_the_linear_layers(norm: Any) -> None:
    model = shaken(Branching(norm))
    fused = check(model, torch.randn(2, 3, 6, dtype=torch.float64))
    assert type(fused) is Branching and type(fused.norm) is type(norm)
    assert fused.norm.weight is None and not list(fused.norm.parameters())
    assert {row.site for row in report(fused).changed} == {"one", "two"}
    assert norm.weight is model.norm.weight and norm.weight is not None  # the model given is as it was


def test_the_scale_counts() -> None:
    """The comparison above would see a scale that is off by 0.1 %."""
    model = shaken(Branching(nn.LayerNorm(6)))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.weight.mul_(1.001)
    assert_different(fuse(other)(x), model(x), EXACT)


def test_gradients_with_respect_to_the_input_are_kept() -> None:
    model = shaken(Branching(nn.LayerNorm(6)))
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    one, two = (torch.autograd.grad(each(x).sin().sum(), x)[0] for each in (model, fuse(model)))
    assert_same(one, two, EXACT)


class Reused(nn.Module):
    """A LayerNorm before a Linear layer, and again before something else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(self.norm(x))))


@pytest.mark.parametrize(
    "model",
    [
        Residual(),
        Reused(),
        Branching(nn.LayerNorm(6), bias=False),
        nn.Sequential(nn.LayerNorm((3, 6)), nn.Linear(6, 2)),
        nn.Sequential(nn.LayerNorm(6), nn.ReLU()),
    ],
    ids=["read elsewhere", "called elsewhere", "no bias for the shift", "two dimensions", "no linear layer"],
)
def test_a_layer_norm_stays_where_nothing_is_saved(model: nn.Module) -> None:
    shaken(model)
    fused = check(model, torch.randn(2, 3, 6, dtype=torch.float64))
    assert not report(fused).changed
    assert fused.state_dict().keys() == model.state_dict().keys()


def test_a_norm_with_two_names_does_not_make_a_graph_of_the_model() -> None:
    model = Branching(nn.LayerNorm(6))
    model.other = model.norm
    fused = check(shaken(model), torch.randn(2, 3, 6, dtype=torch.float64))
    assert type(fused) is Branching and fused.norm.weight is not None


def test_a_norm_with_a_hook_stays() -> None:
    model = shaken(Branching(nn.LayerNorm(6)))
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, given, output: seen.append(output))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = model(x)
    assert_same(fuse(model)(x), expected, EXACT)
    assert_same(seen[1], seen[0], EXACT)


def test_a_norm_act_without_activation_stays_before_a_convolution_that_pads() -> None:
    norm = norm_act.BatchNormAct2d(3, apply_act=False)
    model = shaken(nn.Sequential(nn.ReLU(), norm, nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)))
    fused = check(model, torch.randn(2, 3, 7, 6, dtype=torch.float64))
    assert isinstance(fused, nn.Sequential)
    assert type(fused[1]) is type(norm) and type(fused[3]) is nn.Identity


def test_a_norm_act_called_twice_folds_where_it_can() -> None:
    model = shaken(Twice(norm_act.BatchNormAct2d(3)))
    fused = check(model, torch.randn(2, 3, 7, 6, dtype=torch.float64))
    assert isinstance(fused, fx.GraphModule)
    norms = [m for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 1


def test_a_vision_transformer_keeps_its_classes() -> None:
    timm = pytest.importorskip("timm")
    model = shaken(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5))
    fused = check(model, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert type(fused) is type(model)
    sites = {row.site for row in report(fused).changed}
    assert sites == {f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "mlp.fc1")}
    assert_same(
        fused.forward_features(x := torch.randn(1, 3, 32, 32).double()), model.forward_features(x), EXACT
    )
