"""A run that is killed, at any moment, and resumed ends as one that was not: bit for bit."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import Dataset, TensorDataset

from fxexpand.recipes import Chain
from fxexpand.training import checkpoint, runs
from fxexpand.training import train as job
from fxexpand.training.average import Average
from fxexpand.training.data import Data
from fxexpand.training.distributed import Processes
from fxexpand.training.loop import Loop
from fxexpand.training.options import Settings
from fxexpand.training.runs import CHECKPOINTS, LOG, WEIGHTS
from fxexpand.training.state import State
from tests.compare import assert_same
from tests.processes import ProcessExitedException, started

STEPS, EPOCHS = 6, 3


class Network(nn.Module):
    """A convolution, a BatchNorm, dropout and a Linear: what has weights, buffers and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))
        return logits


class Noisy(Dataset[tuple[Any, ...]]):
    """A data set that draws random numbers whenever an image is read, as crops and flips do."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i] + 0.1 * torch.randn(1, 5, 5), int(self.labels[i])


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 3
    images = torch.randn(50, 1, 5, 5, generator=generator) + labels.view(-1, 1, 1, 1)
    return Data("noise", Noisy(images[:50], labels), TensorDataset(images[:20], labels[:20]), 3)


SETTINGS: dict[str, dict[str, Any]] = {
    "adamw, average, fp16": {"ema": 0.8, "amp": "fp16", "clip": 1.0, "warmup": 0.5},
    "sgd, accumulate": {"optimizer": "sgd", "lr": 0.05, "accumulate": 2, "weight_decay": 1e-3},
}


class Killer(job.Watch):
    """Kills its own process after a step."""

    def __init__(self, at: int) -> None:
        self.at, self.done = at, 0

    def begin(self, step: int, steps: int) -> None:
        self.done = step

    def step(self) -> None:
        self.done += 1
        if self.done == self.at:
            die()


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(rank: int, folder: Path, name: str, moment: str | int | None, resume: bool) -> None:
    """Train, and die at the moment: after a step, or in the midst of writing."""
    torch.manual_seed(0)
    model = Network()
    settings = Settings(
        "noise", "noise", "Chain", epochs=EPOCHS, batch_size=8, save_every=2, **SETTINGS[name]
    )
    if isinstance(moment, str):
        place, _, call = moment.partition(" ")
        kill_at_call(place, int(call))
    step = moment if isinstance(moment, int) else -1
    recipe = Chain(depth=2, width=2)
    job.train(model, data(), recipe, settings, folder, resume=resume, watch=Killer(step))


PLACES: dict[str, tuple[Any, str]] = {
    "tensors": (state_dict_saver, "save"),
    "values": (checkpoint, "write_whole"),
    "removal": (shutil, "rmtree"),
    "log": (runs, "write_whole"),
}


def kill_at_call(what: str, number: int) -> None:
    owner, attribute = PLACES[what]
    calls: list[int] = []
    original = getattr(owner, attribute)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            if what == "tensors":  # the tensors are written, and nothing else
                original(*arguments, **options)
            die()
        return original(*arguments, **options)

    setattr(owner, attribute, counted)


def kept(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
    """The tensors and the values of the last checkpoint, and the log, without times."""
    path = checkpoint.latest(folder / CHECKPOINTS)
    assert path is not None
    [file] = path.glob("*.safetensors")
    values = checkpoint.values_of(path)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [{**line, "seconds": 0} for line in values.pop("epochs")] == [
        {**line, "seconds": 0} for line in lines
    ]
    return load_file(file), {**values, "seconds": 0}, [{**line, "seconds": 0} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nobody interrupted."""
    folders = {name: tmp_path_factory.mktemp("whole") / "run" for name in SETTINGS}
    for name, folder in folders.items():
        run(0, folder, name, None, False)
    return folders


FIRST, SECOND = SETTINGS
# A step between checkpoints, one at a checkpoint, one at the end of an epoch; a checkpoint without its
# values, one with the older one still there; a log that is ahead of the checkpoint.
MOMENTS = [
    (FIRST, 5),
    (SECOND, 5),
    (FIRST, 8),
    (SECOND, 12),
    (FIRST, "tensors 3"),
    (SECOND, "values 4"),
    (FIRST, "removal 3"),
    (SECOND, "log 2"),
]


@pytest.mark.parametrize(("name", "moment"), MOMENTS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    name: str, moment: str | int, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        started(1, run, folder, name, moment, False)
    assert not (folder / WEIGHTS).exists()
    run(0, folder, name, None, True)
    assert (folder / WEIGHTS).read_bytes() == (whole[name] / WEIGHTS).read_bytes()
    (tensors, values, log), (expected, other, wanted) = kept(folder), kept(whole[name])
    assert log == wanted and len(log) == EPOCHS + 1 and log[-1]["step"] == EPOCHS * STEPS
    assert values == other
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected[key]), key
    assert [path.name for path in (folder / CHECKPOINTS).iterdir()] == ["step-000000018"]


def test_a_run_of_an_earlier_version_goes_on(whole: dict[str, Path], tmp_path: Path) -> None:
    """From the checkpoint of step 6 that a kill left under version 0.1.0, before its state was one object."""
    folder = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "saved" / "run", folder)
    run(0, folder, FIRST, None, True)
    (tensors, values, log), (expected, other, wanted) = kept(folder), kept(whole[FIRST])
    assert values.keys() == other.keys() and [line["step"] for line in log] == [0, 6, 12, 18]
    assert tensors.keys() == expected.keys() and len(log) == len(wanted)
    for key, tensor in tensors.items():
        if not key.startswith("random."):
            assert_same(tensor.double(), expected[key].double(), 1e-4)


def test_the_state_is_stateful(tmp_path: Path) -> None:
    """Two states of one protocol: what one gives, the other takes, and gives again."""
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Network()
        optimizer = torch.optim.AdamW(model.parameters())
        loop = Loop(model, optimizer, lambda step: 0.1, average=Average(model, 0.5))
        images = torch.randn(2, 1, 5, 5)
        [(loss, count)] = loop.steps([[(images, torch.tensor([0, 1]))]])
        states.append(State(loop, Processes(0, 1, torch.device("cpu")), seed))
        states[-1].total += loss
        assert isinstance(states[-1], Stateful) and count == 2 and loop.step == 1
    one, two = states
    assert not torch.equal(one.total, two.total)
    saved = {name: copy.deepcopy(value) for name, value in one.state_dict().items()}
    two.load_state_dict(saved)
    again = two.state_dict()
    assert list(again) == list(saved) and saved["step"] == 1
    for name, value in saved.items():
        assert torch.equal(value, again[name]) if isinstance(value, Tensor) else value == again[name], name


def test_the_comparison_can_fail(whole: dict[str, Path], tmp_path: Path) -> None:
    name = FIRST
    with pytest.raises(ProcessExitedException):
        started(1, run, tmp_path, name, 5, False)
    path = checkpoint.latest(tmp_path / CHECKPOINTS)
    assert path is not None
    [file] = path.glob("*.safetensors")
    state = load_file(file)
    assert {key.split(".")[0] for key in state} == {"model", "optimizer", "average", "random"}
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    state["random.1.0.cpu"] = torch.Generator().manual_seed(5).get_state()  # another dropout
    save_file(state, file, metadata=about)
    run(0, tmp_path, name, None, True)
    assert (tmp_path / WEIGHTS).read_bytes() != (whole[name] / WEIGHTS).read_bytes()
