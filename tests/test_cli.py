"""The command line: results on stdout, the rest on stderr, JSON, files, and help that answers at once."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import fxexpand
from fxexpand.cli import COMMANDS, app
from fxexpand.cli.options import recipe_of
from fxexpand.cli.output import sites
from fxexpand.lowrank import rank_report
from fxexpand.reporting.rows import Report, Row
from fxexpand.training.demo import Digits
from fxexpand.zoo import load_model

DIGITS = "fxexpand.demo:Digits"
ONE = ("--input", "1,1,8,8")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def settled() -> nn.Module:
    """A network whose norms do something, as after training; a factory for the command line."""
    torch.manual_seed(7)
    model = Digits()
    for norm in (model.norm1, model.norm2, model.norm3):
        assert isinstance(norm.running_mean, torch.Tensor) and isinstance(norm.running_var, torch.Tensor)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    return model


def narrow(text: str) -> bool:
    return all(len(line) <= 80 for line in text.splitlines()) and "\x1b" not in text


def test_help_lists_the_commands_and_version_is_the_packages() -> None:
    result = run("--help")
    assert result.exit_code == 0 and narrow(result.stdout)
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert run("--version").stdout == f"fxexpand {fxexpand.__version__}\n"
    assert run().exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_begins_with_the_line_of_the_list(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0 and narrow(result.stdout)
    assert " ".join(result.stdout.split("\n\n")[1].split()).startswith(COMMANDS[name])


def test_help_answers_at_once() -> None:
    """Without torch: that alone takes ten times as long."""
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fxexpand.cli import COMMANDS, app\n"
        "for words in ([], *([name] for name in COMMANDS)):\n"
        "    assert CliRunner().invoke(app, [*words, '--help']).exit_code == 0\n"
        "assert not {'torch', 'numpy', 'rich', 'timm'} & set(sys.modules)"
    )
    begin = time.process_time()
    subprocess.run([sys.executable, "-c", program], check=True)
    assert time.process_time() - begin < 5  # of this process: it waits


def test_completion_is_offered() -> None:
    text = run("--help").stdout
    assert "--install-completion" in text and "--show-completion" in text
    command = [sys.executable, "-m", "fxexpand"]
    environment = {"_FXEXPAND_COMPLETE": "complete_bash", "COMP_WORDS": "fxexpand in", "COMP_CWORD": "1"}
    program = "from fxexpand.cli import app; app(prog_name='fxexpand')"
    result = subprocess.run([command[0], "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["inspect"]


def test_inspect_shows_the_trace_the_sizes_and_every_site() -> None:
    result = run("inspect", f"{__name__}:settled", *ONE)
    assert result.exit_code == 0 and result.stderr == "" and narrow(result.stdout)
    assert result.stdout.startswith(
        f"{__name__}:settled: Digits, input 1x1x8x8\ntraced as one graph of 15 nodes\n"
    )
    assert "\nfuse: 3 fused, 2 left\n" in result.stdout and "\nexpand: 5 expanded\n" in result.stdout
    values = json.loads(run("inspect", DIGITS, *ONE, "--json").stdout)
    assert (values["before"]["nodes"], values["fused"]["nodes"]) == (15, 12)
    model = Digits()
    assert values["before"]["params"] == sum(p.numel() for p in model.parameters())
    image = torch.randn(1, 1, 8, 8)
    assert values["before"]["flops"] == fxexpand.count_flops(model, image).total
    fused = fxexpand.fuse(model.eval(), image)
    assert values["fused"]["params"] == sum(p.numel() for p in fused.parameters())


def test_inspect_without_an_input_has_no_flops_and_takes_options() -> None:
    words = ("inspect", DIGITS, "--json", "--select", "conv*", "--recipe", "Chain(depth=2)")
    values = json.loads(run(*words).stdout)
    assert values["before"]["flops"] is None and values["inputs"] == {}
    rows = values["expand"]["rows"]
    assert [row["site"] for row in rows if row["action"] == "expanded"] == ["conv1", "conv2", "conv3"]
    assert "depth=2" in rows[0]["reason"]


def test_inspect_says_why_there_is_no_single_graph() -> None:
    result = run("inspect", f"{__name__}:Undecided", "--input", "2,4")
    assert result.exit_code == 0, result.stderr
    assert "traced in parts: 1 graphs of 2 nodes together. The whole has no graph: symbolically traced" in (
        " ".join(result.stdout.split())
    )


class Undecided(nn.Module):
    """Its forward branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x if x.sum() > 0 else -x)
        return y


def test_rank_reads_the_weights_it_is_given(tmp_path: Path) -> None:
    source = Digits()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    values = json.loads(run("rank", DIGITS, "--weights", tmp_path / "w.safetensors", "--json").stdout)
    wanted = json.loads(json.dumps({"model": DIGITS, **rank_report(source).to_dict()}))
    assert values == wanted
    assert run("rank", DIGITS).stdout.startswith("weight ")


