"""The passes refuse a site with the true reason, and an error leaves the graph as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxexpand.errors import UnusableWeightError
from fxexpand.kernel.lower import to_module
from fxexpand.layers import EXPANDED
from fxexpand.passes import Expand, Factorize, Fuse, check
from fxexpand.recipes import Chain, Recipe
from fxexpand.tracing.edit import ModuleUses
from fxexpand.tracing.graphs import trace
from tests.compare import assert_same
from tests.graphs import (
    EXACT,
    action,
    assert_as_before,
    called,
    graph_of,
    state_of,
)


class Entangled(nn.Module):
    """Layers that are more than their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Linear(4, 4)
        self.hooked = nn.Linear(4, 4)
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)
        self.tied, self.tie = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tie.weight = self.tied.weight
        self.read = nn.Linear(4, 4)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.plain = nn.Parameter(torch.randn(4, 4))
        self.replaced = nn.Linear(4, 4)
        vars(self.replaced)["forward"] = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.read(self.tie(self.tied(self.hooked(self.free(x))))))
        x = self.replaced(x @ self.plain + F.linear(x, self.read.weight))
        result: Tensor = self.attention(x, x, x)[0]
        return result


def test_sites_that_are_more_than_their_calls_are_expanded_as_in_the_model() -> None:
    model = Entangled().double().eval()
    graph_module = trace(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    result = check(Expand(), graph_module, x)
    expanded: Any = result.graph_module
    assert {row.site for row in result.report.changed} == {  # type: ignore[attr-defined]
        *("free", "hooked", "tied.weight", "read", "attention.in_proj_weight", "attention.out_proj"),
        *("plain", "replaced"),
    }
    assert type(expanded.hooked) is EXPANDED[nn.Linear] and called(expanded)[:2] == ["free.0", "free.1"]
    assert expanded.tied.parametrizations.weight is expanded.tie.parametrizations.weight
    assert {"read.parametrizations.weight", "parametrizations.plain"} <= set(called(expanded))
    (refused,) = result.report.refusals  # type: ignore[attr-defined]
    assert refused.site == "normed" and "computed by _WeightNorm" in refused.reason
    fused = Fuse()(graph_module)
    assert {row.site for row in fused.report.refusals} >= {"hooked", "tied", "tie"}
    assert {"hooked", "tied", "tie", "replaced", "attention"} <= set(called(fused.graph_module))
    assert_same(fused.graph_module(x), model(x), EXACT)
    back = check(Fuse(), expanded, x).graph_module
    assert called(back) == called(fused.graph_module)
    assert list(back.state_dict()) == list(fused.graph_module.state_dict())
    refused = {row.site: row.reason for row in Factorize(rank=1)(graph_module).report.refusals}
    assert "hooks" in refused["hooked"] and "read outside" in refused["read"]
    assert all("fxexpand.factorize" in refused[site] for site in ("hooked", "read", "plain", "tied.weight"))


class Failing(Recipe):
    """Builds one block and fails at the next."""

    def build(self, kernel: Any, **options: Any) -> nn.Sequential:
        if kernel.in_channels == 4:
            raise ZeroDivisionError
        return Chain(2).build(kernel, **options)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_error_leaves_the_input_as_it_was(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = graph_of(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    )
    state, code = state_of(graph_module), graph_module.code
    with pytest.raises(ZeroDivisionError):
        Expand(Failing(), inplace=inplace)(graph_module)
    assert_as_before(graph_module, state, code)
    calls = iter(range(2))

    def failing(kernel: Any) -> nn.Module:
        if next(calls) == 1:
            raise ZeroDivisionError
        return to_module(kernel)

    monkeypatch.setattr("fxexpand.passes.fusions.to_module", failing)
    with pytest.raises(ZeroDivisionError):
        Fuse(inplace=inplace)(graph_module)
    assert_as_before(graph_module, state, code)


def test_unusable_input() -> None:
    graph_module = graph_of(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        graph_module.get_parameter("2.weight")[0, 0] = float("nan")
    with pytest.raises(UnusableWeightError, match=r"^2\.weight \(Linear 3->3\)"):
        Expand()(graph_module)
    for run in (Expand(), Fuse()):
        with pytest.raises(TypeError, match="trace"):
            run(nn.Linear(3, 3))  # type: ignore[arg-type]
    lazy = trace(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    assert action(Expand()(lazy), "0") == "refused"


def test_module_uses_name_the_shared_tensors() -> None:
    graph_module = trace(Entangled())
    blocker = ModuleUses(graph_module).blocker(graph_module.get_submodule("tie"))
    assert blocker is not None and "tied.weight and tie.weight" in blocker
