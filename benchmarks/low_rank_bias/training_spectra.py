"""Experiment F: the spectrum of a layer while a network is trained plain and expanded, on scikit-learn's
digits.

Their figure is of a CNN with a layer of 512 singular values over 180 epochs, its data set not named; this is
a small CNN with a layer of 64, with drops of the learning rate at the same shares of the schedule (a third
and two thirds).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fxexpand.lowrank.tracker import RankTracker
from fxexpand.recipes import Chain
from fxexpand.reporting.figures import new_figure
from fxexpand.surgery.expand import expand
from fxexpand.training.data import batches, digits
from fxexpand.training.loop import accuracy

TITLE = "F. The spectrum of a layer during training"
TRAIN, EPOCHS, BATCH = 200, 45, 50
RATES = {"plain": (0.02, 0.05, 0.1), "expanded": (0.02, 0.05, 0.1)}
LAYER = "4.weight"
SEEDS = (1, 2, 3)


def network() -> nn.Sequential:
    """A CNN whose layer "4" has 64 singular values."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def run(quick: bool = False) -> dict[str, Any]:
    """Spectra, ranks and accuracies; the learning rate of each arm is the best on a seed of its own."""
    epochs = 3 if quick else EPOCHS
    runs: dict[str, Any] = {}
    for arm, rates in RATES.items():
        scores = {rate: train(arm, rate, 0, epochs)[1] for rate in (rates[:1] if quick else rates)}
        best = max(scores, key=lambda rate: scores[rate])
        histories = [train(arm, best, seed, epochs) for seed in (SEEDS[:1] if quick else SEEDS)]
        runs[arm] = {
            "rate": best,
            "tuning": {str(rate): score for rate, score in scores.items()},
            "steps": [step for step, _ in histories[0][0].records],
            "effective_rank": [tracker.ranks()[LAYER] for tracker, *_ in histories],
            "spectra": histories[0][0].to_dict()["weights"][LAYER]["spectra"],
            "test": [test for _, test, _ in histories],
            "train": [fitted for *_, fitted in histories],
        }
    return {"epochs": epochs, "train_size": TRAIN, "recipe": "Chain(depth=4, width=2), kaiming", "runs": runs}


def train(arm: str, rate: float, seed: int, epochs: int) -> tuple[RankTracker, float, float]:
    """One network; the tracker, and its test and training accuracy in per cent."""
    torch.manual_seed(seed)
    model: nn.Module = network()
    if arm == "expanded":
        model = expand(model, Chain(depth=4, width=2), init="kaiming")
    data = digits(seed, TRAIN)
    shuffled, test = batches(data.train, BATCH, seed=seed), batches(data.test, 500)
    tracker = RankTracker(model, every=len(shuffled), select=lambda name: name == LAYER, max_records=20)
    optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [epochs // 3, 2 * epochs // 3])
    for _ in range(epochs):
        model.train()
        for images, labels in shuffled:
            optimiser.zero_grad()
            loss: Tensor = cross_entropy(model(images), labels)
            torch.autograd.backward([loss])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            tracker()
        schedule.step()
    tracker.record()
    return tracker, accuracy(model, test), accuracy(model, batches(data.train, 500))


HEAD = ["network", "rate", "effective rank: start", "end", "test %", "train %"]


def table_rows(content: dict[str, Any]) -> list[list[str]]:
    """Means and ranges over the seeds."""

    def spread(values: list[float]) -> str:
        return f"{sum(values) / len(values):.2f} ({min(values):.2f}..{max(values):.2f})"

    return [
        [
            arm,
            f"{run['rate']:g}",
            spread([ranks[0] for ranks in run["effective_rank"]]),
            spread([ranks[-1] for ranks in run["effective_rank"]]),
            spread(run["test"]),
            spread(run["train"]),
        ]
        for arm, run in content["runs"].items()
    ]


def failures(content: dict[str, Any]) -> list[str]:
    """The expanded layer must end with the lower rank."""
    ends = {
        arm: sum(ranks[-1] for ranks in run["effective_rank"]) / len(run["effective_rank"])
        for arm, run in content["runs"].items()
    }
    return [] if ends["expanded"] < ends["plain"] else [f"F: the expanded layer has no lower rank: {ends}"]


def plot(content: dict[str, Any]) -> Any:
    """Spectra of one seed over training, light to dark, and the effective rank of every seed."""
    import matplotlib

    figure, axes = new_figure(1, 3, width=3.2)
    colours = matplotlib.colormaps["viridis_r"]
    for axis, (arm, run) in zip(axes, content["runs"].items(), strict=False):
        last = len(run["spectra"]) - 1
        for place in sorted({round(i * last / 5) for i in range(6)}):
            values = run["spectra"][place]
            shade = colours(0.1 + 0.85 * place / max(last, 1))
            axis.plot(range(1, len(values) + 1), values, color=shade, label=f"step {run['steps'][place]}")
        axis.set_title(arm, loc="left")
        axis.set_xlabel("index")
        axis.set_ylim(0, 1.05)
        for ranks in run["effective_rank"]:
            colour = {"plain": "#4c6a92", "expanded": "#d9722e"}[arm]
            axes[2].plot(
                run["steps"], ranks, color=colour, label=arm if ranks is run["effective_rank"][0] else None
            )
    axes[0].set_ylabel("singular value / largest")
    axes[0].legend(fontsize=6.5)
    axes[2].set_title("effective rank of the layer", loc="left")
    axes[2].set_xlabel("step")
    axes[2].legend(fontsize=7)
    return figure
