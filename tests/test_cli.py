"""The command line: results on stdout, one line on stderr for every expected error, and the exit codes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import fxexpand
from fxexpand import demo, pipeline
from fxexpand.cli import app
from fxexpand.demo import Digits
from fxexpand.rank import rank_report

DIGITS = "fxexpand.demo:Digits"
ONE = ("--input", "1,1,8,8")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def expanded() -> nn.Module:
    """A factory for the command line."""
    return pipeline.expand(Digits())


class Shared(nn.Module):
    """A layer that expand refuses: its weight is read as a plain tensor by another class."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.utils.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def test_help_lists_the_commands_and_version_is_the_packages() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("demo", "inspect", "rank", "export", "bench"))
    assert run("--version").stdout == f"fxexpand {fxexpand.__version__}\n"


def test_inspect_shows_each_site() -> None:
    result = run("inspect", DIGITS)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.startswith("expand: 5 expanded\n")
    values = json.loads(run("inspect", DIGITS, "--json", "--select", "conv*", "--depth", "2").stdout)
    assert values["model"] == DIGITS
    actions = {row["site"]: row["action"] for row in values["rows"]}
    assert [name for name, action in actions.items() if action == "expanded"] == ["conv1", "conv2", "conv3"]
    assert "depth=2" in values["rows"][0]["reason"]


def test_rank_reads_the_weights_it_is_given(tmp_path: Path) -> None:
    source = Digits()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    values = json.loads(run("rank", DIGITS, "--weights", tmp_path / "w.safetensors", "--json").stdout)
    assert values == {"model": DIGITS, **rank_report(source).to_dict()}
    assert run("rank", DIGITS).stdout.startswith("weight ")


def test_export_writes_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    result = run("export", f"{__name__}:expanded", *ONE, "--out", path, "--fuse", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "fuse: 8 fused\n"  # five expansions, three norms
    values = json.loads(result.stdout)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Conv") == values["operators"]["Conv"] == 3
    assert values["error"] <= values["tolerance"]


def test_bench_compares_the_three_forms() -> None:
    result = run("bench", DIGITS, *ONE, "--rounds", "8", "--json", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert [row["model"] for row in values["measurements"]] == ["plain", "expanded", "fused"]
    assert (values["rounds"], values["threads"], values["shapes"]) == (8, 1, [[1, 1, 8, 8]])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("inspect", "timm:resnet19"), 2, "Did you mean resnet18"),
        (("inspect", DIGITS, "--select", "cnov*"), 2, "cnov"),
        (("inspect", DIGITS, "--depth", "0"), 2, "depth=0"),
        (("rank", DIGITS, "--weights", "/nowhere.pt"), 2, "/nowhere.pt: No such file or directory"),
        (("export", DIGITS, "--input", "1,3,8,8", "--out", "m.onnx"), 2, "does not take an input of 1x3x8x8"),
        (("export", DIGITS, *ONE, "--out", "/nowhere/m.onnx"), 2, "the folder /nowhere does not exist"),
        (("bench", DIGITS, *ONE, "--backend", "onyx"), 2, "choose from eager, compile, onnxruntime"),
        (("bench", DIGITS, *ONE, "--rounds", "3"), 2, "Take more rounds"),
        (("bench", DIGITS, *ONE, "--device", "gpu"), 2, "device 'gpu'"),
        (("demo", "--out", "/dev/null/demo"), 1, "/dev/null/demo: Not a directory"),
        (("demo", "--train-size", "1797", "--out", "/tmp"), 2, "train_size=1797"),
    ],
)
def test_an_expected_error_is_one_line(
    words: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("fxexpand: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("rnak",), ("rank",), ("demo", "--seeds", "0"), ("rank", DIGITS, "--jsn")])
def test_wrong_usage_is_2(words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 2 and "Error: " in result.stderr and "Traceback" not in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", "inspect", "timm:resnet19")
    assert isinstance(result.exception, fxexpand.SelectionError)


def test_what_a_model_prints_stays_off_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talks_in_this_test.py").write_text(
        "from fxexpand.demo import Digits\ndef net():\n    print('hello')\n    return Digits()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = run("rank", "talks_in_this_test:net", "--json")
    assert json.loads(result.stdout)["model"] == "talks_in_this_test:net" and "hello" in result.stderr


def tiny(folder: Path) -> tuple[str | Path, ...]:
    return ("demo", "--seeds", "1", "--epochs", "1", "--train-size", "50", "--rounds", "8", "--out", folder)


def test_demo_prints_the_table_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no ONNX, no plots: quick
    result = run(*tiny(tmp_path / "a"))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "" and "\x1b" not in result.stdout
    assert "same class, all images" in result.stdout
    assert result.stdout.endswith("a: report.html, report.json, model.safetensors\n")
    result = run(*tiny(tmp_path / "b"), "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "b" / "report.json").read_text())


def test_a_failed_proof_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        fused = pipeline.fuse(model, **options)
        with torch.no_grad():
            fused.get_parameter("fc1.weight").mul_(1.01)
        return fused

    monkeypatch.setattr(demo, "fuse", wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(*tiny(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("fxexpand: demo: fused = expanded: ") and "NO" in result.stdout
    values = json.loads((tmp_path / "report.json").read_text())
    failed = [proof["claim"] for proof in values["proofs"] if not proof["holds"]]
    assert failed[0] == "fused = expanded" and failed[-1] == "same outputs when timed"
    assert values["latency"] is None  # the speed of a wrong network is worth nothing


def test_the_installed_program_runs() -> None:
    program = Path(sys.executable).with_name("fxexpand")
    command = (
        [str(program)] if program.exists() else [sys.executable, "-c", "from fxexpand.cli import app; app()"]
    )
    result = subprocess.run([*command, "inspect", DIGITS], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "5 expanded" in result.stdout
    result = subprocess.run([*command, "rank", "nothing"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("fxexpand: 'nothing' names no model")
