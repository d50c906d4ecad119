"""The benchmarks on tiny networks: what a row holds, what makes it fail, and what is written."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import evidence, mkl, profiles
from benchmarks.fusing import roundtrip, surgery_cost
from benchmarks.models import Network, timm_networks, torchvision_networks
from benchmarks.settle import settle
from benchmarks.training import training_table
from fxexpand import expand, fuse
from fxexpand.running.outputs import worst_error

TINY = [Network("timm", "test_resnet"), Network("timm", "test_vit")]
MISSING = Network("timm", "no_such_network")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [roundtrip.measure(network) for network in TINY]


def test_a_good_network_is_a_good_row(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["failures"] == []
        assert row["layers"] == row["expanded_layers"] > 3
        assert 0 < row["error64"] <= 1e-10 and 0 < row["error32"] <= row["tolerance32"]
        assert row["flops"] == row["flops_fused"] > 0
        assert len(row["losses"]) == 3
        assert row["params_expanded"] > row["params"]


def test_a_wrong_expansion_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        big = expand(model, *args, **options)
        with torch.no_grad():
            next(p for name, p in big.named_parameters() if "expansion.1" in name).mul_(1.001)
        return big

    monkeypatch.setattr(roundtrip, "expand", slightly_wrong)
    found = " ".join(roundtrip.measure(TINY[0])["failures"])
    assert "float64" in found and "float32" in found


def test_a_wrong_fold_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        small = fuse(model, *args, **options)
        with torch.no_grad():
            next(p for p in small.parameters() if p.ndim == 4).mul_(1.001)
        return small

    monkeypatch.setattr(roundtrip, "fuse", slightly_wrong)
    assert "fus" in " ".join(roundtrip.measure(TINY[0])["failures"])


def test_each_promise_can_fail(rows: list[dict[str, Any]]) -> None:
    broken: dict[str, Any] = {
        "error64": 1e-9,
        "error32": 1.0,
        "fused_error": 1.0,
        "losses": [1.0, float("nan"), 1.0],
        "class_kept": False,
        "flops_fused": rows[0]["flops"] + 1,
        "missed": ["conv1"],
        "contrast": 0.0,
    }
    for key, value in broken.items():
        assert len(roundtrip.failures({**rows[0], key: value})) == 1, key


def test_a_crash_is_a_row_and_the_table_shows_it(rows: list[dict[str, Any]]) -> None:
    [crashed] = roundtrip.sweep([MISSING], jobs=1, timeout=60.0, threads=1)
    assert crashed["name"] == "timm:no_such_network"
    assert "no_such_network" in " ".join(crashed["failures"])
    text = roundtrip.summary([*rows, crashed])
    assert "2 of 3 networks" in text
    lines = text.splitlines()
    assert sum(line.startswith("timm:") for line in lines) == 3
    assert next(line for line in lines if "test_vit" in line).endswith("all")


def test_an_interrupted_run_goes_on(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def sweep(networks: Any, *_: Any) -> Any:
        for network in networks:
            asked.append(str(network))
            yield rows[1]

    monkeypatch.setattr(roundtrip, "sweep", sweep)
    monkeypatch.setattr(roundtrip, "torchvision_networks", lambda: [])
    monkeypatch.setattr(roundtrip, "timm_networks", lambda: TINY)
    out = tmp_path / "results" / "roundtrip.json"
    out.parent.mkdir()
    out.with_suffix(".jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    assert roundtrip.main(["--out", str(out)]) == 0
    assert asked == ["timm:test_vit"]
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["version"] == 1 and written["machine"]["torch"] == str(torch.__version__)
    assert [row["name"] for row in written["rows"]] == ["timm:test_resnet", "timm:test_vit"]
    assert not out.with_suffix(".jsonl").exists()


def test_surgery_cost_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = surgery_cost.resnet_row("resnet18", rounds=1, batch=2, size=32)
    assert row["sites"] == 21 and row["ratio"] > 0
    network = surgery_cost.network_row("timm:test_resnet", rounds=1, batch=2)
    assert network["size"] == [3, 160, 160] and network["ratio"] > 0
    assert network["result"] > 3 > network["working"] > 0.5  # the copy, and the largest site twice
    monkeypatch.setattr(surgery_cost, "resnet_row", lambda *_, **__: row)
    monkeypatch.setattr(surgery_cost, "network_row", lambda *_, **__: network)
    out = tmp_path / "cost.json"
    assert surgery_cost.main(["--quick", "--out", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [chain["layers"] for chain in written["chains"]] == [10, 100]
    text = surgery_cost.tables(written["resnets"], written["chains"], written["networks"])
    assert "resnet18" in text and "ms / layer" in text


COMMANDS = [file.stem for file in sorted(evidence.FOLDER.glob("*.py")) if "__main__" in file.read_text()]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "mkl"])  # which hands its options on
def test_every_command_has_a_quick_form_that_needs_nothing_else(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `make bench-quick` calls it."""
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert "[--quick]" in usage
    assert "--" not in re.sub(r"\[.*?\]", "", usage, flags=re.DOTALL), "an option is required"


