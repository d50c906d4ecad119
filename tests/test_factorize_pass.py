"""The pass on graphs, and what fuse, export and compile make of factored layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxexpand
from fxexpand import (
    RefusedError,
    SelectionError,
    UnusableWeightError,
    count_flops,
    cuts,
    expand,
    factorize,
    fuse,
)
from fxexpand.kernel.modules import kernel_of
from fxexpand.lowrank.cuts import Cut, matrix_of
from fxexpand.lowrank.factored import Factorized, factorize_layer, factors
from fxexpand.lowrank.projection import spectrum
from fxexpand.passes import Expand, Factorize, Fuse
from fxexpand.tracing.graphs import trace
from tests.compare import assert_different, assert_same
from tests.graphs import EXACT, action, assert_as_before, called, reason, residual, state_of
from tests.networks import ConvNet, Language, perturb


class Plain(nn.Module):
    """Convolutions and BatchNorm in a row, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, 2, 1)
        self.head = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        result: torch.Tensor = self.head(torch.relu(self.conv2(x)).mean((2, 3)))
        return result


def plain() -> tuple[Any, torch.Tensor]:
    return perturb(Plain().double()).eval(), torch.randn(2, 8, 9, 9, dtype=torch.float64)


def test_the_pass_and_the_function_agree() -> None:
    model, x = plain()
    graph_module = trace(model)
    state, code = state_of(graph_module), graph_module.code
    result = Factorize(flops=0.5, example_inputs=x)(graph_module)
    assert_as_before(graph_module, state, code)
    small: Any = factorize(model, x, flops=0.5)
    assert result.modified and result.report.title == "factorize"
    assert_same(result.graph_module(x), small(x), EXACT)
    assert {"conv1.0", "conv1.1"} <= set(called(result.graph_module))
    assert sorted(result.graph_module.state_dict()) == sorted(small.state_dict())
    assert count_flops(result.graph_module, x).total == count_flops(small, x).total


def test_the_pass_on_its_own_output_changes_nothing() -> None:
    model, _ = plain()
    once = Factorize(rank=2)(trace(model))
    twice = Factorize(rank=1)(once.graph_module)
    assert not twice.modified and twice.graph_module is once.graph_module
    assert action(twice, "conv1.0") == "left"
    assert action(Expand()(once.graph_module), "conv1.0") == "left"


def test_the_pass_refuses_what_the_graph_cannot_show() -> None:
    model, _ = residual()
    model.head.register_forward_hook(lambda *_: None)
    twice = trace(nn.Sequential(model, model.shared))
    result = Factorize(rank=1)(twice)
    assert "hooks" in reason(result, "0.head")
    assert "ConvTranspose2d has no factored form" in reason(result, "0.up")
    assert action(result, "0.conv1") == "factorized"
    with pytest.raises(RefusedError):
        Factorize(rank=1, strict=True)(twice)


def test_the_pass_takes_the_same_options() -> None:
    model, x = plain()
    graph_module = trace(model)
    with pytest.raises(SelectionError, match="exactly one of"):
        Factorize()(graph_module)
    with pytest.raises(SelectionError, match="no layer of that name"):
        Factorize(rank={"conv9": 1})(graph_module)
    result = Factorize(rank=3, select="conv*", scheme="spatial", calibration=[x])(graph_module)
    assert "spatial-wise, rank 3" in reason(result, "conv2") and reason(result, "head") == "not selected"
    changed = Factorize(rank=1, inplace=True)(graph_module)
    assert changed.graph_module is graph_module
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    with pytest.raises(UnusableWeightError, match="head"):
        Factorize(rank=1)(trace(model))
    with pytest.raises(TypeError, match="GraphModule"):
        Factorize(rank=1)(model)


