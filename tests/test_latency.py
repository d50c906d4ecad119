"""Latency: the statistics on data with known answers, and the structure of a measurement."""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand.deploy.latency import Difference, LatencyReport, Measurement, measure_latency
from fxexpand.deploy.latency.backends import Candidate
from fxexpand.deploy.latency.intervals import median_interval
from fxexpand.errors import FxExpandError, SelectionError, VerificationError


class Block(nn.Module):
    """A small network that can be made slow, and that counts its calls."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.delay = delay
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.delay:
            time.sleep(self.delay)
        return self.drop(self.norm(self.linear(x)))  # type: ignore[no-any-return]


def pair(delay: float) -> dict[str, nn.Module]:
    fast, slow = Block(), Block(delay)
    slow.load_state_dict(fast.state_dict())
    return {"fast": fast, "slow": slow}


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (10, 2), (15, 4), (20, 6), (30, 10), (50, 18)])
def test_the_interval_takes_the_order_statistics_of_the_sign_test(n: int, rank: int) -> None:
    """Ranks from the published table of 95 % non-parametric intervals for a median."""
    samples = [float(i) for i in range(1, n + 1)]
    random.shuffle(samples)
    interval = median_interval(samples)
    assert (interval.low, interval.high) == (rank, n + 1 - rank)
    assert interval.median == (n + 1) / 2


def test_the_interval_covers_as_often_as_it_says() -> None:
    truth = 0.6931471805599453  # the median of the exponential distribution
    hits = sum(
        not median_interval([random.expovariate(1.0) for _ in range(20)]).excludes(truth) for _ in range(3000)
    )
    assert 0.945 <= hits / 3000 <= 0.972  # 0.9586 exactly


def test_too_few_samples_are_an_error() -> None:
    for confidence, enough in ((0.95, 6), (0.9979, 10), (0.5, 2)):
        message = rf"{enough - 1} samples cannot give a {confidence} interval. Take {enough} rounds or more"
        with pytest.raises(SelectionError, match=message):
            median_interval([1.0] * (enough - 1), confidence)
        median_interval([1.0] * enough, confidence)
    with pytest.raises(SelectionError, match="between 0 and 1"):
        median_interval([1.0] * 9, confidence=95)


def test_the_table_of_several_batches_fits_eighty_columns() -> None:
    rows = tuple(
        Measurement("folded back", "onnxruntime", 0.02617, 0.02082, 0.02744, 12345, (), batch, 98304)
        for batch in (1, 128)
    )
    shapes = ((2, 3, 64, 64),)
    report = LatencyReport(rows, (), "cpu", 1, "float32", 2, shapes, 30, 0.95, {"torch": "2.14.1"})
    assert max(map(len, str(report).splitlines()[:4])) <= 80


def test_a_difference_is_real_when_its_interval_excludes_one() -> None:
    real = Difference("a", "b", "eager", 1.2, 1.1, 1.3)
    noise = Difference("a", "b", "eager", 1.2, 0.9, 1.3)
    assert real.real and str(real).endswith("real")
    assert not noise.real and str(noise).endswith("noise")


def test_a_slower_model_is_found_out_and_nothing_is_left_changed() -> None:
    models = pair(delay=0.1)  # long enough to stand out on a busy machine
    models["fast"].train()
    models["slow"].eval()
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in models.items()}
    threads = torch.get_num_threads()
    report = measure_latency(
        models, torch.randn(5, 6), backends=["eager"], rounds=10, round_ms=1.0, threads=2, progress=False
    )
    slow, difference = report.measurement("slow", "eager"), report.difference("fast", "slow", "eager")
    assert slow.low <= slow.median <= slow.high and slow.median >= 100.0
    assert len(slow.samples) == report.rounds == 10 and slow.calls_per_round == 1
    assert difference.real and difference.ratio > 2.0
    assert report.threads == 2 and torch.get_num_threads() == threads
    assert (report.batch, report.shapes, report.dtype) == (5, ((5, 6),), "float32")
    assert models["fast"].training and models["fast"].get_submodule("drop").training
    assert not models["slow"].training
    for name, model in models.items():
        assert all(torch.equal(v, before[name][k]) for k, v in model.state_dict().items())
    text = str(report)
    assert "real" in text and "batch 5" in text and "2 threads" in text and torch.__version__ in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["differences"][0]["real"] is True and len(plain["measurements"]) == 2


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round holds every candidate once, and the order changes."""
    from fxexpand.deploy.latency import timing

    order: list[str] = []
    timed = timing.milliseconds

    def recording(candidate: Candidate, calls: int, device: torch.device) -> float:
        order.append(candidate.model)
        return timed(candidate, calls, device)

    monkeypatch.setattr(timing, "milliseconds", recording)
    measure_latency(
        pair(0.0), torch.randn(2, 6), backends=["eager"], rounds=12, round_ms=0.01, progress=False
    )
    rounds = [tuple(order[i : i + 2]) for i in range(2, len(order), 2)]  # the first two calibrate
    assert len(rounds) == 12
    assert all(sorted(names) == ["fast", "slow"] for names in rounds)
    assert len(set(rounds)) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_backend_runs_the_same_function() -> None:
    pytest.importorskip("onnxruntime")
    models = {name: model.double() for name, model in pair(0.0).items()}
    models["slow"].linear.weight.data *= 1.0 + 1e-12  # type: ignore[union-attr, operator]
    report = measure_latency(models, {"x": torch.randn(3, 6, dtype=torch.float64)}, rounds=7, round_ms=0.5)
    assert [(m.model, m.backend) for m in report.measurements] == [
        (name, backend) for backend in ("eager", "compile", "onnxruntime") for name in ("fast", "slow")
    ]
    assert all(m.median > 0 for m in report.measurements)
    assert len(report.differences) == 3
    assert report.dtype == "float64" and "onnxruntime" in report.versions


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_models_that_differ_are_refused(factor: float) -> None:
    models = pair(0.0)
    models["slow"].linear.weight.data *= factor  # type: ignore[union-attr, operator]
    with pytest.raises(VerificationError, match=r"slow on eager: outputs differ from fast .* above 0\.001"):
        measure_latency(models, torch.randn(4, 6), backends=["eager"])
    assert all(model.training for model in models.values())


