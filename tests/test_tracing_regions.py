"""Regions, leaves, the cost of a trace, and the models of timm and torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand.tracing.graphs import regions, trace
from fxexpand.tracing.guards import mode_of
from fxexpand.tracing.tracer import RegionTracer
from tests.compare import assert_same
from tests.test_tracing import Flagged, X


class Gate(nn.Module):
    """Control flow around layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.bare = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x) if x.mean() > 0 else self.bare(x)
        return result


def test_regions_are_the_largest_parts_with_a_graph() -> None:
    shared = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 5), nn.ReLU()),
        Gate(nn.Linear(5, 5), Flagged(), nn.Sequential(nn.Linear(5, 5), Gate(shared))),
        nn.ModuleList([Gate(shared)]),
    )
    found = regions(model)
    # "1.bare" is a leaf, and what is shared belongs to the first region that has it.
    assert [name for name, _ in found.graphs] == ["0", "1.body.2.1.body"]
    for name, graph_module in found.graphs:
        assert_same(graph_module(X), model.get_submodule(name)(X), 0.0)
    reasons = {
        "control flow": ["", "1", "1.body", "1.body.2", "1.body.2.1", "2.0"],
        "train and eval": ["1.body.1"],
        "earlier region": ["2.0.body", "2.0.body.0"],
        "forward": ["2"],
    }
    assert set(found.failures) == {name for names in reasons.values() for name in names}
    for reason, names in reasons.items():
        assert all(reason in found.failures[name] for name in names)

    whole = regions(nn.Sequential(nn.Linear(5, 5)))
    assert [name for name, _ in whole.graphs] == [""] and whole.failures == {}


def test_regions_know_leaves_by_their_full_names() -> None:
    model = Gate(nn.Sequential(nn.Linear(5, 5), nn.ReLU()))
    found = regions(model, leaf=lambda name, module: name == "body.0")
    assert [name for name, _ in found.graphs] == ["body"]
    targets = [node.target for node in found.graphs[0][1].graph.nodes if node.op == "call_module"]
    assert targets == ["0"]


def test_the_cost_is_linear_in_the_size_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in look-ups: fx's own tracer goes through all parameters at each read of one."""
    reads = 0

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    walked = nn.Module.named_parameters

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal reads
        for item in walked(self, *args, **kwargs):
            reads += 1
            yield item

    monkeypatch.setattr(nn.Module, "named_parameters", counted)
    counts = []
    for size in (20, 40):
        reads = 0
        trace(nn.Sequential(*[Scale() for _ in range(size)]))
        counts.append(reads)
    assert counts[1] <= 2.1 * counts[0]


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "levit_128s"])
def test_timm_models(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = {"vit_tiny_patch16_224": 32, "levit_128s": 224}.get(name, 32)
    options = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=3, **options).eval()
    graph_module = trace(model, example_inputs=torch.randn(1, 3, size, size))
    # LeViT caches its position bias in eval mode: a graph per mode.
    assert mode_of(graph_module) == ("eval" if name == "levit_128s" else None)


def test_timm_s_own_leaves() -> None:
    layers = pytest.importorskip("timm.layers")
    pytest.importorskip("timm.models")
    model = nn.Sequential(layers.Conv2dSame(4, 3, 3, stride=2), nn.ReLU())
    assert [node.target for node in trace(model).graph.find_nodes(op="call_module")] == ["0", "1"]


def test_torchvision_s_operators_are_leaves_and_its_blocks_are_not() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.mobilenet_v2(num_classes=3, width_mult=0.25)
    graph_module = trace(model, example_inputs=torch.randn(1, 3, 32, 32))
    kinds = {
        type(graph_module.get_submodule(node.target))
        for node in graph_module.graph.find_nodes(op="call_module")
    }
    assert nn.Conv2d in kinds and nn.Sequential not in kinds
    ops = pytest.importorskip("torchvision.ops")
    stochastic = nn.Sequential(nn.Linear(5, 5), ops.StochasticDepth(0.5, "row"))
    assert mode_of(trace(stochastic)) is None
    assert RegionTracer().is_leaf_module(ops.DeformConv2d(1, 1, 1), "x")