@pytest.mark.parametrize("as_pass", [False, True])
def test_fuse_leaves_cheap_pairs_alone_and_folds_what_is_around(as_pass: bool) -> None:
    model, x = plain()
    if as_pass:
        small: Any = Factorize(rank=2, example_inputs=x)(trace(model)).graph_module
        fused: Any = Fuse()(small).graph_module
    else:
        small = factorize(model, x, rank=2)
        fused = fuse(small, x)
    assert_same(fused(x), small(x), EXACT)
    assert count_flops(fused, x).total == count_flops(small, x).total < count_flops(model, x).total
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    layers = [m for m in fused.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert len(layers) == 6  # every pair is a pair
    if not as_pass:
        assert type(fused) is Plain and isinstance(fused.conv2, Factorized)
        assert fused.get_submodule("conv2.0").out_channels == 2


def full(module: Any, scheme: Any) -> None:
    """Factor a layer at full rank, which factorize itself refuses."""
    found = spectrum(matrix_of(kernel_of(module), scheme))
    cut = Cut(scheme, found.full)
    factorize_layer(module, *factors(module, cut, *found.factors(found.full)), cut)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_fuse_folds_pairs_of_full_rank_back(scheme: Any) -> None:
    model, x = plain()
    big: Any = copy.deepcopy(model)
    full(big.conv1, scheme)
    full(big.conv2, scheme)
    full(big.head, "channel")
    assert_same(big(x), model(x), EXACT)
    fused, expected = fuse(big, x), fuse(model, x)
    assert list(fused.state_dict()) == list(expected.state_dict())
    assert [type(m) for m in fused.modules()] == [type(m) for m in expected.modules()]
    assert_same(fused.conv2.weight, expected.conv2.weight, EXACT)
    assert_same(fused(x), model(x), EXACT)


def test_expand_takes_the_factors_and_fuse_gives_them_back() -> None:
    model, x = plain()
    small: Any = factorize(model, x, rank=2)
    big: Any = expand(small, example_inputs=x)
    assert_same(big(x), small(x), EXACT)
    back = fuse(big, scope="expanded")
    assert list(back.state_dict()) == list(small.state_dict())
    assert cuts(back) == cuts(small)
    rows = {row.site: row.reason for row in fxexpand.report(big).rows}
    assert "factorized already" in rows["conv1"]


@pytest.mark.parametrize("make", [ConvNet, Plain, Language, lambda: nn.Sequential(nn.Embedding(40, 12))])
def test_the_weight_of_a_factored_layer_is_known_while_its_factors_are_expanded(make: Any) -> None:
    """Which is when it is of interest: as the model trains."""
    small: Any = factorize(perturb(make().double()), rank=2)
    big: Any = expand(small)
    assert fxexpand.report(big).changed
    weights = {name: small.get_submodule(name).weight.detach() for name in cuts(small)}
    for name, weight in weights.items():
        assert_same(big.get_submodule(name).weight, weight, 1e-10)
    found = fxexpand.rank_report(big).to_dict()["weights"]
    for row, other in zip(found, fxexpand.rank_report(small).to_dict()["weights"], strict=True):
        assert row["effective_rank"] == pytest.approx(other["effective_rank"], rel=1e-6), row["name"]
    tracker = fxexpand.RankTracker(big, every=1)
    name = next(iter(weights))
    big.get_submodule(name).weight.square().sum().backward()
    torch.optim.SGD([p for p in big.parameters() if p.grad is not None], lr=0.1).step()
    tracker()
    assert_different(big.get_submodule(name).weight, weights[name], 1e-3)


def test_an_expanded_layer_is_left_until_it_is_fused() -> None:
    model, x = plain()
    rows = {row.site: row for row in fxexpand.report(factorize(expand(model), x, rank=2)).rows}
    assert rows["conv1"].action == "left" and rows["conv1"].reason == "expanded already"


def test_onnx_compile_and_pickle(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, x = perturb(ConvNet(bias=True)).eval(), torch.randn(2, 3, 20, 20)
    small: Any = factorize(model, x, rank=1)
    written = fxexpand.export_onnx(small, tmp_path / "small.onnx", (x,))
    assert written.error is not None and written.error < 1e-4
    torch.save(small, tmp_path / "small.pt")
    read = torch.load(tmp_path / "small.pt", weights_only=False)
    assert_same(read(x), small(x), 0.0)
    compiled: Any = torch.compile(small, backend="eager", fullgraph=True)
    assert_same(compiled(x).detach(), small(x).detach(), 1e-5)


def test_rank_report_sees_one_weight_per_layer() -> None:
    model, x = plain()
    small: Any = factorize(model, x, rank=2, scheme="channel")
    ranks = {row.name: row for row in fxexpand.rank_report(small).rows}
    assert list(ranks) == ["conv1.weight", "conv2.weight", "head.weight"]
    assert ranks["head.weight"].effective_rank <= 2 + 1e-6


def test_a_package_with_no_graph_is_factored_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.one(x) if float(x.sum()) > 0 else self.two(x)
            return result

    small: Any = factorize(Branching(), torch.ones(2, 12), flops=0.5)
    assert list(cuts(small)) == ["one"]
    rows = {row.site: row for row in fxexpand.report(small).rows}
    assert "no rank saves" in rows["two"].reason or rows["two"].action == "left"
