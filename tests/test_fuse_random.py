"""Random networks: fuse keeps outputs and its input, adds no FLOPs, and leaves nothing to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.fusing import fuzz_fuse
from benchmarks.fusing.fuse_zoo import folded
from benchmarks.fusing.fuzz_fuse import check, smaller
from fxexpand.kernel import algebra as laws
from fxexpand.kernel.algebra import Kernel
from tests.dag_operators import random_dag, seeded_dag
from tests.dags import Dag, Step
from tests.networks import perturb

# A case of its own, which torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@st.composite
def dags(draw: st.DrawFn) -> tuple[Dag, Tensor]:
    return random_dag(lambda n: draw(st.integers(0, n - 1)), steps=10)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(dags())
def test_fuse_keeps_what_a_random_network_computes(drawn: tuple[Dag, Tensor]) -> None:
    network, x = drawn
    note(network.listing())
    assert check(network, x)["failures"] == []


def test_a_seed_is_one_network_and_every_operator_is_drawn() -> None:
    one, x = seeded_dag(3)
    two, y = seeded_dag(3)
    assert one.listing() == two.listing() and torch.equal(x, y)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(_tuple(one(x)), _tuple(two(x)), strict=True))
    networks = [seeded_dag(seed)[0] for seed in range(150)]
    text = "\n".join(network.listing() for network in networks)
    wanted = (
        *("Conv1d(", "Conv2d(", "ConvTranspose1d(", "ConvTranspose2d(", "Linear(", "BatchNorm1d("),
        *("BatchNorm2d(", "Identity(", "Dropout(", "IdlePath(", "AvgPool2d(", "F.avg_pool2d(", "ReLU("),
        *("torch.add(", "torch.sub(", ".mul_(", " += ", "torch.neg(", "torch.stack(", "torch.cat("),
        *(".chunk(", "torch.split(", "[:, ::2]", "F.pad(", "F.conv2d(", "F.batch_norm(", ".flatten(1)"),
        *("permute", "transpose(1, 2)", "groups=", "dilation=", "padding=same", "padding_mode=", "(hooked)"),
        *("Parametrized", "LayerNorm("),
    )
    assert [each for each in wanted if each not in text] == []
    pools = [m for network in networks for m in network.modules() if isinstance(m, nn.AvgPool2d)]
    assert {pool.count_include_pad for pool in pools} == {pool.ceil_mode for pool in pools} == {True, False}


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _scaled(law: Callable[..., Kernel]) -> Callable[..., Kernel]:
    def wrong(*args: Any, **options: Any) -> Kernel:
        kernel = law(*args, **options)
        return replace(kernel, weight=kernel.weight * 1.001)

    return wrong


@pytest.mark.parametrize("name", ["compose", "add", "concat"])
def test_a_broken_law_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    law: Callable[..., Kernel] = getattr(laws, name)
    wrong = _scaled(law)
    for module in list(sys.modules.values()):  # wherever it was imported to
        if module.__name__.startswith("fxexpand") and vars(module).get(name) is law:
            monkeypatch.setattr(module, name, wrong)
    seen: set[str] = set()
    for seed in range(60):
        for verify in (True, False):
            failures = check(*seeded_dag(seed), verify=verify)["failures"]
            seen |= {each.split(":")[0] for each in failures}
        if {"outputs", "fuse raises VerificationError"} <= seen:
            return
    pytest.fail(f"{name} off by 0.1 % was not noticed, or only with or without verification: {seen}")


def _pair() -> tuple[Dag, Tensor]:
    """A convolution and its norm."""
    network = Dag()
    network.add_module("m1", nn.Conv1d(2, 3, 1))
    network.add_module("m2", nn.BatchNorm1d(3))
    network.steps = [
        Step("m1({0})", lambda net, x: net.get_submodule("m1")(x), (0,), (1,)),
        Step("m2({0})", lambda net, x: net.get_submodule("m2")(x), (1,), (2,)),
    ]
    network.returned = (2,)
    perturb(network.double().eval())
    return network, torch.randn(2, 2, 5, dtype=torch.float64)


def _off(model: nn.Module, fused: nn.Module) -> None:
    next(iter(fused.parameters())).data.mul_(1.001)


def _writes(model: nn.Module, fused: nn.Module) -> None:
    next(iter(model.parameters())).data.mul_(1.001)


def _works(model: nn.Module, fused: nn.Module) -> None:
    fused.register_forward_hook(lambda module, args, output: output + (torch.eye(3) @ torch.eye(3))[0, 1])


def _crashes(model: nn.Module, fused: nn.Module) -> None:
    fused.register_forward_pre_hook(lambda module, args: args[0][:, :1])


def _raises(model: nn.Module, fused: nn.Module) -> None:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        (None, set()),
        (_off, {"outputs", "again"}),
        (_writes, {"input"}),
        (_works, {"FLOPs", "again"}),
        (_crashes, {"the fused network raises RuntimeError"}),
        (_raises, {"fuse raises RuntimeError"}),
    ],
)
def test_each_promise_can_fail(fault: Any, kinds: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = _pair()

    def faulty(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
        fused = folded(model, x, **options)
        if fault is not None:
            fault(model, fused)
        return fused

    monkeypatch.setattr(fuzz_fuse, "folded", faulty)
    row = check(network, x)
    assert {failure.split(":")[0] for failure in row["failures"]} == kinds
    if fault is None:
        assert (row["before"]["norm"], row["after"]["norm"]) == (1, 0) and row["fused"] == {"Conv1d": 1}


def test_a_failing_network_is_made_smaller() -> None:
    for seed in range(100):
        network, x = seeded_dag(seed)
        if network.listing().count("torch.tanh") == 1 and len(network.steps) > 8:
            break
    small = smaller(network, x, lambda net: "torch.tanh" in net.listing())
    assert len(small.steps) == 1 and "torch.tanh" in small.listing() and not list(small.children())


def test_rows_tables_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "fuzz.json"

    def wrong(network: Dag, x: Tensor, **options: Any) -> dict[str, Any]:
        return {"failures": ["outputs: relative error 1"] if "tanh" in network.listing() else [], **counted}

    counted = {
        "error": 1e-15,
        "before": {"conv": 3},
        "after": {"conv": 2},
        "fused": {"Conv2d": 1},
        "refused": {"zero padding": 1},
        "left": {},
    }
    monkeypatch.setattr(fuzz_fuse, "check", wrong)
    assert fuzz_fuse.main(["--graphs", "30", "--jobs", "1", "--out", str(out)]) == 1
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["graphs"] == 30 and written["before"] == {"conv": 90} and written["after"] == {"conv": 60}
    assert written["failures"] == {"outputs": len(written["failed"])} and 0 < len(written["failed"]) < 30
    assert all("tanh" in row["listing"] and row["steps"] > 0 for row in written["failed"])
    text = fuzz_fuse.summary(written)
    assert "Conv2d" in text and "zero padding" in text and "30 graphs" in text
    assert fuzz_fuse.main(["--show", str(written["failed"][0]["seed"])]) == 1
