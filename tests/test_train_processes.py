"""``train`` in several processes: what one process finds, also where it is killed and goes on with others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fxexpand.recipes import Chain
from fxexpand.training import train as job
from fxexpand.training.checkpoint import latest
from fxexpand.training.data import Data
from fxexpand.training.options import Settings
from fxexpand.training.runs import CHECKPOINTS, LOG, WEIGHTS
from tests.compare import assert_same
from tests.processes import ProcessExitedException, ranks


class Network(nn.Module):
    """Two layers, without what depends on the number of processes: BatchNorm, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return logits


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(70) % 3
    images = torch.randn(70, 1, 5, 5, generator=generator, dtype=torch.float64) + labels.view(-1, 1, 1, 1)
    # 21 test images: neither two nor four processes can share them out equally.
    return Data("noise", TensorDataset(images, labels), TensorDataset(images[:21], labels[:21]), 3)


class Killer(job.Watch):
    def __init__(self, at: int) -> None:
        self.at, self.done = at, 0

    def begin(self, step: int, steps: int) -> None:
        self.done = step

    def step(self) -> None:
        self.done += 1
        if self.done == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    _: int, folder: Path, fsdp: bool = False, kill: int = -1, options: dict[str, Any] | None = None
) -> None:
    torch.manual_seed(0)
    settings = Settings(
        "network", "noise", "Chain", epochs=3, batch_size=16, lr=1e-2, ema=0.5, clip=0.3, save_every=2,
        weight_decay=1e-2, decay_on="effective", fsdp=fsdp, **(options or {}),
    )  # fmt: skip
    found = job.train(
        Network().double(), data(), Chain(3, 2), settings, folder, resume=True, watch=Killer(kill)
    )
    assert found.fused_error < 1e-9


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_moves_from_two_processes_to_one_and_to_four(fsdp: bool, tmp_path: Path) -> None:
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    run(0, alone)
    steps = []
    for world, kill in ((2, 3), (1, 7), (4, -1)):
        # In two micro-batches where there are two processes: their number and that of micro-batches are free.
        arguments = (moved, fsdp and world > 1, kill, {"accumulate": 2 if world == 2 else 1})
        if kill < 0:
            ranks(world, run, *arguments)
            continue
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            ranks(world, run, *arguments)
        newest = latest(moved / CHECKPOINTS)
        assert newest is not None
        steps.append(newest.name)
    assert steps == ["step-000000002", "step-000000006"]
    ours, expected = load_file(moved / WEIGHTS), load_file(alone / WEIGHTS)
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert_same(ours[name], weight, rel=1e-7)
    logs = [
        [json.loads(line) for line in (folder / LOG).read_text().splitlines()] for folder in (moved, alone)
    ]
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs, strict=True):
        assert (one["epoch"], one["step"], one["accuracy"]) == (two["epoch"], two["step"], two["accuracy"])
        assert one["ema_accuracy"] == two["ema_accuracy"]
        numbers = [(one["test_loss"], two["test_loss"]), (one["loss"] or 1, two["loss"] or 1)]
        numbers += [(one["ranks"][name], rank) for name, rank in two["ranks"].items()]
        assert all(abs(a - b) < 1e-7 * abs(b) for a, b in numbers)
    assert logs[0][-1]["loss"] < logs[0][1]["loss"]


def normed(_: int, folder: Path) -> None:
    torch.manual_seed(0)
    settings = Settings("network", "noise", epochs=1, batch_size=16, ema=0.5, fsdp=True, select=("conv",))
    found = job.train(Network().double(), data(), Chain(2, 1, batch_norm=True), settings, folder)
    assert found.fused_error < 1e-9 and found.left == ()


def test_a_layer_with_a_bias_and_batch_norms_inside_is_sharded(tmp_path: Path) -> None:
    """Its bias is looked for as a parameter, in either mode, while it is more than that."""
    ranks(2, normed, tmp_path)
    Network().double().load_state_dict(load_file(tmp_path / WEIGHTS))


@pytest.mark.slow
def test_torchrun_starts_the_command(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    options = ["--epochs", "1", "--recipe", "Chain(depth=2, width=1)", "--json", "--fsdp"]
    options += ["--ema", "0.5", "--amp", "bf16", "--accumulate", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*torchrun, "fxexpand", "train", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["processes"] == 2 and found["fused_error"] < 1e-5
    assert found["epochs"][-1]["accuracy"] > 50
    assert (tmp_path / "run" / WEIGHTS).exists()


@pytest.mark.parametrize(("given", "code"), [("--version", 0), ("--nonsense", 2)])
@pytest.mark.parametrize("torchrun", [True, False])
def test_a_process_of_torchrun_does_not_wait_for_threads(given: str, code: int, torchrun: bool) -> None:
    """One of gloo that holds a tensor when Python shuts down aborts it; seen once in a hundred runs."""
    script = (
        "import atexit, runpy; atexit.register(print, 'shut down'); runpy._run_module_as_main('fxexpand')"
    )
    env = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    env |= {"TORCHELASTIC_RUN_ID": "1"} if torchrun else {}
    done = subprocess.run(
        [sys.executable, "-c", script, given], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert (done.stdout if code == 0 else done.stderr).startswith(("fxexpand", "Usage"))
    assert done.stdout.endswith("shut down\n") is not torchrun
