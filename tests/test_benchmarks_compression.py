"""The compression benchmarks in their quick form: what they write, and what makes them fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.compression import expand_then_compress, factorize, lp_low_rank, trp
from benchmarks.evidence import save
from fxexpand import factorize as factorize_model
from fxexpand import report
from fxexpand.training.data import Data, digits
from tests.images import write_cifar


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Data:
    """40 digits to train on, in place of 600."""
    data = digits(0, 40)
    for module in (expand_then_compress, trp):
        monkeypatch.setattr(module, "digits", lambda *_: data)
        monkeypatch.setattr(module, "SHARES", (0.5, 0.3))
    return data


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_factorize_measures_what_it_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert factorize.main(["--quick", "--out", str(tmp_path / "f.json")]) == 0
    [row] = read(tmp_path / "f.json")["runs"]
    assert row["measured"] == pytest.approx(row["predicted"]) and row["measured"] <= 0.5
    assert row["eckart_young"] < 1e-4 and row["layers"] == 4
    assert "test_resnet" in capsys.readouterr().out
    broken: Any = {"measured": 0.6, "fused": 0.9, "eckart_young": 0.1, "lipschitz": False}
    for key, value in broken.items():
        assert factorize.failures({**row, key: value}), key
    assert factorize.failures(row) == []


def test_a_wrong_factor_breaks_the_bounds() -> None:
    model: Any = nn.Sequential(nn.Linear(30, 20))
    small: Any = factorize_of(model)
    found = report(small)
    assert factorize.bounds(model, small, found, 9)["lipschitz"]  # type: ignore[arg-type]
    with torch.no_grad():
        small.get_parameter("0.0.weight").mul_(9.0)
    assert not factorize.bounds(model, small, found, 9)["lipschitz"]  # type: ignore[arg-type]


def factorize_of(model: nn.Module) -> nn.Module:
    return factorize_model(model, rank=3)


def test_expand_then_compress(few: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e.json"
    expand_then_compress.main(["--quick", "--out", str(out)])
    saved = read(out)
    assert len(saved["runs"]) == 1 and set(saved["runs"][0]["arms"]) == {"plain", "expanded, depth 3"}
    assert saved["chain"]["plain, whole"]["bytes"] > 0 and "unfinished" not in saved
    assert "expanded - plain" in capsys.readouterr().out
    expand_then_compress.plot(
        [expand_then_compress.Arm(1), expand_then_compress.Arm(3)], saved["runs"], tmp_path / "e.svg"
    )
    assert (tmp_path / "e.svg").read_text().startswith("<?xml")


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    content = {"benchmark": "x", "settings": {"epochs": 1}, "shares": [0.5]}
    path = tmp_path / "x.json"
    assert expand_then_compress.unfinished(path, content) == []
    save(path, {**content, "runs": [{}], "unfinished": True})
    assert expand_then_compress.unfinished(path, content) == [{}]
    assert expand_then_compress.unfinished(path, {**content, "shares": [0.4]}) == []
    save(path, {**content, "runs": [{}]})
    assert expand_then_compress.unfinished(path, content) == []


def test_the_fewest_flops_that_keep_the_accuracy() -> None:
    points = [{"flops": f, "accuracy": a} for f, a in ((9, 98.0), (5, 97.5), (3, 90.0), (2, 99.0))]
    found = expand_then_compress.fewest(points, 10, 97.0)
    assert found is not None and found["flops"] == 5
    assert expand_then_compress.fewest(points, 10, 99.5) is None


def test_trp(few: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.json"
    trp.main(["--quick", "--out", str(out), "--batch", "20"])
    rows = read(out)["runs"]
    assert len(rows) == len(trp.ARMS) * 2
    assert all(point["flops"] <= point["share"] for row in rows for point in row["points"])
    assert "TRP+Nu - plain" in capsys.readouterr().out
    assert trp.resnet20()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert 0.26e6 < sum(p.numel() for p in trp.resnet20().parameters()) < 0.28e6


@pytest.mark.slow
def test_trp_on_cifar_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path, monkeypatch)
    monkeypatch.setattr(trp, "SHARES", (0.5,))
    out = tmp_path / "t.json"
    arguments = ["--cifar", str(tmp_path), "--epochs", "1", "--seeds", "2", "--batch", "10"]
    assert trp.main([*arguments, "--out", str(out)]) == 0
    written = read(out)
    assert len(written["runs"]) == len(trp.ARMS) * 2 * 2 and "unfinished" not in written
    for row in written["runs"]:
        assert [point["share"] for point in row["points"]] == [0.5] and row["points"][0]["flops"] <= 0.5
        assert len(row["ranks"]) == (0 if row["arm"] == "plain" else 18)
    assert "spatial-wise" in capsys.readouterr().out


def test_lp_low_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "l.json"
    lp_low_rank.main(["--quick", "--out", str(out)])
    rows = read(out)["rows"]
    worst = {way: min(r["l1"] for r in rows if r["way"] == way and r["outliers"]) for way in lp_low_rank.WAYS}
    assert worst["lp p=1"] < worst["SVD"]
    assert {r["method"] for r in read(out)["layers"]} == {"svd", "lp"}
