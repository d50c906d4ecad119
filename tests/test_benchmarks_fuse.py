"""What benchmarks/fuse_zoo.py counts, what makes a row fail, and what is written."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm.models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import evidence
from benchmarks.fusing import fuse_verdicts, fuse_zoo, fuzz_fuse
from benchmarks.fusing.operators import operators
from benchmarks.fusing.traps import TRAPS
from benchmarks.models import Network
from fxexpand.running.outputs import outputs_of, worst_error

TINY = Network("timm", "test_resnet")


class Every(nn.Module):
    """One operator of each kind, in more than one way of writing it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3, padding="same"), nn.ConvTranspose2d(4, 4, 2)
        self.norm, self.linear = nn.BatchNorm2d(4), nn.Linear(6, 5, bias=False)
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.norm(self.up(self.conv(x))), self.weight)
        x = F.avg_pool2d(F.pad(x, (1, 0)), 2)
        x = x + x
        x += 1.0
        x = torch.cat([x.sub(x, alpha=2), -x / 2], 1)
        y: Tensor = self.linear(x.transpose(2, 3).flatten(3)[..., :6])
        return y @ torch.ones(5, 2) + F.linear(y, torch.ones(2, 5), torch.ones(2))


def test_operators_are_counted_whoever_wrote_them() -> None:
    model, x = Every().eval(), torch.randn(2, 3, 13, 12)
    expected = {"conv": 3, "linear": 3, "norm": 1, "add": 4, "mul": 2, "pool": 1, "pad": 1, "cat": 1}
    assert operators(model, x) == expected
    with torch.no_grad():
        graph = torch.export.export(copy.deepcopy(model), (x,)).module()
    assert operators(graph, x) == expected


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return fuse_zoo.row_of(TINY, latency=False)


def test_a_row_holds_every_method(row: dict[str, Any]) -> None:
    methods = row["methods"]
    assert list(methods) == ["unfused", "torch.fx", "timm", "fxexpand"]
    assert methods["unfused"]["error64"] == 0.0 < row["noise32"] < 1e-5
    for found in methods.values():
        assert found["flops"] > 0 and found["params"] > 0 and found["conv"] > 3
    assert methods["unfused"]["norm"] > methods["fxexpand"]["norm"]
    assert row["failures"] == [], row["failures"]


def test_each_promise_can_fail(row: dict[str, Any]) -> None:
    methods = row["methods"]
    timm_folds = {**methods["timm"], "norm": 0, "params": methods["fxexpand"]["params"], "add": 0}
    good = {**row, "methods": {**methods, "timm": {**methods["fxexpand"], "norm": -1}}}
    assert fuse_verdicts.failures(good) == [f"norm: {methods['fxexpand']['norm']}, timm -1"]
    broken: dict[str, Any] = {
        "error32": 1.0,
        "error64": 1e-9,
        "conv": 1000,
        "linear": 1000,
        "norm": 1000,
        "flops": 10**12,
        "failed": "RuntimeError: no",
        "failed64": "RuntimeError: no",
    }
    for key, value in broken.items():
        mine = {**methods["fxexpand"], key: value}
        assert len(fuse_verdicts.failures({**row, "methods": {**methods, "fxexpand": mine}})) == 1, key
    for key in ("add", "params"):  # counted against timm's own method where that folds something
        mine = {**methods["fxexpand"], key: 10**9}
        against = {"timm": timm_folds, "unfused": methods["unfused"], "fxexpand": mine}
        found = fuse_verdicts.failures({**row, "methods": against})
        assert any(each.startswith(f"{key}: 1000000000, timm") for each in found)
        against["timm"] = {**timm_folds, "error32": 0.3}  # a peer that is wrong is no measure
        assert fuse_verdicts.failures({**row, "methods": against}) == []


def test_a_wrong_fold_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = fuse_zoo.METHODS["fxexpand"]

    def slightly_wrong(model: nn.Module, x: Tensor) -> nn.Module:
        small = folded(model, x)
        next(p for p in small.parameters() if p.ndim == 4).data.mul_(1.001)
        return small

    monkeypatch.setitem(fuse_zoo.METHODS, "fxexpand", slightly_wrong)
    [failure] = fuse_zoo.row_of(TINY, latency=False)["failures"]
    assert "relative error" in failure


def test_the_traps_catch_folds_by_type() -> None:
    rows = {name: fuse_zoo.measure(name, *build()) for name, build in TRAPS.items()}
    assert {name: row["failures"] for name, row in rows.items() if row["failures"]} == {}
    wrong = {
        (name, method)
        for name, row in rows.items()
        for method in ("torch.fx", "timm")
        if row["methods"][method]["error32"] > 0.1
    }
    assert wrong >= {("shared conv", "torch.fx"), ("hooked conv", "torch.fx"), ("norm of steps", "torch.fx")}
    assert ("hooked block", "timm") in wrong
    text = fuse_verdicts.summary([{**row, "name": f"trap:{name}"} for name, row in rows.items()])
    assert "wrong: 0.86 relative error" in text and "torch.fx: 0 fail, 3 wrong" in text