def test_rank_compares_and_plots(tmp_path: Path) -> None:
    earlier = tmp_path / "w.safetensors"
    save_file(Digits().state_dict(), earlier)
    options: list[str | Path] = [
        "--before",
        earlier,
        "--input",
        "6,1,8,8",
        "--plot",
        tmp_path / "ranks.svg",
        "--json",
    ]
    values = json.loads(run("rank", DIGITS, *options).stdout)
    table = run("rank", DIGITS, *options[:-1]).stdout
    assert narrow(table) and table.startswith("weight  full  before  effective  share  stable  energy\n")
    assert re.search(r"^conv1 +9 +\S+ +\d\.\d\d +\d\d\.\d% +\d\.\d\d +9\n", table, re.MULTILINE)
    assert "\nfeatures of  points  dimensions  before  effective  stable  distance\n" in table
    assert all(row["before"] is not None for row in values["weights"])
    assert {row["points"] for row in values["features"]} == {6}
    assert "<svg" in (tmp_path / "ranks.svg").read_text()
    failed = run("rank", DIGITS, "--plot", tmp_path / "ranks.txt")
    assert failed.exit_code == 2 and ".svg" in failed.stderr and not (tmp_path / "ranks.txt").exists()


def test_bench_compares_and_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ("bench", f"{__name__}:settled", *ONE, "--rounds", "8", "--threads", "1", "--backend", "eager")
    result = run(*words, "--json", "--recipe", "Chain(depth=2)", "--html", page)
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    names = ["original", "fused", "expanded", "folded back"]
    assert [row["model"] for row in values["measurements"]] == names
    assert (values["rounds"], values["threads"], values["shapes"]) == (8, 1, [[1, 1, 8, 8]])
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 1 and not re.search(r"https?:|<script|<link|@import", text)
    assert all(f"<td>{name}</td>" in text for name in names) and "3 fused, 2 left" in text
    HTMLParser().feed(text)
    result = run(*words)
    assert result.exit_code == 0 and narrow(result.stdout), result.stdout
    assert "fused takes" in result.stdout


def test_bench_without_onnxruntime_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else name)
    result = run("bench", DIGITS, *ONE, "--rounds", "8", "--json")
    assert result.exit_code == 0, result.stderr
    assert 'no onnxruntime figures: run pip install "fxexpand[onnx]"' in result.stderr
    assert {row["backend"] for row in json.loads(result.stdout)["measurements"]} == {"eager"}


def test_ranks_fit_eighty_columns_whatever_the_names(tmp_path: Path) -> None:
    """Of a sketched weight only the effective rank is known, within bounds."""
    model = load_model("timm:vit_tiny_patch16_224")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    found = run(
        "rank", "timm:vit_tiny_patch16_224", "--before", tmp_path / "w.safetensors", "--sketched", "4"
    )
    assert narrow(found.stdout) and "\nblocks.11.attn.qkv  " in found.stdout
    assert re.search(r"^blocks.0.mlp.fc1 +192 .* 1\.00\.\.\d+\.\d\d +- +- +-$", found.stdout, re.MULTILINE)


def test_a_report_fits_eighty_columns_whatever_the_names() -> None:
    long = "features.stages.1.blocks.2.token_mixer.branches.0.conv"
    rows = [
        Row(long, "Conv2d 192->192 k7 p3 g192", "fused", "", 9790, 9600, 3e-8),
        Row("head", "Linear 8->8", "fused", "", 8, 8, 1e-9),
        *(Row(f"{long}{i}", "", "left", f"one kernel would cost {i}.5 times the work") for i in (9, 12)),
        Row("stem", "", "refused", "it has hooks."),
    ]
    lines = sites(Report("fuse", tuple(rows))).splitlines()
    assert narrow("\n".join(lines)) and lines[0] == "fuse: 2 fused, 1 refused, 2 left"
    assert lines[3] == long and " ".join(lines[4].split()) == "Conv2d 192->192 k7 p3 g192 9.79 k 9.60 k 3e-08"
    assert lines[5].split()[:2] == ["head", "Linear"]
    assert lines[6:8] == ["  refused: it has hooks", "    stem"]
    assert lines[8] == "  left: one kernel would cost 9.5 to 12.5 times the work"
    brief = sites(Report("fuse", tuple(rows[2:4] * 2)), every=False).splitlines()
    assert brief[2:] == [f"    {long}9,", f"      {long}12 and 2 more"]


@pytest.mark.parametrize(
    ("text", "options"),
    [("RepVGG", {}), ("Chain(depth=2, width=1.5)", {"depth": 2, "width": 1.5}), (" DBB() ", {})],
)
def test_a_recipe_is_written_as_in_python(text: str, options: dict[str, float]) -> None:
    recipe = recipe_of(text)
    assert type(recipe).__name__ in text
    assert all(getattr(recipe, name) == value for name, value in options.items())


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
    monkeypatch.setattr(  # no ONNX, no plots: quick
        importlib.util, "find_spec", lambda name: name if name.startswith("fxexpand") else None
    )
    result = run(*tiny(tmp_path / "a"))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "" and "\x1b" not in result.stdout
    assert "same class, all images" in result.stdout
    assert result.stdout.endswith("a: report.html, report.json, model.safetensors\n")
    result = run(*tiny(tmp_path / "b"), "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "b" / "report.json").read_text())


def test_the_installed_program_runs() -> None:
    program = Path(sys.executable).with_name("fxexpand")
    command = [str(program)] if program.exists() else [sys.executable, "-m", "fxexpand"]
    result = subprocess.run([*command, "inspect", DIGITS], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "5 expanded" in result.stdout
    result = subprocess.run([*command, "rank", "nothing"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("fxexpand: 'nothing' names no model")
