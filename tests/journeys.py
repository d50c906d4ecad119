"""The whole way of a network: expanded, trained, folded, fused, each step compared in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxexpand
from fxexpand import Chain
from fxexpand.running.copying import copied
from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.outputs import tensors_of
from tests.compare import assert_same
from tests.networks import perturb

EXACT = 1e-10


def outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """The tensors it returns, with the same random numbers each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        return tensors_of(call(model, inputs))


def same(actual: nn.Module, expected: nn.Module, inputs: ExampleInputs, rel: float = EXACT) -> None:
    """Assert that two networks return the same."""
    pairs = zip(outputs(actual, inputs), outputs(expected, inputs), strict=True)
    for a, b in pairs:
        assert_same(a, b, rel)


def journey(model: nn.Module, inputs: ExampleInputs, sites: int, refused: int = 0) -> nn.Module:
    """Expand, train, fold and fuse; returns what ``fuse`` makes of the model."""
    model = perturb(model.double())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    big = fxexpand.expand(model, Chain(depth=3, width=1), example_inputs=inputs)
    report = fxexpand.report(big)
    assert len(report.changed) == sites, str(report)
    assert len(report.refusals) == refused, str(report)
    for training in (True, False):
        same(big.train(training), model.train(training), inputs)
    model.load_state_dict(state)  # training mode moved the statistics
    big.load_state_dict(state)
    trained = copied(big).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        loss: Any = sum(
            out.abs().square().mean() for out in tensors_of(call(trained, inputs)) if out.requires_grad
        )
        loss.backward()
        optimizer.step()
    moved = [(a, b) for (n, a), b in zip(trained.named_parameters(), big.parameters(), strict=True)
             if "expansion" in n or "parametrizations" in n]  # fmt: skip
    assert moved and all(not torch.equal(a, b) for a, b in moved)
    small = fxexpand.fuse(trained.eval(), scope="expanded")
    assert [type(part) for part in small.modules()] == [type(part) for part in model.modules()]
    assert list(small.state_dict()) == list(state)
    same(small, trained, inputs)
    fused = fxexpand.fuse(model.eval(), inputs)
    assert type(fused) is type(model) or isinstance(fused, torch.fx.GraphModule)
    same(fused, model, inputs)
    same(fxexpand.fuse(trained, inputs), trained, inputs)
    return fused
