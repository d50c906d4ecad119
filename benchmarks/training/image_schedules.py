"""Plain against expanded on image data of your own, with the long schedules of the literature.

``python -m benchmarks.generalisation --data cifar10 --root FOLDER [--model torchvision:resnet18] [--device
cuda]``

CIFAR: 180 epochs, the learning rate falls to a tenth at a third and at two thirds, as in the figure of Huh et
al. ImageNet: 90 epochs with the same shares (the schedule of their ImageNet runs is not known to us). SGD
with momentum 0.9; the weight decay is an arm of its own, so that zero is always among them. Each run (arm,
seed) is saved when it is done, and not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.evidence import FOLDER, headline, machine, save
from fxexpand.lowrank import rank_report
from fxexpand.recipes import Chain
from fxexpand.reporting.table import table
from fxexpand.surgery.expand import expand
from fxexpand.training.data import Data, batches, cifar, image_folders
from fxexpand.training.loop import accuracy
from fxexpand.zoo import load_model

DEPTHS = (1, 2, 3)  # 1 is the plain network
EPOCHS = {"cifar10": 180, "cifar100": 180, "imagenet": 90}
DECAYS = (0.0, 5e-4)


@dataclass(frozen=True)
class Run:
    """One training."""

    depth: int
    decay: float
    seed: int

    @property
    def arm(self) -> str:
        """Its name in tables."""
        network = "plain" if self.depth == 1 else f"Chain(depth={self.depth}, width=1)"
        return f"{network}, decay {self.decay:g}"


def load(name: str, root: Path) -> Data:
    """The data set on the disk."""
    if name == "imagenet":
        return image_folders(root)
    return cifar(root, 10) if name == "cifar10" else cifar(root, 100)


def network(name: str, classes: int, seed: int) -> nn.Module:
    """The model with a head for ``classes``, drawn with ``seed``."""
    torch.manual_seed(seed)
    model = load_model(name)
    names = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = model.get_submodule(names[-1])
    assert isinstance(head, nn.Linear)
    if head.out_features != classes:
        model.set_submodule(names[-1], nn.Linear(head.in_features, classes))
    return model


def train(run: Run, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network to the end of its schedule; accuracies, and the mean effective rank."""
    model = network(options.model, data.classes, run.seed)
    if run.depth > 1:
        torch.manual_seed(run.seed)
        model = expand(model, Chain(depth=run.depth, width=1), init="matched")
    device = torch.device(options.device)
    model = model.to(device)
    shuffled = batches(data.train, options.batch, seed=run.seed, workers=options.workers)
    unseen = batches(data.test, options.batch, workers=options.workers)
    epochs = options.epochs or EPOCHS[options.data]
    optimiser = torch.optim.SGD(model.parameters(), options.rate, momentum=0.9, weight_decay=run.decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [epochs // 3, 2 * epochs // 3])
    for _ in range(epochs):
        model.train()
        for images, labels in shuffled:
            optimiser.zero_grad(set_to_none=True)
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            torch.autograd.backward([loss])
            optimiser.step()
        schedule.step()
    rows = rank_report(model).rows
    return {
        "arm": run.arm,
        "seed": run.seed,
        "epochs": epochs,
        "test": accuracy(model, unseen),
        "train": accuracy(model, shuffled),
        "rank_share": mean(row.effective_rank / row.full_rank for row in rows),
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Means and ranges over the seeds."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        some = [row for row in rows if row["arm"] == arm]
        test = [row["test"] for row in some]
        lines.append(
            [
                arm,
                str(len(some)),
                f"{mean(test):.2f} ({min(test):.2f}..{max(test):.2f})",
                f"{mean(row['train'] for row in some):.2f}",
                f"{mean(row['rank_share'] for row in some):.0%}",
            ]
        )
    return table(("arm", "seeds", "test %", "train %", "rank"), lines)


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=tuple(EPOCHS), required=True)
    parser.add_argument("--root", type=Path, required=True, help="the folder of the data set")
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: 180 for CIFAR, 90 for ImageNet")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/generalisation-DATA.json")
    options = parser.parse_args(given)
    data = load(options.data, options.root)
    out: Path = options.out or FOLDER / "results" / f"generalisation-{options.data}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    runs = [Run(depth, decay, seed) for seed in range(options.seeds) for depth in DEPTHS for decay in DECAYS]
    todo = [run for run in runs if (run.arm, run.seed) not in done]
    about = machine()
    for run in track(todo, data.name, console=Console(stderr=True)):
        rows.append(train(run, data, options))
        save(out, {"benchmark": f"generalisation {data.name}", "machine": about, "rows": rows})
    print(f"{headline(about)}\n\n{summary(rows)}")
    return 0
