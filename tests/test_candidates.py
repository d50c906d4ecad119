"""What is timed: precision, layout, batch sizes, memory, and backends that are not there."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand import fuse, measure_latency, report
from fxexpand.deploy.latency import candidates
from fxexpand.deploy.latency.backends import prepare
from fxexpand.deploy.latency.candidates import Conditions, ready
from fxexpand.deploy.latency.page import latency_page
from fxexpand.deploy.latency.plots import latency_bars
from fxexpand.deploy.latency.timing import peak_bytes
from fxexpand.errors import FxExpandError, SelectionError, VerificationError
from tests.networks import perturb

CPU = torch.device("cpu")
QUICK = {"backends": ["eager"], "rounds": 10, "round_ms": 0.01, "progress": False}


def network() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 35, 4))
    return perturb(nn.Sequential(*layers)).eval()


@pytest.fixture
def models() -> dict[str, nn.Module]:
    plain = network()
    return {"plain": plain, "fused": fuse(plain)}


def test_every_batch_size_has_its_rows(models: dict[str, nn.Module]) -> None:
    report = measure_latency(models, torch.randn(2, 3, 7, 5), batch_sizes=(1, 8), **QUICK)  # type: ignore[arg-type]
    assert [(m.model, m.batch) for m in report.measurements] == [
        ("plain", 1),
        ("fused", 1),
        ("plain", 8),
        ("fused", 8),
    ]
    assert [(d.model, d.other, d.batch) for d in report.differences] == [
        ("plain", "fused", 1),
        ("plain", "fused", 8),
    ]
    assert report.measurement("fused", "eager", 8).batch == 8
    assert report.difference("plain", "fused", "eager", 8).batch == 8
    with pytest.raises(SelectionError, match="was not measured"):
        report.measurement("fused", "eager", 3)
    small, large = (report.measurement("plain", "eager", size).peak_bytes for size in (1, 8))
    assert small is not None and large is not None and large >= 4 * small > 0
    text = str(report)
    assert "eager, batch 8: fused takes" in text and "batches 1, 8 of (2x3x7x5)" in text and "peak" in text
    assert json.loads(json.dumps(report.to_dict()))["measurements"][3]["batch"] == 8
    one = measure_latency(models, torch.randn(2, 3, 7, 5), batch_sizes=[8], **QUICK)  # type: ignore[arg-type]
    assert "batch 8 of (2x3x7x5)" in str(one) and {m.batch for m in one.measurements} == {8}
    same = measure_latency(models, torch.randn(2, 3, 7, 5), **QUICK)  # type: ignore[arg-type]
    assert "batch 2 (2x3x7x5)" in str(same)
    for sizes in ([], [0]):
        with pytest.raises(SelectionError, match="1 or more"):
            measure_latency(models, torch.randn(2, 3, 7, 5), batch_sizes=sizes)


def test_precision_and_layout_are_those_of_copies(models: dict[str, nn.Module]) -> None:
    x = torch.randn(2, 3, 7, 5)
    report = measure_latency(models, x, dtype=torch.bfloat16, channels_last=True, **QUICK)  # type: ignore[arg-type]
    assert (report.dtype, report.channels_last) == ("bfloat16", True)
    assert "bfloat16, channels last" in str(report)
    errors = [m.error for m in report.measurements]
    assert all(error is not None and 1e-4 < error < 0.1 for error in errors)
    for model in models.values():
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert model.get_submodule("0").get_parameter("weight").is_contiguous()
    conditions = Conditions(CPU, torch.float16, True)
    placed = conditions.place(models["plain"])
    weight = placed[0].weight  # type: ignore[index]
    assert isinstance(weight, Tensor) and weight.dtype == torch.float16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    given = conditions.lay_out({"input": x})
    assert isinstance(given, dict) and given["input"].is_contiguous(memory_format=torch.channels_last)


def test_low_precision_hides_no_wrong_model(models: dict[str, nn.Module]) -> None:
    """Off by 1 %, which bfloat16 would not show: the models are compared in their own precision first."""
    with torch.no_grad():
        models["fused"][4].weight *= 1.01  # type: ignore[index]
    with pytest.raises(VerificationError, match=r"fused on eager: outputs differ from plain"):
        measure_latency(models, torch.randn(2, 3, 7, 5), dtype=torch.bfloat16, **QUICK)  # type: ignore[arg-type]


def test_rounding_that_a_network_amplifies_is_no_difference() -> None:
    """Subtracting what is almost the same: both forms are as far from exact as each other, and far."""

    class Cancelling(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.large, self.first = nn.Parameter(torch.tensor(300.0)), first

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.large) - self.large if self.first else (self.large + x) - self.large

    models = {"a": Cancelling(True), "b": Cancelling(False)}
    x = torch.linspace(0.3, 0.9, 7)
    report = measure_latency(models, x, dtype=torch.bfloat16, tolerance=1e-3, **QUICK)  # type: ignore[arg-type]
    assert all(m.error is not None and m.error > 0.1 for m in report.measurements)


def test_what_is_not_available_is_a_row(
    models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 7, 5)
    options = {**QUICK, "backends": ["cudagraphs", "eager", "tensorrt", "onnxruntime"]}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = measure_latency(models, x, skip_unavailable=True, device="cpu", **options)  # type: ignore[arg-type]
    assert {m.backend for m in report.measurements} == {"eager"}
    assert [(u.backend, u.model) for u in report.unavailable] == [
        (backend, model)
        for backend in ("cudagraphs", "tensorrt", "onnxruntime")
        for model in ("plain", "fused")
    ]
    text = str(report)
    assert "cudagraphs, plain: not available: needs a CUDA device, not cpu." in text
    assert "onnxruntime, fused: not available" in text and "is not installed" in text
    assert len(report.to_dict()["unavailable"]) == 6
    with pytest.raises(FxExpandError, match="needs a CUDA device"):
        measure_latency(models, x, device="cpu", **options)  # type: ignore[arg-type]
    options["backends"] = ["cudagraphs"]
    with pytest.raises(FxExpandError, match="latency: cudagraphs, plain: not available"):
        measure_latency(models, x, skip_unavailable=True, device="cpu", **options)  # type: ignore[arg-type]


def test_a_backend_for_some_of_the_models_has_a_page(
    models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def partly(name: str, model: nn.Module, backend: str, *rest: Any) -> Any:
        if (name, backend) == ("fused", "compile"):
            raise FxExpandError("compile: no such operator")
        return replace(prepare(name, model, "eager", *rest), backend=backend)

    monkeypatch.setattr(candidates, "prepare", partly)
    options = {**QUICK, "backends": ["eager", "compile"], "skip_unavailable": True}
    found = measure_latency(models, torch.randn(2, 3, 7, 5), **options)  # type: ignore[arg-type]
    assert [(m.model, m.backend) for m in found.measurements][2:] == [("plain", "compile")]
    page = latency_page("m", found, report(models["fused"]))
    assert "compile, fused: not available: no such operator" in page
    figure = latency_bars(found)
    assert [len(panel.patches) for panel in figure.axes] == [2, 1]


def test_a_wrong_model_is_an_error_even_where_backends_may_be_missing(
    models: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        models["fused"][4].weight *= 1.01  # type: ignore[index]
    x = torch.randn(2, 3, 7, 5)
    with pytest.raises(VerificationError, match="outputs differ"):
        ready(models, x, ["eager"], [None], Conditions(CPU), tmp_path, True)

    def broken(*_: object) -> None:
        raise RuntimeError("could not compile\nand pages more") from ValueError("no such kernel")

    monkeypatch.setattr(candidates, "prepare", broken)
    with pytest.raises(FxExpandError, match="not available: ValueError: no such kernel"):
        ready(models, x, ["eager"], [None], Conditions(CPU), tmp_path, True)


def test_peak_memory_is_that_of_one_call(capfd: pytest.CaptureFixture[str]) -> None:
    def run() -> Tensor:
        held = [torch.ones(250_000) for _ in range(3)]  # 1 MB each
        del held[0]
        return held[0] + held[1]

    peak = peak_bytes(run, CPU)
    assert peak is not None and 3_000_000 <= peak <= 3_100_000
    assert capfd.readouterr().err == ""
    assert peak_bytes(run, torch.device("meta")) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_aotinductor_computes_the_same(models: dict[str, nn.Module], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 7, 5)
    with torch.no_grad():
        candidate = prepare("plain", models["plain"], "aotinductor", x, CPU, tmp_path / "here")
        (actual,) = candidate.outputs()
        assert torch.allclose(actual, models["plain"](x), rtol=1e-4, atol=1e-5)
    assert candidate.on_torch_memory and candidate.queued and candidate.batch == 2


@pytest.mark.gpu
def test_a_captured_graph_computes_the_same(models: dict[str, nn.Module]) -> None:
    report = measure_latency(
        models,
        torch.randn(2, 3, 7, 5),
        device="cuda",
        backends=["eager", "cudagraphs"],
        rounds=7,
        progress=False,
        dtype=torch.bfloat16,
    )
    assert {m.backend for m in report.measurements} == {"eager", "cudagraphs"}
    assert report.measurement("plain", "eager").peak_bytes
