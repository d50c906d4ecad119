"""The ``Expand`` pass expands what ``expand`` expands: the same sites, whatever reads the weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxexpand import Chain, DOConv, expand, report
from fxexpand.kernel import modules as kernel_modules
from fxexpand.layers.accumulation import accumulate
from fxexpand.passes import Expand, Fuse, check, sites
from fxexpand.tracing.edit import reread
from fxexpand.tracing.graphs import trace
from tests.compare import assert_same
from tests.graphs import EXACT, residual
from tests.networks import ConvNet, Language, perturb, train_steps


class Functional(nn.Module):
    """Weights that the forward reads itself, in each way that is a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(7, 5))
        self.filters = nn.Parameter(torch.randn(4, 5, 3))
        self.many = nn.ParameterList([torch.randn(2, 6, 6), torch.randn(6)])
        self.layer, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bsi,oi->bso", x, self.one) @ self.two
        x = F.conv1d(x.mT, self.filters, padding=1).mT
        x = F.linear(F.pad(x, (0, 2)), self.unused.weight) + self.many[1]
        result: Tensor = (torch.stack([x, x], 1) @ self.many[0]).sum(1) @ self.layer.weight
        return result


class Tied(nn.Module):
    """An embedding whose table is the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x.abs().long().sum(-1) % 9)
        result: Tensor = self.head(hidden) + F.linear(hidden, self.tokens.weight)
        return result


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)
        self.other = nn.MultiheadAttention(6, 2, kdim=4, vdim=6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x)[0])
        result: Tensor = self.other(x, x[..., :4], x)[0]
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.cell = nn.GRU(6, 5, 2), nn.LSTMCell(5, 4)
        self.bilinear = nn.Bilinear(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        last = self.gru(x)[0][-1]
        result: Tensor = self.bilinear(self.cell(last)[0], last)
        return result


class Hooked(nn.Module):
    """Layers that are more than their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.hooked, self.twice, self.read = (nn.Linear(6, 6) for _ in range(3))
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.hooked(self.twice(x))).tanh()
        result: Tensor = self.read(x) + F.linear(x, self.read.weight)
        return result


MODELS: list[Callable[[], nn.Module]] = [Functional, Tied, Attention, Recurrent, Hooked, Language, ConvNet]


def inputs_of(model: nn.Module) -> Tensor:
    if isinstance(model, Language):
        return torch.randint(0, 8, (2, 5))
    shape = (2, 3, 9, 8) if isinstance(model, ConvNet) else (3, 4, 6)
    return torch.randn(shape, dtype=torch.float64)


def kept(model: nn.Module) -> dict[str, Any]:
    """The state of a model, each tensor under the first of its names, as a graph has it."""
    named = {id(tensor): name for name, tensor in reversed(list(model.state_dict(keep_vars=True).items()))}
    return {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if named[id(tensor)] == name
    }


@pytest.mark.parametrize("make", MODELS)
def test_the_pass_expands_the_sites_of_the_function(make: Callable[[], nn.Module]) -> None:
    model = perturb(make().double()).eval()
    x = inputs_of(model)
    traced = trace(model)
    result: Any = check(Expand(Chain(2)), traced, x)
    big = expand(model, Chain(2))

    def changed(found: Any) -> set[str]:
        return {row.site.removesuffix(".weight") for row in found.changed}

    assert changed(result.report) == changed(report(big)) != set()
    assert {row.site for row in result.report.refusals} == {row.site for row in report(big).refusals}
    assert_same(result.graph_module(x), model(x), EXACT)


@pytest.mark.parametrize("make", MODELS)
def test_fuse_undoes_it_after_training_and_a_pickle(make: Callable[[], nn.Module]) -> None:
    model = perturb(make().double()).eval()
    x = inputs_of(model)
    traced = trace(model)
    expanded = Expand(Chain(2))(traced).graph_module
    before = expanded(x).detach()
    missing = {name for name, parameter in expanded.named_parameters() if not parameter.requires_grad}
    assert not missing
    with accumulate(expanded):
        expanded(x).square().mean().backward()
    with torch.no_grad():
        for parameter in expanded.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    trained = expanded(x).detach()
    assert not torch.equal(trained, before)
    copies = [expanded, copy.deepcopy(expanded), trace(expanded), expand(expanded)]
    if make is not Hooked:  # whose hook is no function of a module
        copies.append(pickle.loads(pickle.dumps(expanded)))
    plain = check(Fuse(), traced, x).graph_module
    for again in copies:
        assert_same(again(x), trained, EXACT)
        assert not Expand()(again).modified
        fused = Fuse()(again).graph_module
        assert_same(fused(x), trained, EXACT)
        assert set(kept(fused)) == set(kept(plain))
        assert {name: type(module) for name, module in fused.named_modules() if name} == {
            name: type(module) for name, module in plain.named_modules() if name
        }


def test_weights_of_a_graph_train_as_those_of_the_model() -> None:
    model = Functional().double()
    x, graph = inputs_of(model), Expand(Chain(2))(trace(model)).graph_module
    big = expand(model, Chain(2))
    names = [name for name, _ in big.named_parameters() if "parametrizations" in name]
    assert len(names) >= 8 and set(names) <= {name for name, _ in graph.named_parameters()}
    big.load_state_dict({name: graph.get_parameter(name) for name in names}, strict=False)
    for network in (big, graph):
        network(x).square().sum().backward()
    for name in names:
        assert_same(graph.get_parameter(name).grad, big.get_parameter(name).grad, EXACT)  # type: ignore[arg-type]


def test_recipes_and_initial_values_in_weight_space() -> None:
    model = Functional().double()
    traced = trace(model)
    result = Expand(Chain(2, batch_norm=True))(traced)
    assert not result.modified
    assert all("BatchNorm needs activations" in row.reason for row in result.report.refusals)
    branches: Any = check(Expand(DOConv()), traced, inputs_of(model))
    assert [row.site for row in branches.report.changed] == ["filters"]
    matched = Expand(init="matched", select=["one", "two"])(traced)
    assert [row.site for row in matched.report.changed] == ["one", "two"]
    train_steps(matched.graph_module, inputs_of(model))


def test_an_error_in_place_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace(Functional().double())
    x, code, keys = inputs_of(traced), traced.code, list(traced.state_dict())
    expected = traced(x)
    calls = iter(range(3))

    def failing(*args: Any) -> None:
        if next(calls) == 2:
            raise ZeroDivisionError
        reread(*args)

    monkeypatch.setattr("fxexpand.passes.expand.reread", failing)
    with pytest.raises(ZeroDivisionError):
        Expand(inplace=True)(traced)
    assert traced.code == code and list(traced.state_dict()) == keys
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("as_pass", [False, True])
def test_the_kernel_of_a_site_is_found_once(as_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = residual()
    network: Any = trace(model) if as_pass else model
    asked: list[nn.Module] = []
    original = kernel_modules.kernel_of

    def counted(module: nn.Module, **options: Any) -> Any:
        asked.append(module)
        return original(module, **options)

    for module in [
        kernel_modules,
        *(m for n, m in __import__("sys").modules.items() if n.startswith("fxexpand")),
    ]:
        if getattr(module, "kernel_of", None) is original:
            monkeypatch.setattr(module, "kernel_of", counted)
    found = [site.module for site in sites.find_sites(network)]
    assert not asked
    if as_pass:
        Expand(inplace=True)(network)
    else:
        expand(network, inplace=True)
    counts = [asked.count(module) for module in found]
    assert counts and set(counts) == {1}
