"""``fxexpand train`` refuses wrong options, checkpoints and data: one line and an exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.recipes import Chain
from fxexpand.reporting.rows import plain
from fxexpand.training import checkpoint
from fxexpand.training import train as job
from fxexpand.training.data import Data
from fxexpand.training.demo import Digits
from fxexpand.training.options import Settings, require_same
from fxexpand.training.runs import CHECKPOINTS, WEIGHTS
from tests.test_train import QUICK, Tiny, run

ERRORS: list[tuple[list[str], int, str]] = [
    (["--data", "cifr"], 2, "--data 'cifr': choose from digits, cifar10, cifar100, imagenet. Did you mean"),
    (["--data", "/tmp"], 2, "Images in folders are --data imagenet --root /tmp."),
    (["--data", "cifar10"], 2, "Say where it is with --root FOLDER."),
    (["--data", "cifar100", "--root", "nowhere"], 2, "nowhere: no intact copy of CIFAR-100"),
    (["--data", "imagenet", "--root", "nowhere"], 2, "nowhere: not laid out as train/<class>/*"),
    (["--recipe", "Chian"], 2, "Did you mean Chain?"),
    (["--recipe", "Chain(batch_norm=True)", "--form", "collapsed"], 1, "expands no layer. conv1 (Conv2d"),
    (["timm:resnet1"], 2, "timm has no model 'resnet1'"),
    ([f"{__name__}:Tiny"], 2, "does not take an input of 1x1x8x8"),
    (["--select", "nope"], 2, "'nope' matches no site"),
    (["--lr", "-1"], 2, "lr=-1.0: choose a positive number."),
    (["--epochs", "0"], 2, "epochs=0: choose 1 or more."),
    (["--ema", "1"], 2, "ema=1.0: choose a decay below 1"),
    (["--optimizer", "lion"], 2, "optimizer='lion': choose from sgd, adamw."),
    (["--accumulate", "7"], 2, "choose a multiple of 7, as there are 1 x 7 processes and micro-batches"),
    (["--batch-size", "5000"], 2, "batch size 5000: choose from 1 to 1200 images."),
    (["--fsdp"], 2, "--fsdp shards over processes: start them with torchrun"),
    (["--lr", "1e30", *QUICK[:4]], 1, "Lower --lr 1e+30."),
    (["--device", "gpu"], 2, "device 'gpu'"),
    (["--out", "/dev/null/run"], 2, "--out /dev/null/run: /dev/null is a file. Name a folder."),
    (["--out", "/proc/run"], 2, "the folder /proc cannot be written to"),  # at once, not after an epoch
    ([f"{__name__}:frozen"], 2, "frozen: no parameter requires gradients. Nothing would train."),
    ([f"{__name__}:Sided", *QUICK], 2, "Sided: gives tuple for 300 images in training mode; scikit-learn"),
]


@pytest.mark.parametrize(
    ("options", "code", "message"), ERRORS, ids=lambda v: " ".join(v) if type(v) is list else ""
)
def test_an_error_is_one_line_and_an_exit_code(
    options: list[str], code: int, message: str, tmp_path: Path
) -> None:
    result = run("--out", tmp_path / "run", *options)
    assert result.exit_code == code, result.output
    assert message in result.stderr and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("fxexpand: ")
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_a_run_is_not_overwritten_nor_resumed_by_another(tmp_path: Path) -> None:
    assert run("--out", tmp_path, *QUICK).exit_code == 0
    cases = [
        ([*QUICK], "holds a run already. Go on with --resume, or name another folder with --out."),
        (
            [*QUICK, "--resume", "--lr", "0.1"],
            "was trained with --lr 0.001, not 0.1. Resume it with the same",
        ),
        ([*QUICK[:4], "--resume"], "was trained with --recipe Chain(depth=2, width=1), not Chain(depth=3"),
        (
            [f"{__name__}:other", *QUICK, "--resume"],
            f"was trained with MODEL fxexpand.demo:Digits, not {__name__}",
        ),
    ]
    for options, message in cases:
        result = run("--out", tmp_path, *options)
        assert result.exit_code == 2 and message in result.stderr, result.output
    file = tmp_path / "file"
    file.touch()
    assert "is a file. Name a folder." in run("--out", file).stderr
    fresh = run("--out", tmp_path / "empty", *QUICK, "--resume")  # so that a job may always say --resume
    assert fresh.exit_code == 0 and "resumed" not in fresh.stdout


def other() -> nn.Module:
    return Digits()


def frozen() -> nn.Module:
    return Digits().requires_grad_(False)


class Sided(Digits):
    """With a side branch in training, as GoogLeNet has two."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


