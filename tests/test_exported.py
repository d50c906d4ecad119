"""Programs of torch.export, and graph modules, as input."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxexpand
from fxexpand import Chain
from fxexpand.errors import RefusedError
from fxexpand.tracing import trace
from fxexpand.tracing.export import module_of
from fxexpand.tracing.guards import mode_of
from tests.compare import assert_same
from tests.networks import perturb

EXACT = 1e-10


class Network(nn.Module):
    """Each kind of weight, and control flow on sizes, which a symbolic trace does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.mix = nn.Linear(6, 6, bias=False)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 5, 4, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.cell = nn.GRUCell(5, 4)
        self.scale = nn.Parameter(torch.randn(4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        h = self.mix(self.table(tokens))
        if h.shape[1] < 4:
            h = F.pad(h, (0, 0, 0, 4 - h.shape[1]))
        h = self.up(F.relu(self.norm(self.conv(h.mT)))).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.cell(h[:, 1], h.new_ones(len(h), 4))
        return {"logits": self.head(h) * (h @ self.scale), "hidden": h}


def program(decompose: bool) -> tuple[Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, tokens = perturb(Network().double().eval()), torch.randint(9, (2, 3))
    exported = torch.export.export(model, (tokens,))
    return exported.run_decompositions() if decompose else exported, model, tokens


@pytest.mark.parametrize("decompose", [False, True])
def test_an_exported_program_is_expanded_and_folded(decompose: bool) -> None:
    exported, model, tokens = program(decompose)
    big = fxexpand.expand(exported, Chain(depth=3, width=1), example_inputs=tokens)
    report = fxexpand.report(big)
    assert {row.site for row in report.changed} == {
        "table.weight",
        "mix.weight",
        "conv.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cell.weight_ih",
        "cell.weight_hh",
        "head.weight",
    }, str(report)
    assert_same(big(tokens)["logits"], model(tokens)["logits"], EXACT)
    loss: Any = big(tokens)["logits"].square().mean()
    loss.backward()
    factors = [(n, p) for n, p in big.named_parameters() if "parametrizations" in n]
    assert factors and all(p.grad is not None and bool(p.grad.any()) for _, p in factors)
    with torch.no_grad():
        for _, parameter in factors:
            parameter.mul_(1.01)
    small = fxexpand.fuse(big, scope="expanded")
    assert list(small.state_dict()) == list(exported.module().state_dict())
    assert_same(small(tokens)["logits"], big(tokens)["logits"], EXACT)
    again = Network().double().eval()
    again.load_state_dict(small.state_dict())
    assert_same(again(tokens)["logits"], big(tokens)["logits"], EXACT)


@pytest.mark.parametrize("decompose", [False, True])
def test_an_exported_program_is_fused(decompose: bool) -> None:
    exported, model, tokens = program(decompose)
    fused = fxexpand.fuse(exported, tokens)
    assert_same(fused(tokens)["logits"], model(tokens)["logits"], EXACT)
    assert fxexpand.report(fused).changed
    assert decompose or "norm.weight" not in fused.state_dict()


class Mixed(nn.Module):
    """What needs the number of dimensions: a branch that is a norm alone, and a norm over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.mix = nn.Linear(4, 6, bias=False)
        self.tokens = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        tokens = self.mix(F.relu(self.norm(x) + self.conv(x)).flatten(2).mT.flatten(0, 1))
        mixed: Tensor = self.tokens(tokens)
        return mixed.reshape(x.shape[0], -1, 6)


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_shapes_of_an_export_stand_in_for_example_inputs(dynamic: bool, decompose: bool) -> None:
    model = perturb(Mixed().double().eval())
    x, other = (torch.randn(batch, 4, 6, 5, dtype=torch.float64) for batch in (2, 3))
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes)
    fused: Any = fxexpand.fuse(exported.run_decompositions() if decompose else exported)
    layers = [m for m in fused.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 2 and "norm" not in fused.code, fused.code
    for each in (x, other) if dynamic else (x,):
        assert_same(fused(each), model(each), EXACT)


def test_a_program_is_in_the_mode_that_was_exported(tmp_path: Path) -> None:
    layers: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
    x = torch.randn(2, 3, 6, 5)
    fused = fxexpand.fuse(torch.export.export(perturb(layers).eval(), (x,)))
    assert not any(module.training for module in fused.modules())
    fxexpand.export_onnx(fused, tmp_path / "fused.onnx", x, dynamic_batch=False)  # which refuses training
    big = fxexpand.expand(torch.export.export(layers, (x,)))
    assert not big.training and big.train().training
    trains: Any = fxexpand.fuse(torch.export.export(layers.train(), (x,)))
    assert trains.training and "batch_norm" in trains.code
    with pytest.raises(RefusedError, match="training"):
        fxexpand.export_onnx(trains, tmp_path / "trains.onnx", x)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_operators_without_a_flag(training: bool) -> None:
    """A BatchNorm that was decomposed, and attention."""
    x = torch.randn(2, 3, 6, 5)
    norm = torch.export.export(nn.BatchNorm2d(3).train(training), (x,)).run_decompositions()
    assert mode_of(module_of(norm)) == ("train" if training else "eval")
    attention = module_of(torch.export.export(Attention().train(training), (x,)))
    assert attention.training == training and mode_of(attention) == ("train" if training else None)


@pytest.mark.parametrize("kind", ["real", "fake", "symbolic"])
def test_a_graph_of_make_fx_is_fused(kind: Any) -> None:
    model = perturb(Mixed().double().eval())
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    graph_module = make_fx(model, tracing_mode=kind, _allow_non_fake_inputs=True)(x)
    fused: Any = fxexpand.fuse(graph_module)
    layers = [m for m in fused.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 2 and "norm" not in fused.code, fused.code
    assert_same(fused(x), model(x), EXACT)
    again = pickle.loads(pickle.dumps(fused))
    assert_same(again(x), model(x), EXACT)


def test_a_graph_module_keeps_the_shapes_of_its_trace() -> None:
    model = perturb(Mixed().double().eval())
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    fused = fxexpand.fuse(trace(model, example_inputs=x))
    layers = [m for m in fused.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 2 and not any("BatchNorm" in type(m).__name__ for m in fused.modules())
    assert_same(fused(x), model(x), EXACT)


def test_the_tensors_of_a_decomposed_batch_norm_are_checked_and_go_with_it() -> None:
    model: Any = perturb(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval())
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    fused = fxexpand.fuse(torch.export.export(model, (x,)).run_decompositions(), x)
    assert_same(fused(x), model(x), EXACT)
    assert len(list(fused.parameters())) == 2 and "1.running_var" not in fused.state_dict()
    with torch.no_grad():
        model[1].weight[0] = float("nan")
    left = fxexpand.fuse(torch.export.export(model, (x,)).run_decompositions())
    assert [row.reason for row in fxexpand.report(left).refusals] == [
        "its 1.weight holds NaN or Inf. Load a sound checkpoint"
    ]


def test_a_weight_held_by_a_graph_itself_is_expanded() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    model, x = Direct().double(), torch.randn(2, 3, dtype=torch.float64)
    big = fxexpand.expand(torch.export.export(model, (x,)), example_inputs=(x,))
    (row,) = fxexpand.report(big).rows
    assert row.action == "expanded" and "in weight space" in row.reason
    assert_same(big(x), model(x), EXACT)
    small = fxexpand.fuse(big, scope="expanded")
    assert list(small.state_dict()) == ["weight"]
    assert_same(small(x), model(x), EXACT)
