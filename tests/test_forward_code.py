"""Forwards that list parameters or write into weights: such weights stay parameters in ``expand``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxexpand
from fxexpand import Chain, expand, fuse, report
from tests.compare import assert_same

EXACT = 1e-10


class Pair(nn.Module):
    """Two layers; a subclass uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.both = nn.ModuleList([self.one, self.two])
        self.register_buffer("count", torch.zeros(()))


class Doubled(Pair):
    def forward(self, x: Tensor) -> Any:
        weights = {name: weight * 2 for name, weight in self.one.named_parameters()}
        return self.two(torch.func.functional_call(self.one, weights, (x,)))


class Norms(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(x)) * self.penalty()
        return y

    def penalty(self) -> Any:
        return sum(weight.square().sum() for weight in self.parameters())


class FromState(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.two(x), self.one.state_dict()["weight"])


class Internal(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.two(x), self.one._parameters["weight"])  # type: ignore[arg-type]


class Assigned(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.one.weight.data = self.two.weight * 2
        y: Tensor = self.one(x)
        return y


class Copied(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.one.weight.copy_(self.two.weight)
            self.get_buffer("count").add_(1)
        y: Tensor = self.one(x)
        return y


class Loop(Pair):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.both:
            layer.weight.data = torch.eye(5, dtype=x.dtype)
            x = layer(x)
        return x


class Asks(Pair):
    """Not one of them: it asks for the dtype, and writes into values and buffers."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype)
        self.get_buffer("count").add_(1)
        y: Tensor = self.two(self.one(x).relu_())
        return y.add_(1)


REFUSED: dict[Callable[[], Pair], set[str]] = {
    Doubled: {"one"},
    Norms: {"one", "two"},
    FromState: {"one"},
    Internal: {"one"},
    Assigned: {"one"},
    Copied: {"one"},
    Loop: {"one", "two"},
    Asks: set(),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_weights_that_the_code_needs_as_parameters_stay(
    kind: Callable[[], Pair], given: bool, outer: bool
) -> None:
    inner, x = kind().double(), torch.randn(3, 5, dtype=torch.float64)
    model: nn.Module = nn.Sequential(inner, nn.Tanh()) if outer else inner
    big = expand(model, Chain(depth=2, width=1), example_inputs=x if given else None)
    refused = {row.site.removeprefix("0.") for row in report(big).refusals}
    assert {name.split(".")[0] for name in refused if name} >= REFUSED[kind]
    assert len(report(big).changed) == 2 - len(REFUSED[kind])
    assert_same(big(x), model(x), EXACT)
    assert_same(fuse(big, scope="expanded")(x), big(x), EXACT)


def test_the_reason_names_the_code() -> None:
    (row,) = report(expand(Assigned())).refusals
    assert row.reason == (
        "the forward of Assigned writes into it (self.one.weight.data), "
        "which would factor it anew at each call"
    )
    with pytest.raises(fxexpand.RefusedError, match="lists parameters"):
        expand(Norms(), strict=True)
