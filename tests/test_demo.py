"""The demo, end to end and small: what it wrote is checked with the libraries that others would use."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import fxexpand
from fxexpand.deploy.latency.timing import torch_threads
from fxexpand.lowrank import rank_report
from fxexpand.recipes import Chain
from fxexpand.training.data import digits
from fxexpand.training.demo import FILES, Digits, experiment, run
from fxexpand.training.demo.findings import Findings
from fxexpand.training.options import Schedule
from tests.compare import assert_same

TINY: dict[str, Any] = {"train_size": 100, "schedule": Schedule(epochs=1), "rounds": 8, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "runs" / "demo"


@pytest.fixture(scope="module")
def found(folder: Path) -> Findings:
    return run(folder, seeds=2, **TINY)


@pytest.fixture(scope="module")
def test_set(found: Findings) -> tuple[Tensor, Tensor]:
    dataset = digits(0, 100).test
    assert isinstance(dataset, TensorDataset)
    images, labels = dataset.tensors
    return images, labels


@pytest.fixture(scope="module")
def loaded(found: Findings, folder: Path) -> Digits:
    """A plain network with the weights of the file."""
    network = Digits().eval()
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return network


def test_all_files_are_there_and_nothing_else(found: Findings, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(found.files) == set(FILES)
    assert found.skipped == () and found.failed == ()
    assert len(found.proofs) == 8


def test_the_onnx_file_computes_what_the_weights_do(
    folder: Path, loaded: Digits, test_set: tuple[Tensor, Tensor]
) -> None:
    images, _ = test_set
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    actual = torch.from_numpy(np.asarray(session.run(None, {name: images.numpy()})[0]))
    with torch.no_grad():
        expected = loaded(images)
    assert_same(actual, expected, 1e-5)
    assert torch.equal(actual.argmax(1), expected.argmax(1))


def test_the_figures_are_those_of_the_files(
    found: Findings, folder: Path, loaded: Digits, test_set: tuple[Tensor, Tensor]
) -> None:
    images, labels = test_set
    with torch.no_grad():
        right = int((loaded(images).argmax(1) == labels).sum())
        with FlopCounterMode(display=False) as counter:
            loaded(images[:1])
    assert math.isclose(found.test_accuracy("expanded")[0], 100 * right / len(labels))
    assert found.flops["fused"] == found.flops["plain"] == counter.get_total_flops()
    assert found.flops["expanded"] > found.flops["plain"]
    assert found.parameters["fused"] == sum(p.numel() for p in loaded.parameters())
    ranks = {row.name.removesuffix(".weight"): row.effective_rank for row in rank_report(loaded).rows}
    assert ranks.keys() == found.full_ranks.keys()
    for layer, value in ranks.items():
        assert math.isclose(found.final_rank("expanded", layer)[0], value, rel_tol=1e-5)
        spectrum = torch.linalg.svdvals(loaded.get_submodule(layer).weight.detach().flatten(1).double())  # type: ignore[operator]
        assert_same(torch.tensor(found.spectra[layer][1]).double(), spectrum / spectrum[0], 1e-5)


def test_both_networks_start_from_one_function_and_then_part(found: Findings) -> None:
    for each in found.runs:
        for layer in found.full_ranks:
            plain, expanded = each.plain.ranks[layer], each.expanded.ranks[layer]
            assert math.isclose(plain[0], expanded[0], rel_tol=1e-4)
            assert plain[-1] != expanded[-1]
    assert found.runs[0].plain.loss != found.runs[1].plain.loss


def test_the_two_differ_in_nothing_but_the_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where expand does nothing, both are trained to the same weights: start and batches are the same."""
    for name in ("expand", "fuse"):
        monkeypatch.setattr(experiment, name, lambda model, *arguments, **options: copy.deepcopy(model))
    cpu = torch.device("cpu")
    pair = experiment._pair(0, 100, Schedule(epochs=2), Chain(), cpu, lambda task, steps: None)
    assert pair.run.plain.loss == pair.run.expanded.loss
    assert pair.run.plain.test_accuracy == pair.run.expanded.test_accuracy
    assert pair.run.plain.ranks == pair.run.expanded.ranks


def test_json_table_and_page_hold_the_same_figures(found: Findings, folder: Path) -> None:
    values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert values == json.loads(json.dumps(found.to_dict()))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http:" not in page and "https:" not in page and page.count("<svg") == 4
    text = str(found)
    mean = sum(values["test_accuracy"]["plain"]) / 2
    row = next(line for line in text.splitlines() if line.startswith("test accuracy"))
    assert f" {mean:.2f} ± " in row
    for line in values["verdict"]:
        assert line in page
        assert line in " ".join(text.split())
    assert all(proof["holds"] for proof in values["proofs"])


def test_the_threads_are_given_back(found: Findings) -> None:
    assert torch.get_num_threads() == 1  # conftest's
    torch.set_num_threads(2)
    try:
        with torch_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_without_the_extras_the_rest_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_text("of an earlier run")
    find, missing = importlib.util.find_spec, ("onnxruntime", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    found = run(tmp_path, seeds=1, **TINY)
    assert found.skipped == (experiment.ONNX_MISSING, experiment.PLOTS_MISSING)
    assert 'pip install "fxexpand[onnx]"' in " ".join(str(found).split())
    assert not found.failed and "model.onnx" not in found.files
    assert {path.name for path in tmp_path.iterdir()} == set(found.files)
    assert found.latency is not None and {m.backend for m in found.latency.measurements} == {"eager"}


def perturbed(model: nn.Module, **options: Any) -> nn.Module:
    """A fuse that is off by 0.1 % in one layer."""
    fused = fxexpand.fuse(model, **options)
    with torch.no_grad():
        fused.get_parameter("conv2.weight").mul_(1.001)
    return fused


def test_a_wrong_fuse_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "fuse", perturbed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = run(tmp_path, seeds=1, **TINY)
    assert "fused = expanded" in [proof.claim for proof in found.failed]
    assert "FAILED: fused = expanded" in found.verdict[-1]
    assert {path.name for path in tmp_path.iterdir()} == set(found.files)


def test_each_proof_can_fail() -> None:
    plain = Digits().eval()
    other = copy.deepcopy(plain)
    other.fc2 = nn.Linear(64, 10, bias=False)
    assert not experiment._same_structure(other, plain).holds
    assert experiment._same_structure(copy.deepcopy(plain), plain).holds
    assert not experiment._same_structure(copy.deepcopy(plain).double(), plain).holds
    logits = torch.randn(20, 10)
    assert not experiment._same_outputs("a", logits * 1.001, logits).holds
    assert not experiment._same_outputs("a", logits * math.nan, logits).holds
    assert not experiment._same_classes("a", logits.roll(1, 1), logits).holds
    assert experiment._same_outputs("a", logits.clone(), logits).holds


class Screen(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


def test_bars_are_drawn_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with experiment._bars({"training": 2}, None) as notify:
        notify("training", 1)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with experiment._bars({"training": 2}, None) as notify:
        notify("training", 2)
    assert "training" in screen.getvalue() and "2/2" in screen.getvalue()
