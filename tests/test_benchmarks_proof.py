"""The evidence of FLOPs, latency, ONNX and GPU: what a row holds, what fails it, and what is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import evidence, flops, gpu, latency, onnx_export
from benchmarks.models import Network
from fxexpand import Chain, fuse
from fxexpand.recipes import RepVGG

TINY = Network("timm", "test_resnet")


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return flops.network_row(TINY)


def test_a_network_is_counted_without_weights(counted: dict[str, Any]) -> None:
    assert counted["device"] == "meta" and counted["px"] == 160 and counted["sites"] > 10
    assert counted["fused"] == counted["original"] < counted["expanded"]
    assert counted["all"] <= counted["original"] and counted["differs"] == []
    assert counted["params"][2] == counted["params"][0] < counted["params"][1]
    assert flops.failures(counted) == []


@pytest.mark.parametrize("kind", sorted(flops.SITES))
def test_each_kind_of_site_is_a_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "SITES", {kind: flops.SITES[kind]})
    rows = flops.site_rows([Chain(2, 1), RepVGG()])
    assert rows and all(row["sites"] >= 1 for row in rows)
    assert all(row["original"] == row["fused"] > 0 and flops.failures(row) == [] for row in rows)


def test_what_fails_a_count(counted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "fused": counted["original"] + 2,
        "differs": ["conv1"],
        "all": counted["original"] + 2,
        "params": [1, 2, 3, 1],
        "failed": "why",
    }.items():
        assert len(flops.failures({**counted, key: value})) == 1, key

    def unfused(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return model

    monkeypatch.setattr(flops, "fuse", unfused)
    assert flops.failures(flops.network_row(TINY))
    text = flops.summary([counted], [counted, {**counted, "all": counted["original"] + 2}])
    assert "2 of 3 rows" in text and "NO" in text and "all folded" in text


def test_there_are_forty_networks_and_every_site() -> None:
    names = [str(network) for network in flops.networks()]
    assert len(names) == len(set(names)) >= 40
    assert {"Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "LSTM"} <= set(flops.SITES)
    assert len(flops.networks(quick=True)) == len(flops.QUICK)


def test_latency_of_a_small_network() -> None:
    rows = latency.measure(TINY, 32, rounds=10, exported=False)
    assert [row["form"] for row in rows] == ["original", "expanded", "fused", "all folded"]
    assert "ratio" not in rows[0] and rows[1]["ratio"]["median"] > 1
    assert all(row["error"] < 1e-4 and row["peak_bytes"] > 0 for row in rows)
    text = latency.summary([*rows, {"network": "n", "px": 1, "unavailable": "onnxruntime, n: not available"}])
    assert "all folded" in text and "not available" in text
    fused = {**rows[2], "ratio": {"median": 1.0, "low": 0.9, "high": 1.1, "real": False}}
    assert latency.misses([fused]) == []
    slower = {"median": 1.2, "low": 1.1, "high": 1.3, "real": True}
    faster = {"median": 0.8, "low": 0.7, "high": 0.9, "real": True}
    assert latency.misses([{**fused, "ratio": slower}]) and latency.misses([{**fused, "ratio": faster}])
    assert latency.misses([{**fused, "form": "all folded", "ratio": faster}]) == []
    assert latency.misses([{**fused, "form": "expanded", "ratio": slower}]) == []


def file_row(**changes: Any) -> dict[str, Any]:
    file = {
        "operators": {"Conv": 3, "Add": 2},
        "error": 1e-6,
        "bytes": 10,
        "batch_sizes": [1, 2],
        "opset": 18,
    }
    fused = {**file, "operators": {"Conv": 2}, **changes}
    return {"name": "net", "px": 32, "files": {"original": file, "fused": fused}}


def test_what_fails_a_file() -> None:
    assert onnx_export.failures(file_row()) == []
    assert "1.0e-02" in onnx_export.failures(file_row(error=1e-2))[0]
    assert onnx_export.failures(file_row(error=float("nan")))
    assert "more operators" in onnx_export.failures(file_row(operators={"Conv": 9}))[0]
    assert onnx_export.failures(file_row(failed="no operator")) == ["fused: no operator"]
    text = onnx_export.summary([file_row(), file_row(failed="no operator")])
    assert "3 2" in text and "5 2" in text and "no operator" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_files_of_a_small_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "onnx.json"
    assert onnx_export.main(["--quick", "--out", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    (row,) = written["rows"]
    assert row["files"]["fused"]["error"] < 1e-4 and row["files"]["fused"]["batch_sizes"] == [1, 2, 3]
    layers = row["int8"]["ranges"]["layers"]
    assert any(layer["before"] and layer["after"] for layer in layers.values())
    assert {"onnx", "onnxscript", "onnxruntime"} <= written["machine"].keys()


def gpu_rows() -> dict[str, Any]:
    measured = {
        "network": "timm:net",
        "dtype": "bfloat16",
        "channels_last": True,
        "backend": "eager",
        "batch": 64,
        "original_ms": [2.0, 1.9, 2.1],
        "fused_ms": [1.0, 0.9, 1.1],
        "ratio": [0.5, 0.4, 0.6],
        "real": True,
    }
    form = {"provider": "CUDAExecutionProvider", "error": 1e-6, "operators": {"Conv": 2}, "bytes": 1000}
    step = {
        **{"network": "timm:net", "size": 64, "batch": 8, "depth": 3, "width": 1, "name": "auto"},
        **{"failed": None, "seconds": 0.01, "ratio": [1.0, 1.2, 1.3], "peak_bytes": 5000},
    }
    return {
        "latency": [measured, {**measured, "backend": "tensorrt", "unavailable": "net: built without"}],
        "onnx": [{"network": "timm:net", "original": form, "fused": form}],
        "training": [step, {**step, "failed": "out of memory"}],
        "skipped": ["compile, timm:net: not measured: out of time"],
    }


def test_the_gpu_tables_say_what_is_missing() -> None:
    text = gpu.summary(gpu_rows())
    for part in ("0.500 [0.400, 0.600]", "CUDA ", "1.20", "out of memory", "out of time", "built without"):
        assert part in text
    nothing = gpu.summary({"latency": [], "onnx": [], "training": [], "skipped": []})
    assert nothing.count("not measured") == 3


def test_a_stage_that_fails_or_has_no_time_is_noted(tmp_path: Path) -> None:
    run = gpu.Run(tmp_path / "gpu.json", budget=1000.0)

    def broken() -> list[dict[str, Any]]:
        raise RuntimeError("no kernel\nfor this")

    run.stage("latency", "a", lambda: [{"network": "a"}])
    run.stage("onnx", "b", broken)
    run.budget = 200.0
    run.stage("compile", "c", broken)
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["latency"] == [{"network": "a"}] and set(written["seconds"]) == {
        "latency, a",
        "onnx, b",
        "compile, c",
    }
    assert written["skipped"] == [
        "onnx, b: not measured: RuntimeError: no kernel for this",
        "compile, c: not measured: out of time",
    ]


def test_without_a_gpu_nothing_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out)]) == 0
    assert "not measured" in capsys.readouterr().out and not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_latency_stage_of_the_gpu_script_runs_on_the_cpu() -> None:
    rows = gpu.latency(TINY, "cpu", ("eager", "cudagraphs"), gpu.COMPILED, (1, 2), 10)
    measured = [row for row in rows if "unavailable" not in row]
    assert [(row["backend"], row["batch"]) for row in measured] == [("eager", 1), ("eager", 2)]
    assert all(row["dtype"] == "bfloat16" and row["channels_last"] for row in rows)
    assert any("needs a CUDA device" in row.get("unavailable", "") for row in rows)


def test_the_published_tables_are_those_of_the_saved_results() -> None:
    page = evidence.README.read_text(encoding="utf-8")
    found = []
    for name in ("flops", "latency", "onnx_export", "gpu"):
        path = evidence.FOLDER / "results" / f"{name}.json"
        if not path.exists():
            _, _, rest = page.partition(f"<!-- {name} -->")
            assert rest.strip().startswith("Not measured"), name
            continue
        saved = json.loads(path.read_text(encoding="utf-8"))
        text = {
            "flops": lambda saved=saved: flops.summary(saved["sites"], saved["rows"]),
            "latency": lambda saved=saved: latency.summary(saved["rows"]),
            "onnx_export": lambda saved=saved: onnx_export.summary(saved["rows"]),
            "gpu": lambda saved=saved: gpu.summary(saved),
        }[name]()
        assert text in page and evidence.headline(saved["machine"]) in page, name
        found.append(name)
    assert "flops" in found


def test_fused_forms_compute_the_same() -> None:
    torch.manual_seed(0)
    model, x = TINY.build().eval(), torch.randn(1, 3, 32, 32)
    models = latency.forms(model, x)
    assert list(models) == ["original", "expanded", "fused", "all folded"]
    assert type(models["fused"]) is type(model)
    with torch.no_grad():
        for each in models.values():
            assert torch.allclose(each(x), fuse(model)(x), atol=1e-4)
