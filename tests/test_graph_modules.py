"""``expand`` and ``fuse`` on a GraphModule: its layers like any others, and its own tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxexpand import expand, fuse, report
from fxexpand.layers import EXPANDED
from fxexpand.passes import Expand, Factorize, Fuse, check
from fxexpand.tracing.graphs import trace
from tests.compare import assert_same
from tests.networks import ConvNet, perturb, train_steps


def test_a_traced_network_makes_the_round_trip() -> None:
    traced: Any = fx.symbolic_trace(perturb(ConvNet()).double())
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    big: Any = expand(traced, example_inputs=x)
    assert isinstance(big, fx.GraphModule) and len(report(big).changed) == 6
    assert_same(big(x), traced(x), rel=1e-10)
    train_steps(big, x)
    small = fuse(big, scope="expanded")
    assert list(small.state_dict()) == list(traced.state_dict())
    assert_same(small.eval()(x), big.eval()(x), rel=1e-10)


def test_a_tensor_that_the_graph_holds_is_expanded() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(F.linear(x, self.weight))
            return result

    traced, x = fx.symbolic_trace(Holder().double()), torch.randn(5, 4, dtype=torch.float64)
    big: Any = expand(traced, example_inputs=x)
    assert [row.site for row in report(big).changed] == ["weight", "layer"] and not report(big).refusals
    train_steps(big, x)
    original = {name: torch.randn_like(tensor) for name, tensor in traced.state_dict().items()}
    for _ in range(2):
        small = fuse(big, scope="expanded")
        assert list(small.state_dict()) == list(original) and small.code == traced.code
        assert_same(small(x), big(x), rel=1e-10)
        big.load_state_dict(original)  # under the original names
    assert_same(small.get_parameter("weight"), original["weight"], rel=1e-10)


def test_a_tensor_that_code_around_the_graph_reads_too_is_refused() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x @ self.first, self.second)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = fx.symbolic_trace(Inner().double())

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x) @ self.inner.second
            return result

    model, x = Outer(), torch.randn(3, 4, dtype=torch.float64)
    big = expand(model, example_inputs=x)
    assert [row.site for row in report(big).changed] == ["inner.first"]
    (refusal,) = report(big).refusals
    assert refusal.site == "inner.second" and "the forward of Outer reads it too" in refusal.reason
    assert_same(fuse(big, scope="expanded")(x), model(x), rel=1e-10)


KINDS = ("fuse", "expand", "Fuse", "Expand", "Factorize")


@pytest.mark.parametrize("run", [fuse, expand, Fuse(), Expand(), Factorize(rank=2)], ids=KINDS)
def test_a_copy_keeps_the_hooks_and_the_plain_attributes_of_a_graph(run: Any) -> None:
    layers = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)
    traced: Any = fx.symbolic_trace(perturb(nn.Sequential(*layers).double()).eval())
    traced.config = {"depth": [1, 2]}
    traced.register_forward_hook(lambda module, args, output: output * module.config["depth"][1])
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    result = run(traced)
    changed: Any = result if isinstance(result, nn.Module) else result.graph_module
    assert changed.config == traced.config and changed.config is not traced.config
    scaled = changed(x)
    changed.config["depth"][1] = 1
    assert_same(scaled, 2 * changed(x), rel=1e-12)
    if not isinstance(run, Factorize):
        assert_same(scaled, traced(x), rel=1e-10)


def test_a_part_that_became_a_graph_can_be_copied() -> None:
    """torch's deepcopy of a GraphModule drops plain attributes, which the code around it may read."""

    class Block(nn.Module):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.one, self.three = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
            self.stride = stride

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.one(x) + self.three(x)
            return result

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(1), Block(2)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                if x.mean() < 100:
                    x = block(x)[..., :: block.stride]
            return x

    model, x = Net().double().eval(), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    small: Any = fuse(model, x)
    assert isinstance(small.blocks[0], fx.GraphModule)
    average: Any = torch.optim.swa_utils.AveragedModel(small)
    twice = copy.deepcopy(copy.deepcopy(small))
    for again in (copy.deepcopy(small), twice, fuse(small), expand(small), average):
        assert_same(again(x), model(x), rel=1e-10)


class Block(nn.Module):
    def __init__(self, conv: nn.Conv2d | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Inside(nn.Module):
    """Calls a part of a module by itself, and the module as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x) + self.block.norm(self.block.conv(x)) * 2
        return result


def test_what_a_graph_calls_whole_keeps_its_parts() -> None:
    model: Any = perturb(Inside().double()).eval()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    traced = trace(model, leaf=lambda name, module: name == "block")
    for run in (Fuse(), Factorize(rank=2)):
        result = run(traced)
        assert not result.modified and "as a whole" in str(result.report)
    expanded = check(Expand(), traced, x).graph_module
    assert type(expanded.get_submodule("block.conv")) is EXPANDED[nn.Conv2d]
    assert_same(Fuse()(expanded).graph_module(x), model(x), rel=1e-10)
    model.block.register_forward_hook(lambda *_: None)
    for inputs in (None, x):
        assert_same(fuse(model, inputs)(x), model(x), rel=1e-10)
        assert_same(fuse(expand(model), inputs)(x), model(x), rel=1e-10)


@pytest.mark.parametrize("other", [Block, lambda conv: nn.Sequential(conv, nn.ReLU())])
def test_a_layer_that_parts_without_a_common_graph_share_stays(other: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Block()
            self.two = other(self.one.conv)
            self.last = Block()

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            if x.sum() > 0:
                x = self.two(x)
            result: Tensor = self.last(x)
            return result

    model, x = perturb(Net().double()).eval(), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    for inputs in (None, x):
        small = fuse(model, inputs)
        assert [row.site for row in report(small).changed] == ["last.conv"]
        assert "another module holds" in str(report(small))
        assert_same(small(x), model(x), rel=1e-10)
        assert_same(fuse(expand(model), inputs)(x), model(x), rel=1e-10)
