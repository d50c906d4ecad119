"""``expand`` and ``fuse`` on a GraphModule: its layers like any others, its own tensors refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxexpand import expand, fuse, report
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


def test_a_tensor_that_the_graph_holds_is_refused() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(F.linear(x, self.weight))
            return result

    big = expand(fx.symbolic_trace(Holder()))
    assert [row.site for row in report(big).changed] == ["layer"]
    (refusal,) = report(big).refusals
    assert refusal.site == "weight" and "Expand before tracing" in refusal.reason
