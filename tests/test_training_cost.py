"""The benchmark of training steps: its rivals compute the same, its floor is arithmetic, misses are seen."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_cost
from benchmarks.models import Network
from fxexpand import Chain, expand
from tests.compare import assert_same

CASE = training_cost.Case(Network("timm", "test_resnet"), 32, 2)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(training_cost.measure(CASE, 3, 2, rounds=2, device="cpu"))


def test_a_row_for_every_way_of_training(rows: list[dict[str, Any]]) -> None:
    assert [row["name"] for row in rows] == list(training_cost.NAMES)
    by_name = {row["name"]: row for row in rows}
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert by_name["original"]["ratio"] == 1.0
    assert by_name["auto"]["flops"] <= min(by_name["chain"]["flops"], by_name["parametrize"]["flops"])
    assert by_name["accumulate"]["flops"] < by_name["auto"]["flops"]
    assert by_name["auto"]["floor"] >= 1.0 and by_name["accumulate"]["floor"] >= 1.0
    assert len({row["params"] for row in rows}) == 2


def test_all_ways_compute_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 3)).double()
    big: Any = expand(model, Chain(3, 2))
    by_hand: Any = training_cost.parametrized(big)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    assert_same(by_hand(x), big(x), rel=1e-12)
    assert type(big[0]).__name__ == "ExpandedConv2d", "a copy was changed"
    ours = torch.autograd.grad(big(x).sum(), list(big[0].expansion.parameters()))
    factors = [p for name, p in by_hand[0].named_parameters() if "original" in name]
    for a, b in zip(torch.autograd.grad(by_hand(x).sum(), factors), ours, strict=True):
        assert_same(a, b, rel=1e-12)


@pytest.mark.parametrize("recipe", [Chain(2, 1), Chain(3, 1), Chain(4, 2)], ids=str)
def test_the_floor_counts_what_auto_does(recipe: Chain) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 16, 1, bias=False))
    for size in (5, 40):
        x = torch.randn(1, 8, size, size)
        counts = []
        for network in (model, expand(copy.deepcopy(model), recipe)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(x)
            counts.append(int(counter.get_total_flops()))
        assert 2 * training_cost.extra_macs(expand(model, recipe), x, 1) == counts[1] - counts[0]


def test_peak_memory_is_that_of_what_is_held() -> None:
    def twice_and_free() -> None:
        for _ in range(2):
            a = torch.empty(1_000_000)
            b = torch.empty(500_000)
            del a, b

    assert 6_000_000 <= training_cost.peak_bytes(twice_and_free, "cpu") <= 6_100_000


def test_misses_are_told(rows: list[dict[str, Any]]) -> None:
    good = {
        "network": "torchvision:resnet18",
        "batch": 32,
        "size": 64,
        "depth": 3,
        "width": 1,
        "device": "cpu",
        "ratio": 1.2,
        "floor": 1.15,
        "seconds": 1.0,
        "flops": 1,
        "peak_bytes": 100,
        "params": 10,
    }

    def told(**changes: dict[str, Any]) -> list[str]:
        return training_cost.misses([{**good, "name": n, **changes.get(n, {})} for n in training_cost.NAMES])

    assert told() == []
    assert (
        "auto takes 1.60 of the original, not 1.5"
        in told(auto={"ratio": 1.6, "floor": 1.6}, chain={"ratio": 9}, parametrize={"ratio": 9})[0]
    )
    assert "accumulate takes 1.30" in told(accumulate={"ratio": 1.3, "floor": 1.3})[0]
    assert "auto is 1.20 times the floor" in told(auto={"floor": 1.0})[0]
    assert "slower than chain" in told(chain={"ratio": 1.1})[0]
    assert "slower than parametrize" in told(parametrize={"ratio": 1.1})[0]
    assert "memory" in told(auto={"peak_bytes": 200})[0]
    assert "Not reached" in training_cost.summary(
        [{**good, "name": n, "ratio": 1.4} for n in training_cost.NAMES]
    )
    assert training_cost.summary(rows).count("test_resnet") >= len(rows)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_cost, "CPU", [CASE])
    out = tmp_path / "cost.json"
    arguments = ["--only", "test_resnet-32-2-", "--recipe", "2,1", "--rounds", "1", "--out", str(out)]
    assert training_cost.main(arguments) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == list(training_cost.NAMES)
    assert "x original" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert training_cost.main(["--device", "cuda"]) == 0
        assert "not measured" in capsys.readouterr().out