def test_a_profile_says_which_operators_took_the_time() -> None:
    a, x, weight = torch.randn(96, 64), torch.randn(2, 8, 16, 16), torch.randn(8, 8, 3, 3)
    row = profiles.measure("work", lambda: (a.T @ a, torch.conv2d(x, weight)), rounds=2)
    assert row["flops"] == 2 * 64 * 64 * 96 and row["calls"] == 1
    assert row["products"] > 0 and row["convolutions"] > 0 and row["eigenvectors"] == 0.0
    row = profiles.measure("work", lambda: torch.linalg.eigh(a.T @ a), rounds=1)
    assert row["eigenvectors"] > 0 and row["convolutions"] == 0.0
    found = profiles.rates(quick=True)
    assert all(each["value"] > 0 for each in found)
    text = profiles.tables(found, [row])
    assert "eigenvectors, float32" in text and "GFLOP/s" in text


def test_tables_are_published_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- cost -->\nold\n<!-- /cost -->\nbelow\n", encoding="utf-8")
    evidence.publish("cost", "new", page)
    assert page.read_text(encoding="utf-8") == "above\n<!-- cost -->\nnew\n<!-- /cost -->\nbelow\n"
    with pytest.raises(ValueError, match="speed"):
        evidence.publish("speed", "new", page)


def test_figures_with_all_of_mkl_have_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], dict[str, Any]]] = []

    def run(command: list[str], **options: Any) -> Any:
        asked.append((command, options))
        return types.SimpleNamespace(returncode=3)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", run)
        assert mkl.main(["training_cost", "--only", "x"]) == 3
    (compiler, given), (command, options) = asked
    assert given["input"] == mkl.SOURCE and given["check"]
    assert command == [sys.executable, "-m", "benchmarks.training_cost", "--only", "x"]
    assert options["env"]["LD_PRELOAD"] == compiler[-1]
    assert evidence.variant() == "" and "MKL" not in evidence.headline(evidence.machine())
    monkeypatch.setenv(evidence.ALL_OF_MKL, options["env"][evidence.ALL_OF_MKL])
    assert evidence.variant() == "-mkl"
    assert evidence.headline(evidence.machine()).endswith("all kernels of MKL")


SAVED = ("surgery_cost", "surgery_cost-mkl", "training_cost-cpu-mkl", "profiles", "profiles-mkl")


@pytest.mark.parametrize("name", ["roundtrip", *SAVED])
def test_the_published_table_is_that_of_the_saved_results(name: str) -> None:
    path = evidence.FOLDER / "results" / f"{name}.json"
    assert path.exists(), "run the benchmark and commit its results"
    saved = json.loads(path.read_text(encoding="utf-8"))
    page = evidence.README.read_text(encoding="utf-8")
    if name == "roundtrip":
        text = roundtrip.summary(saved["rows"])
    elif name.startswith("training_cost"):
        text = training_table.summary(saved["rows"])
    elif name.startswith("profiles"):
        text = profiles.tables(saved["rates"], saved["profiles"])
    else:
        text = surgery_cost.tables(saved["resnets"], saved["chains"], saved["networks"])
    assert text in page
    assert evidence.headline(saved["machine"]) in page


def test_the_networks_are_those_that_were_promised() -> None:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    assert [network.name for network in torchvision_networks()] == known
    names = [network.name for network in timm_networks()]
    from timm.models import _registry

    assert len({_registry._model_to_module[name] for name in names}) >= 60
    everything = {str(network) for network in (*torchvision_networks(), *timm_networks())}
    assert len(roundtrip.QUICK) == 12 and set(roundtrip.QUICK) <= everything


class Silent(nn.Module):
    """A branch that is switched off, and a BatchNorm as built."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.off = nn.Parameter(torch.zeros(8, 1, 1))
        self.small = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.branch = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        x = x + self.small * self.branch(x) + self.off * x
        return x


def test_settling_switches_everything_on() -> None:
    model, images = Silent().eval(), torch.randn(8, 3, 9, 9)
    settle(model, images)
    assert not model.training and model.norm.momentum == 0.1
    assert bool((model.small >= 0.2).all()) and bool((model.off.abs() > 1e-4).any())
    assert model.norm.running_mean is not None and bool(model.norm.running_mean.any())
    with torch.no_grad():
        before = model(images)
        model.branch.weight.mul_(1.001)
        assert worst_error([model(images)], [before]) > 1e-5
