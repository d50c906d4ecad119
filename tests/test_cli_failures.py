"""Whatever goes wrong: one line on stderr, exit code 1 or 2, no traceback, and no file that is not whole."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxexpand
from fxexpand.training.demo import Digits, experiment
from tests.test_cli import DIGITS, ONE, run, tiny

W = "--weights"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        # A wrong name.
        (("inspect", "timm:resnet19"), 2, "Did you mean resnet18"),
        (("rnak", DIGITS), 2, "no command 'rnak'. Did you mean rank?"),
        (("inspect", DIGITS, "--select", "cnov*"), 2, "cnov"),
        (("inspect", DIGITS, "--recipe", "Chian(depth=2)"), 2, "Did you mean Chain?"),
        (("inspect", DIGITS, "--recipe", "Chain(dept=2)"), 2, "Chain has no 'dept'"),
        (("inspect", DIGITS, "--recipe", "Chain(depth=open('x'))"), 2, "write Chain(depth=2"),
        (("inspect", DIGITS, "--recipe", "Chain(depth=0)"), 2, "depth=0"),
        (("bench", DIGITS, *ONE, "--backend", "onyx"), 2, "choose from eager, compile, onnxruntime"),
        (("bench", DIGITS, *ONE, "--device", "gpu"), 2, "device 'gpu'"),
        (("bench", DIGITS, *ONE, "--dtype", "float33"), 2, "Did you mean float32"),
        (("fuse", DIGITS, "--out", "a.pt"), 2, "a.pt: name it a.safetensors"),
        (("fuse", DIGITS, "--out", "a.safetensors", "--scope", "some"), 2, "scope='some'"),
        # A missing file.
        (("rank", DIGITS, W, "/nowhere.pt"), 2, "/nowhere.pt: No such file or directory"),
        (("fuse", DIGITS, W, ".", "--out", "a.safetensors"), 2, ".: Is a directory"),
        # A wrong shape, or none.
        (("export", DIGITS, "--input", "1,3,8,8", "--out", "m.onnx"), 2, "does not take an input of 1x3x8x8"),
        (("export", DIGITS, "--input", "1;1;8;8", "--out", "m.onnx"), 2, "write the shape as 1,3,224,224"),
        (("bench", DIGITS), 2, "Give --input, for example --input 1,3,224,224"),
        (("bench", DIGITS, *ONE, "--rounds", "3"), 2, "rounds or more"),
        # A path that cannot be written.
        (("export", DIGITS, *ONE, "--out", "/nowhere/m.onnx"), 2, "the folder /nowhere does not exist"),
        (("export", DIGITS, *ONE, "--out", "/proc/m.onnx"), 2, "the folder /proc cannot be written to"),
        (("fuse", DIGITS, "--out", "/proc/m.safetensors"), 2, "the folder /proc cannot be written to"),
        (("bench", DIGITS, *ONE, "--html", "/dev/full"), 2, "/dev/full: is a device"),
        (("export", DIGITS, *ONE, "--out", "."), 2, ".: is a folder"),
        (("demo", "--out", "/dev/null/demo"), 2, "/dev/null is a file. Name a folder."),
        (("demo", "--out", "/proc/demo"), 2, "the folder /proc cannot be written to"),
        (("demo", "--train-size", "1797", "--out", "/tmp"), 2, "train_size=1797"),
        # A check that does not hold.
        (("inspect", f"{__name__}:refused", "--strict"), 1, "1 refused, the first: 0 (ParametrizedLinear)"),
        (
            ("rank", f"{__name__}:broken"),
            1,
            "ZeroDivisionError: integer division or modulo by zero (all of it: fxexpand --debug",
        ),
    ],
)
def test_an_expected_error_is_one_line(
    words: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.startswith("fxexpand: ") and result.stderr.count("\n") == 1
    assert result.stdout == "" or "--strict" in words
    assert list(tmp_path.iterdir()) == []


def refused() -> nn.Module:
    """A layer that expand refuses."""
    return nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))


def broken() -> nn.Module:
    """A factory with an error of its own."""
    return nn.Linear(1, 1 // 0)


@pytest.mark.parametrize("words", [("rank",), ("demo", "--seeds", "0"), ("rank", DIGITS, "--jsn")])
def test_wrong_usage_is_2(words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 2 and "Error: " in result.stderr and "Traceback" not in result.stderr


def test_debug_shows_the_traceback() -> None:
    assert isinstance(run("--debug", "inspect", "timm:resnet19").exception, fxexpand.SelectionError)
    assert isinstance(run("--debug", "rank", f"{__name__}:broken").exception, ZeroDivisionError)


class Trap:
    """Makes a file when it is unpickled."""

    path = Path()

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "command", [("rank",), ("fuse", "--out", "a.safetensors"), ("train", "--out", "run")]
)
@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_malicious_pickle_is_refused_and_not_executed(
    command: tuple[str, ...],
    write: Callable[[Any, Path], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Trap.path = tmp_path / "sprung"
    write({"fc1.weight": Trap()}, tmp_path / "w.pt")
    result = run(command[0], DIGITS, *command[1:], W, "w.pt")
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        result.stderr.startswith("fxexpand: w.pt: holds more than tensors") and "\n" not in result.stderr[:-1]
    )
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["w.pt"]
    pickle.loads(pickle.dumps(Trap()))
    assert Trap.path.exists()  # the trap works


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_corrupt_checkpoint_is_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    state = Digits().state_dict()
    for cut in (0, 8, 1000, -1000):
        if name.endswith("pt"):
            torch.save(state, path)
        else:
            save_file(state, path)
        path.write_bytes(path.read_bytes()[:cut])
        result = run("rank", DIGITS, W, path)
        assert (result.exit_code, result.stdout) == (2, ""), cut
        assert result.stderr.startswith(f"fxexpand: {path}: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"fc2.bias": torch.ones(11)}, 2, "size mismatch for fc2.bias"),
        ({"fc2.bais": torch.ones(10)}, 2, "holds 'fc2.bais', which the model lacks"),
        ({"fc2.bias": torch.full((10,), torch.nan)}, 1, "'fc2.bias' holds NaN or Inf"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    change: dict[str, torch.Tensor], code: int, message: str, tmp_path: Path
) -> None:
    save_file({**Digits().state_dict(), **change}, tmp_path / "w.safetensors")
    result = run("fuse", DIGITS, W, tmp_path / "w.safetensors", "--out", tmp_path / "o.safetensors")
    assert result.exit_code == code and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "o.safetensors").exists()


def test_an_expanded_checkpoint_asks_for_the_recipe(tmp_path: Path) -> None:
    torch.save(fxexpand.expand(Digits()).state_dict(), tmp_path / "w.pt")
    result = run("rank", DIGITS, W, tmp_path / "w.pt")
    assert result.exit_code == 2 and "Say with --recipe how it was expanded" in result.stderr


@pytest.mark.parametrize("recipe", [fxexpand.Chain(), fxexpand.RepVGG()])
def test_nan_in_a_checkpoint_names_the_parameter(recipe: fxexpand.Recipe) -> None:
    """In an original one, when an expanded model loads it; in an expanded one, when it is fused."""
    bad = Digits().state_dict()
    bad["conv2.weight"][0, 0, 0, 0] = torch.nan
    big = fxexpand.expand(Digits(), recipe)
    with pytest.raises(fxexpand.UnusableWeightError, match=r"^conv2\.weight \(Conv2d\): holds NaN or Inf"):
        big.load_state_dict(bad)
    state = fxexpand.expand(Digits(), recipe).state_dict()
    name = next(key for key in state if key.startswith("conv2.expansion") and key.endswith("weight"))
    state[name].view(-1)[3] = torch.inf
    big.load_state_dict(state)
    refused = f"its factor {name.removeprefix('conv2.expansion.')} holds NaN or Inf"
    with pytest.raises(fxexpand.RefusedError, match=rf"^conv2 .* {refused}"):
        fxexpand.fuse(big.eval(), scope="expanded", strict=True)
    words = fxexpand.expand(nn.Embedding(7, 5), recipe=fxexpand.Chain())
    with pytest.raises(fxexpand.UnusableWeightError, match=r"^weight \(Embedding\)"):
        words.load_state_dict({"weight": torch.full((7, 5), torch.inf)})
    with torch.no_grad():
        next(words.parameters()).fill_(torch.nan)
    with pytest.raises(fxexpand.RefusedError, match=r"^weight: .* its factor original0 holds NaN"):
        fxexpand.fuse(words, scope="expanded", strict=True)


@pytest.mark.parametrize(
    ("library", "words", "extra"),
    [
        ("timm", ("rank", "timm:resnet10t"), "vision"),
        ("torchvision", ("rank", "torchvision:resnet18"), "vision"),
        ("transformers", ("rank", "transformers:bert"), "zoo"),
        ("onnx", ("export", DIGITS, *ONE, "--out", "m.onnx"), "onnx"),
        ("onnxruntime", ("bench", DIGITS, *ONE, "--backend", "onnxruntime"), "onnx"),
        ("sklearn", ("demo", "--out", "d"), None),
    ],
)
def test_a_missing_library_names_the_extra(
    library: str, words: tuple[str, ...], extra: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    result = run(*words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("fxexpand: ") and result.stderr.count("\n") == 1
    assert library in result.stderr and (extra is None or f'pip install "fxexpand[{extra}]"' in result.stderr)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("command", ["fuse", "demo", "bench"])
def test_a_full_disk_leaves_nothing(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n.startswith("onnx") else find(n))
    out = tmp_path / ("o.safetensors" if command == "fuse" else "page.html")
    words = {
        "fuse": ("fuse", DIGITS, "--out", out),
        "demo": tiny(tmp_path),
        "bench": ("bench", DIGITS, *ONE, "--rounds", "8", "--backend", "eager", "--html", out),
    }[command]
    result = run(*words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "No space left on device." in result.stderr and str(tmp_path) in result.stderr
    assert result.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


@pytest.mark.parametrize("words", [("fuse", "o.safetensors"), ("export", "o.onnx")])
def test_a_write_that_ends_halfway_leaves_nothing(words: tuple[str, str], tmp_path: Path) -> None:
    """A limit on the size of files is as good as a disk that runs full: the first part is written."""
    command = [sys.executable, "-m", "fxexpand", words[0], DIGITS, *ONE, "--out", words[1]]
    result = subprocess.run(command, cwd=tmp_path, preexec_fn=_small_files, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert result.stderr.startswith("fxexpand: ") and result.stderr.count("\n") == 1
    assert "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fxexpand", "rank", DIGITS]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "fxexpand: [Errno 28] No space left on device\n"


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import sys, time\nfrom fxexpand.demo import Digits\n"
        "def net():\n    print('ready', flush=True)\n    time.sleep(60)\n    return Digits()\n"
    )
    command = [sys.executable, "-m", "fxexpand", "export", "slow:net", *ONE, "--out", "m.onnx"]
    # What a shell without job control runs in its background starts with this signal ignored.
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=default
    ) as job:
        assert job.stderr is not None and job.stdout is not None
        assert job.stderr.readline() == "ready\n"  # what a model prints goes to stderr
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=30) == 1
        assert job.stderr.read() == "fxexpand: interrupted. Files that were not finished are not there.\n"
        assert job.stdout.read() == ""
    assert not list(tmp_path.glob("*.onnx*")) and not list(tmp_path.glob(".m*"))


def test_a_failed_proof_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        fused = fxexpand.fuse(model, **options)
        with torch.no_grad():
            fused.get_parameter("fc1.weight").mul_(1.01)
        return fused

    monkeypatch.setattr(experiment, "fuse", wrong)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name.startswith("fxexpand") else None
    )
    result = run(*tiny(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("fxexpand: demo: fused = expanded: ") and "NO" in result.stdout
    values = json.loads((tmp_path / "report.json").read_text())
    failed = [proof["claim"] for proof in values["proofs"] if not proof["holds"]]
    assert failed[0] == "fused = expanded" and failed[-1] == "same outputs when timed"
    assert values["latency"] is None  # the speed of a wrong network is worth nothing