def test_the_checkpoint_of_a_network_that_has_changed_is_refused(tmp_path: Path) -> None:
    labels = torch.arange(12) % 5
    images = TensorDataset(torch.randn(12, 3, 5, 5), labels)
    settings = Settings("m", "d", epochs=1, batch_size=4)
    job.train(Tiny(5), Data("d", images, images, 5), Chain(2, 1), settings, tmp_path)
    changed = nn.Sequential(nn.Flatten(), nn.Linear(75, 5))
    with pytest.raises(SelectionError, match=r"of another model: 'model\.[^']*' is (only|missing) there"):
        job.train(changed, Data("d", images, images, 5), Chain(2, 1), settings, tmp_path, resume=True)
    with pytest.raises(SelectionError, match=r"of another model: 'model.*' is \(5,.*\) there, and"):
        job.train(Tiny(6), Data("d", images, images, 6), Chain(2, 1), settings, tmp_path, resume=True)


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path: Path) -> None:
    """With more images its steps would belong to other epochs, and the log would have one epoch twice."""

    def data(count: int) -> Data:
        images = TensorDataset(torch.randn(count, 3, 5, 5), torch.arange(count) % 5)
        return Data("d", images, images, 5)

    settings = Settings("m", "d", epochs=2, batch_size=4)
    job.train(Tiny(5), data(12), None, settings, tmp_path)
    with pytest.raises(SelectionError, match="was trained on 12 images and tested on 12, not 16 and 16"):
        job.train(Tiny(5), data(16), None, settings, tmp_path, resume=True)
    assert job.train(Tiny(5), data(12), None, settings, tmp_path, resume=True).resumed == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("settings", None),
            ("settings", 5),
            ("sizes", 12),
            ("step", "\x1b"),
            ("step", 1.0),
            ("epochs", {}),
        ),
        *(("epochs", [{}]), ("epochs", [3]), ("scaler", []), ("total", "x"), ("full_ranks", [])),
    ],
)
def test_damaged_values_are_refused_with_their_name(name: str, value: object, tmp_path: Path) -> None:
    images = TensorDataset(torch.randn(12, 3, 5, 5), torch.arange(12) % 5)
    data, settings = Data("d", images, images, 5), Settings("m", "d", epochs=1, batch_size=4)
    job.train(Tiny(5), data, None, settings, tmp_path)
    path = checkpoint.latest(tmp_path / CHECKPOINTS)
    assert path is not None
    (path / "values.json").write_text(json.dumps({**checkpoint.values_of(path), name: value}))
    with pytest.raises(SelectionError, match=r"values\.json is damaged") as caught:
        job.train(Tiny(5), data, None, settings, tmp_path, resume=True)
    assert str(caught.value).isprintable()


def test_text_of_a_checkpoint_does_not_command_the_terminal(tmp_path: Path) -> None:
    settings = Settings("m", "d")
    with pytest.raises(SelectionError, match=r"with MODEL '\\x1b\[2J', not m\.") as caught:
        require_same(tmp_path, settings, {**plain(settings), "model": "\x1b[2J"})
    assert str(caught.value).isprintable()


def test_outputs_must_fit_the_classes(tmp_path: Path) -> None:
    images = TensorDataset(torch.randn(12, 3, 5, 5), torch.arange(12) % 5)
    settings = Settings("tiny", "d", epochs=1, batch_size=4)
    with pytest.raises(
        SelectionError, match=r"tiny: gives \(4, 10\) for 4 images; d has 5 classes, so \(4, 5\)"
    ):
        job.train(Tiny(), Data("d", images, images, 5), None, settings, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FxExpandError, match="expands no layer"):
        job.train(nn.Flatten(), Data("d", images, images, 75), Chain(2, 1), settings, tmp_path)