def test_another_number_of_outputs_is_refused() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(VerificationError, match="b on eager is not a: outputs hold 2 and 1"):
        measure_latency({"a": nn.Identity(), "b": Twice()}, torch.randn(2), backends=["eager"])


def test_a_model_that_writes_to_its_input_disturbs_nobody() -> None:
    x = torch.randn(3, 6)
    kept = x.clone()
    report = measure_latency(
        {"a": nn.ReLU(inplace=True), "b": nn.ReLU()},
        x,
        backends=["eager"],
        rounds=6,
        round_ms=0.01,
        progress=True,
    )
    assert isinstance(report, LatencyReport)
    assert torch.equal(x, kept)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_models_are_measured_and_left_as_they_are() -> None:
    plain = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).train()
    scripted = torch.jit.script(plain)
    frozen = torch.jit.freeze(torch.jit.script(fxexpand.fuse(plain.eval())))  # has no mode any more
    plain.train()
    models = {"plain": plain, "scripted": scripted, "frozen": frozen}
    report = measure_latency(models, torch.randn(3, 6), backends=["eager"], rounds=9, round_ms=0.01)
    assert all(row.error is not None and row.error < 1e-5 for row in report.measurements)
    assert plain.training and scripted.training and int(plain[1].num_batches_tracked) == 0  # type: ignore
    assert [name for name, _ in scripted.named_buffers()] == [name for name, _ in plain.named_buffers()]


def test_wrong_use_is_an_error_before_any_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    models, x = pair(0.0), torch.randn(2, 6)
    unnamed: list[Any] = [{}, Block()]
    for given in unnamed:
        with pytest.raises(SelectionError, match="models: give them by name"):
            measure_latency(given, x)
    with pytest.raises(SelectionError, match="choose from eager, compile, onnxruntime"):
        measure_latency(models, x, backends=["tpu"])
    with pytest.raises(SelectionError, match=r"backends \['tpu'\]"):
        measure_latency(models, x, backends="tpu")
    with pytest.raises(SelectionError, match="Take 6 rounds or more"):
        measure_latency(models, x, backends=["eager"], rounds=5)
    with pytest.raises(SelectionError, match="warmup=0"):
        measure_latency(models, x, backends=["eager"], warmup=0)
    with pytest.raises(FxExpandError, match="meta device"):
        measure_latency({"a": nn.Linear(2, 2, device="meta")}, x, backends=["eager"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FxExpandError, match="onnxruntime is not installed"):
        measure_latency(models, x, backends=["onnxruntime"])


@pytest.mark.gpu
def test_on_the_gpu_models_are_copied_and_events_time_them() -> None:
    models = pair(0.0)
    report = measure_latency(
        models, torch.randn(5, 6), backends=["eager", "compile"], device="cuda", rounds=7
    )
    assert report.device.startswith("cuda")
    assert all(m.median > 0 for m in report.measurements)
    assert all(p.device.type == "cpu" for model in models.values() for p in model.parameters())