def test_a_crash_is_a_row(monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]) -> None:
    gone = fuse_zoo.row_of(Network("timm", "no_such_network"), latency=False)
    assert "no_such_network" in " ".join(gone["failures"])

    def fails(model: nn.Module, x: Tensor) -> nn.Module:
        raise TypeError("not\nthis one")

    monkeypatch.setitem(fuse_zoo.METHODS, "timm", fails)
    failed = fuse_zoo.row_of(TINY, latency=False)
    text = fuse_verdicts.summary([row, gone, {**failed, "name": "other"}], ["absent"])
    assert "fails: TypeError: not this one" in text and "timm: 1 fail" in text
    assert "2 of 3 networks" in text and "Not in this timm: absent" in text


def test_latency_is_measured_where_the_outputs_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_zoo, "ROUNDS", 10)
    model, x = TRAPS["shared conv"]()
    found = fuse_zoo.latency_ratios(model, {"one": copy.deepcopy(model), "wrong": nn.Conv2d(3, 3, 1)}, x)
    for backend in ("eager", "onnxruntime"):
        ratio = found["one"][backend]
        assert 0 < ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert found["wrong"][backend].startswith("VerificationError")
    eager = found["one"]["eager"]
    monkeypatch.setattr(
        fuse_zoo,
        "latency_ratios",
        lambda plain, fused, x: {key: {"eager": eager, "onnxruntime": "no"} for key in fused},
    )
    row = fuse_zoo.measure("shared conv", model, x, latency=True)
    measured = {method for method, given in row["methods"].items() if "eager" in given}
    assert measured == {"timm", "fxexpand"}  # torch.fx is wrong
    text = fuse_verdicts.summary([row])
    assert f"{eager['ratio']:.2f}  fails" in text


def test_main_goes_on_and_writes(
    row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def row_of(network: Network, latency: bool) -> dict[str, Any]:
        asked.append(str(network))
        return {**row, "name": str(network)}

    monkeypatch.setattr(fuse_zoo, "row_of", row_of)
    monkeypatch.setattr(fuse_zoo, "networks", lambda: [TINY, Network("timm", "test_vit")])
    monkeypatch.setattr(fuse_zoo, "TRAPS", {})
    growth = {"nodes": 20, "left": 10, "params": 100, "seconds": 0.5}
    monkeypatch.setattr(fuse_zoo, "growth_row", lambda name: {**growth, "name": name})
    out = tmp_path / "zoo.json"
    out.with_suffix(".jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert fuse_zoo.main(["--no-latency", "--out", str(out)]) == 0
    assert asked == ["timm:test_vit"]
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [each["name"] for each in written["rows"]] == ["timm:test_resnet", "timm:test_vit"]
    assert [each["name"] for each in written["growth"]][:3] == ["resnet50", "resnet101", "resnet152"]
    assert not out.with_suffix(".jsonl").exists()
    printed = capsys.readouterr().out
    assert "25.00" in printed and fuse_verdicts.summary(written["rows"], written["missing"]) in printed


@pytest.mark.parametrize("name", ["fuse_zoo", "fuzz_fuse"])
def test_the_published_tables_are_those_of_the_saved_results(name: str) -> None:
    path = evidence.FOLDER / "results" / f"{name}.json"
    assert path.exists(), f"run python -m benchmarks.{name} and commit its results"
    saved = json.loads(path.read_text(encoding="utf-8"))
    page = evidence.README.read_text(encoding="utf-8")
    if name == "fuzz_fuse":
        assert fuzz_fuse.summary(saved) in page
    else:
        assert fuse_verdicts.summary(saved["rows"], saved["missing"]) in page
        assert fuse_verdicts.growth_table(saved["growth"]) in page
    assert evidence.headline(saved["machine"]) in page


def test_chains_become_what_they_should() -> None:
    norms, points = fuse_zoo.growth_row("norm-4"), fuse_zoo.growth_row("pointwise-4")
    assert (norms["nodes"], norms["left"]) == (8, 4)
    assert (points["nodes"], points["left"]) == (4, 1)
    assert points["seconds"] > 0


def test_every_file_of_timm_with_a_method_of_its_own_is_there() -> None:
    found = {
        path.stem
        for path in Path(timm.models.__path__[0]).glob("[!_]*.py")
        if re.search(r"def (fuse|reparameterize|switch_to_deploy)\(self", path.read_text(encoding="utf-8"))
    }
    assert "repvit" in found
    assert found <= set(fuse_zoo.OWN)
    names = [network.name for network in fuse_zoo.networks()]
    assert len(names) == len(set(names)) and set(fuse_zoo.QUICK) <= set(names)
    assert not set(names) & set(fuse_zoo.missing())


def test_the_methods_leave_what_they_are_given() -> None:
    model, x = TRAPS["shared norm"]()
    before = outputs_of(model, x)
    for method in fuse_zoo.METHODS.values():
        method(model, x)
        assert worst_error(outputs_of(model, x), before) == 0.0
