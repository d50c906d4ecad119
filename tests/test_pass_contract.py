"""``passes.check``: the passes keep the contract, and a pass that breaks a clause is caught."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from fxexpand.errors import ContractError
from fxexpand.passes import Expand, Factorize, Fuse, Result, check
from fxexpand.recipes import Chain, RepVGG
from fxexpand.reporting.rows import Report, Row
from fxexpand.running.copying import copied
from fxexpand.tracing.edit import finish, put
from fxexpand.tracing.graphs import trace
from tests.graphs import graph_of, residual
from tests.networks import ConvNet, perturb


class Functional(nn.Module):
    """Weights that the graph reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.one), self.two.T)


PASSES = [Expand(), Expand(RepVGG()), Expand(Chain(2), inplace=True), Fuse(), Fuse(inplace=True)]
APPROXIMATE = [Factorize(rank=2), Factorize(energy=0.5, inplace=True)]


@pytest.mark.parametrize("run", [*PASSES, *APPROXIMATE], ids=str)
def test_every_pass_keeps_the_contract(run: Any) -> None:
    model, x = residual()
    networks = [
        (trace(model), x),
        (trace(perturb(ConvNet().double()).eval()), torch.randn(2, 3, 9, 8, dtype=torch.float64)),
        (trace(Functional().double()), torch.randn(3, 6, dtype=torch.float64)),
    ]
    for graph_module, inputs in networks:
        check(run, graph_module, *(() if run in APPROXIMATE else (inputs,)))
        expanded = Expand()(graph_module).graph_module
        check(run, expanded, *(() if run in APPROXIMATE else (inputs,)))


@dataclass(frozen=True)
class Halve:
    """Halve the weight of every 1 x 1 convolution whose weight is above 1; ``fault`` breaks one clause."""

    fault: str = ""
    inplace: bool = False

    def __call__(self, graph_module: fx.GraphModule) -> Any:
        changed = graph_module if self.fault == "writes" or self.inplace else copied(graph_module)
        if self.fault == "shares":
            changed = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        rows = []
        for node in changed.graph.find_nodes(op="call_module"):
            module = changed.get_submodule(str(node.target))
            if type(module) is not nn.Conv2d:
                continue
            large = bool(module.weight.abs().max() > 1) or self.fault == "again"
            row = Row(
                str(node.target), "Conv2d", "halved" if large else "left", "" if large else "it is small"
            )
            if large:
                new = copy.deepcopy(module)
                new.weight.data.mul_(0 if self.fault == "again" else 1 / module.weight.abs().max())
                put(changed, row.site, new)
            if self.fault == "mute" and large:
                row = Row("0", "Conv2d", "halved")
            if self.fault == "reasonless" and not large:
                row = Row(row.site, "Conv2d", "refused")
            if self.fault != "skips" or large:
                rows.append(row)
        self._break(graph_module, changed)
        modified = any(row.action == "halved" for row in rows)
        report = Report("halve", tuple(rows * 2 if self.fault == "twice" else rows))
        if self.fault == "no report":
            return PassResult(changed, modified)
        if self.fault == "no result":
            return changed
        if self.fault == "always":
            return Result(changed, True, report)
        return Result(changed if modified or self.fault == "new" else graph_module, modified, report)

    def _break(self, given: fx.GraphModule, changed: fx.GraphModule) -> None:
        if self.fault == "hooks":
            given.get_submodule("0").register_forward_hook(lambda *_: None)
        if self.fault == "flags":
            given.get_parameter("0.weight").requires_grad_(False)
        if self.fault == "mode":
            given.get_submodule("1").train()
        if self.fault == "graph":
            next(iter(given.graph.nodes)).name = "renamed"
        if self.fault == "stale":
            node = changed.graph.find_nodes(op="call_module")[0]
            node.replace_all_uses_with(node.args[0])
            changed.graph.erase_node(node)
        if self.fault == "lint":
            changed.graph.find_nodes(op="call_module")[0].target = "nowhere"
        elif self.fault != "stale":
            finish(changed)


FAULTS: dict[str, str] = {
    "writes": "pure: it changes the module that it is given",
    "shares": "pure: the new module shares tensors",
    "hooks": "pure: .* the module 0",
    "flags": "pure: .* the flag of 0.weight",
    "mode": "pure: .* the module 1",
    "graph": "pure: .* the graph",
    "new": "nothing is changed, but the module is new",
    "always": "modified is True, and the report has 0 rows",
    "again": "idempotent: on its own result it changes 0, 2, 3 again",
    "mute": "no row says that 2.weight was changed",
    "skips": r"3 \(Conv2d\) has no row",
    "reasonless": "reasons: 3 is refused without one",
    "twice": "reasons: 0 has 2 rows of halved",
    "stale": "graph: is not recompiled",
    "lint": "graph: does not lint",
    "no report": "no report",
    "no result": "returns a GraphModule",
}


def halvable(factor: float = 3.0) -> fx.GraphModule:
    graph_module = graph_of(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    for name, scale in (("0", factor), ("2", factor), ("3", 0.1)):
        weight: Any = graph_module.get_submodule(name).weight
        weight.data.mul_(scale / weight.abs().max())
    return graph_module


def test_a_pass_of_somebody_else_keeps_it() -> None:
    result = check(Halve(), halvable())
    assert result.modified and result.report.summary == "halve: 2 halved, 1 left"  # type: ignore[attr-defined]
    assert check(Halve(inplace=True), halvable()).modified
    assert not check(Halve(), halvable(0.5)).modified


@pytest.mark.parametrize("fault", FAULTS)
def test_each_clause_is_checked(fault: str) -> None:
    graph_module = halvable(0.5 if fault in ("new", "always") else 3.0)
    with pytest.raises(ContractError, match=f"(?s)Halve.*{FAULTS[fault]}"):
        check(Halve(fault), graph_module)


def test_outputs_are_compared_where_there_are_inputs() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(ContractError, match="outputs changed by a relative"):
        check(Halve(), halvable(), x)
    graph_module = graph_of(nn.Conv2d(3, 3, 1))

    class Nudge(Halve):
        def __call__(self, given: fx.GraphModule) -> Any:
            result = Expand()(given)
            if result.modified:
                result.graph_module.get_parameter("0.0.weight").data.mul_(1 + 1e-8)
            return result

    with pytest.raises(ContractError, match=r"relative [0-9.]+e-09"):
        check(Nudge(), graph_module, x)
