"""The benchmark of training steps: its rivals compute the same, its floor is arithmetic, misses are seen."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import Network
from benchmarks.training import floor, training_cost, training_table
from benchmarks.training.training_steps import CPU, META, Setting, Steps, free_bytes, parametrized, twin
from fxexpand import Chain, expand
from fxexpand.deploy.latency.timing import peak_bytes
from tests.compare import assert_same

CASE = training_cost.Case(Network("timm", "test_resnet"), 32, 2, 3, 2)
NAMES = ["original", "chain", "parametrize", "auto", "accumulate"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return training_cost.measure(CASE, CPU, rounds=2)


def test_a_row_for_every_way_of_training(rows: list[dict[str, Any]]) -> None:
    assert [row["name"] for row in rows] == NAMES
    by_name = {row["name"]: row for row in rows}
    assert all(row["seconds"] > 0 and row["ratio"][1] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert by_name["original"]["ratio"] == [1.0, 1.0, 1.0]
    assert by_name["auto"]["flops"] <= min(by_name["chain"]["flops"], by_name["parametrize"]["flops"])
    assert by_name["accumulate"]["flops"] < by_name["auto"]["flops"]
    assert set(by_name["auto"]["against"]) == {"chain", "parametrize"}
    assert by_name["auto"]["floor"] > 1.0 and by_name["accumulate"]["floor"] > 1.0
    assert len({row["params"] for row in rows}) == 2
    assert all(row["rounds"] == 2 and row["failed"] is None for row in rows)


@pytest.fixture
def grown() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 3)
    )
    return model.double(), expand(model, Chain(3, 2), select=["0", "3"], init="kaiming")


def test_all_ways_share_their_factors_and_compute_the_same(grown: tuple[nn.Module, nn.Module]) -> None:
    _, big = grown
    ways = [big, twin(big, "chain"), twin(big, "collapsed"), parametrized(big)]
    x = torch.randn(5, 4, 4, 4, dtype=torch.float64)
    parameters = list(big.parameters())
    for way in ways:
        assert {id(p) for p in way.parameters()} == {id(p) for p in parameters}
    wanted = [ways[0](x), *torch.autograd.grad(ways[0](x).square().sum(), parameters)]
    for way in ways[1:]:
        for actual, expected in zip(
            [way(x), *torch.autograd.grad(way(x).square().sum(), parameters)], wanted, strict=True
        ):
            assert_same(actual, expected, rel=1e-12)
    form: Any = big[0]  # type: ignore[index]
    assert type(form).__name__ == "ExpandedConv2d" and form.form == "auto", "a copy was changed"


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
        assert 2 * floor.extra_macs(expand(model, recipe), x, 1) == counts[1] - counts[0]
    assert floor.extra_macs(expand(model, recipe), x, 4) < floor.extra_macs(expand(model, recipe), x, 1)


def test_flops_and_what_is_kept_need_no_numbers(grown: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(5, 4, 4, 4, dtype=torch.float64)
    image, mean = 5 * 6 * 2 * 2 * 8, 6 * 8
    for model, products in ((grown[0], 0), (twin(grown[1], "collapsed"), 6 * 2 * 9 + 3 * 24)):
        here, abstract = (Steps(m, y, None, CPU) for m, y in ((model, x), (twin(model), x)))
        abstract = Steps(copy.deepcopy(model).to("meta"), x.to("meta"), None, META)
        assert here.flops() == abstract.flops() > 0
        activations, weights = here.kept()
        assert (activations, weights) == abstract.kept()
        # The images, the map before the norm, its statistics, the map after it, and what the loss keeps.
        assert x.nbytes + 2 * image + 2 * mean <= activations < x.nbytes + 2 * image + 2 * mean + 200
        assert products * 8 <= weights <= 4 * products * 8
        assert (weights == 0) == (products == 0)


def test_peak_memory_is_that_of_what_is_held() -> None:
    def twice_and_free() -> None:
        for _ in range(2):
            a = torch.empty(1_000_000)
            b = torch.empty(500_000)
            del a, b

    assert 6_000_000 <= (peak_bytes(twice_and_free, torch.device("cpu")) or 0) <= 6_100_000
    model = nn.Sequential(nn.Flatten(), nn.Linear(1000, 1000))
    steps = Steps(model, torch.randn(4, 1000), None, CPU)
    assert 4_004_000 <= steps.peak() <= 4_200_000
    assert steps.activation_peak() < 200_000 and model[1].get_parameter("weight").grad is None


def test_accumulation_holds_no_second_set_of_gradients() -> None:
    original = nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(8)])
    big = expand(original, Chain(2, 5))
    factors = sum(p.nbytes for p in big.parameters())
    steps = Steps(big, torch.randn(2, 100), None, CPU, batches=3, shared=True)
    assert factors <= steps.peak() < 1.4 * factors


def told(changes: dict[str, dict[str, Any]], **key: Any) -> list[str]:
    case = {
        **{"network": "torchvision:resnet18", "batch": 32, "size": 64, "depth": 3, "width": 1},
        **{"device": "cpu", "ratio": [1.2] * 3, "floor": 1.15, "seconds": 1.0, "flops": 1, "params": 10},
        **{"peak_bytes": 100, "allowed_bytes": 100, "rounds": 3},
    }
    rivals = {"auto": {"against": {"chain": [0.9, 1.0, 1.1], "parametrize": [0.5] * 3}}}
    found = [{**case, **key, "name": n, **rivals.get(n, {}), **changes.get(n, {})} for n in NAMES]
    text = training_table.summary(found)
    missed = training_table.misses(found)
    assert all(line in text for line in missed) and ("Every target is reached" in text) == (not missed)
    return missed


def test_misses_are_told() -> None:
    assert told({}) == []
    assert "auto: 1.60 of the original, not 1.5" in told({"auto": {"ratio": [1.6] * 3, "floor": 1.6}})[0]
    assert "1.30 of the original" in told({"accumulate": {"ratio": [1.3] * 3, "floor": 1.3}})[0]
    assert told({"auto": {"ratio": [1.6] * 3, "floor": 1.6}}, batch=8) == []
    assert "auto: 1.20 of the floor" in told({"auto": {"floor": 1.0}})[0]
    assert "1.04 of chain" in told({"auto": {"against": {"chain": [1.01, 1.04, 1.05]}}})[0]
    assert "1.10 of the memory allowed" in told({"auto": {"peak_bytes": 110}})[0]
    assert told({"accumulate": {"peak_bytes": 110}, "chain": {"failed": "out of memory"}}) == []
    assert (
        "needs 9 GB"
        in training_table.misses([{**CASE.key, "device": "cpu", "name": "all", "failed": "needs 9 GB"}])[0]
    )


def test_too_little_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_cost, "free_bytes", lambda: 1)
    row, *others = training_cost.measure(CASE, CPU)
    assert row["name"] == "all" and "GB" in row["failed"] and not others
    assert "GB are free" in training_table.summary([row])
    assert 10**8 < free_bytes() < 10**14


def test_the_command_goes_on_where_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
) -> None:
    others = [training_cost.Case(CASE.network, 32, batch, 2, 1) for batch in (1, 3)]
    monkeypatch.setattr(training_cost, "ON_CPU", [CASE, *others])
    asked: list[Any] = []

    def measured(case: Any, *_: Any) -> list[dict[str, Any]]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(case)
        return [{**row, **case.key} for row in rows]

    monkeypatch.setattr(training_cost, "measure", measured)
    out = tmp_path / "cost.json"
    arguments = ["--only", "test_resnet-32-", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        training_cost.main(arguments)
    assert asked == [CASE, others[0]] and not out.exists()
    asked.clear()
    assert training_cost.main(arguments) == 0
    assert asked == [others[1]] and not out.with_suffix(".jsonl").exists()
    written = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in written] == 3 * NAMES
    assert [row["batch"] for row in written[::5]] == [2, 1, 3]
    assert "x original" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert training_cost.main(["--device", "cuda"]) == 0
    assert "not measured" in capsys.readouterr().out


def test_what_runs_on_a_gpu_runs_on_a_cpu() -> None:
    """Autocast, channels-last and torch.compile, as with ``--device cuda``."""
    dry = Setting("cpu", half=True, channels_last=True, compiler="eager")
    case = training_cost.Case(Network("timm", "test_resnet"), 32, 4, 2, 1)
    contest = training_cost.Contest(case, dry)
    contest.warm()
    contest.race(1, 0.0)
    found = contest.rows()
    assert [row["name"] for row in found] == NAMES
    assert all(row["seconds"] > 0 and row["failed"] is None for row in found)
    assert "kept_activations" not in found[0], "the meta device has no autocast"
    way = contest.ways["auto"]
    way.run = way.model  # eagerly, for the hook
    seen: list[Tensor] = []
    stem: Any = next(m for m in way.model.modules() if hasattr(m, "expansion"))
    stem.register_forward_hook(lambda module, args, output: seen.append(output))
    way.loss()
    assert seen[0].dtype == torch.bfloat16 and seen[0].is_contiguous(memory_format=torch.channels_last)
    assert {case for case in training_table.TARGETS if case[-1] == "cuda"} == {
        (*case.key.values(), "cuda") for case in training_cost.ON_CUDA[:2]
    }
