"""A network with every kind of layer as a graph, and what tests of passes ask of one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxexpand.passes import Result
from fxexpand.tracing.graphs import trace
from tests.networks import perturb

EXACT = 1e-10  # relative, in float64


class Residual(nn.Module):
    """A small ResNet: strides, groups, a transposed conv, branches, a shared conv, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(
            6, 6, (3, 1), padding="same", dilation=2, groups=6, padding_mode="circular"
        )
        self.bn2 = nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.bn1(self.conv1(x)) + x)
        x = F.relu(self.bn2(self.depthwise(x)))
        x = self.shared(torch.tanh(self.shared(x)))
        x = self.drop(F.relu(self.up(x)))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def residual(training: bool = False) -> tuple[Residual, Tensor]:
    model = perturb(Residual().double()).train(training)
    assert isinstance(model, Residual)
    return model, torch.randn(2, 3, 10, 8, dtype=torch.float64)


def graph_of(*modules: nn.Module) -> fx.GraphModule:
    """A sequence in eval mode, in float64, as a graph."""
    return trace(perturb(nn.Sequential(*modules).double()).eval())


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_as_before(graph_module: fx.GraphModule, state: dict[str, Tensor], code: str) -> None:
    now = graph_module.state_dict()
    assert graph_module.code == code and list(now) == list(state)
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


def called(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.find_nodes(op="call_module")]


def action(result: Result, site: str) -> str:
    return next(row.action for row in result.report.rows if row.site == site)


def reason(result: Result, site: str) -> str:
    return next(row.reason for row in result.report.rows if row.site == site)
