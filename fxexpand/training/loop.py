"""A short training loop that watches the effective rank of every layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fxexpand.errors import FxExpandError
from fxexpand.lowrank import rank_report
from fxexpand.running.evaluation import evaluating
from fxexpand.training.data import Batches
from fxexpand.training.options import Schedule


@dataclass(frozen=True)
class History:
    """What was measured while a network was trained.

    ``epoch_steps``, ``loss`` (mean over the epoch) and ``test_accuracy`` (in per cent) have one entry per
    epoch; ``rank_steps`` and each of ``ranks`` (by layer: effective rank) one per measurement, the first
    before the first step and the last after the last one. ``step_ms`` is the median time of a training step:
    a machine that is busy for a while does not move it.
    """

    epoch_steps: tuple[int, ...]
    loss: tuple[float, ...]
    test_accuracy: tuple[float, ...]
    train_accuracy: float
    rank_steps: tuple[int, ...]
    ranks: dict[str, tuple[float, ...]]
    step_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "epoch_steps": list(self.epoch_steps),
            "loss": list(self.loss),
            "test_accuracy": list(self.test_accuracy),
            "train_accuracy": self.train_accuracy,
            "rank_steps": list(self.rank_steps),
            "ranks": {name: list(values) for name, values in self.ranks.items()},
            "step_ms": self.step_ms,
        }


def fit(
    model: nn.Module,
    train: Batches,
    test: Batches,
    schedule: Schedule,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> History:
    """Train ``model`` as a classifier, in place, on the device it is on.

    Args:
        on_step: called after every training step, for a progress bar.

    Raises: FxExpandError: the loss became NaN or Inf.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], schedule.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.epochs * len(train))
    step = 0
    times: list[float] = []
    epoch_steps: list[int] = []
    losses: list[float] = []
    accuracies: list[float] = []
    rank_steps: list[int] = []
    ranks: dict[str, list[float]] = {}

    def measure_ranks() -> None:
        if rank_steps[-1:] != [step]:
            rank_steps.append(step)
            for row in rank_report(model).rows:
                ranks.setdefault(row.name.removesuffix(".weight"), []).append(row.effective_rank)

    measure_ranks()
    for _ in range(schedule.epochs):
        model.train()
        total, count = torch.zeros((), device=device), 0
        for images, labels in train:
            begin = time.perf_counter()
            images, labels = images.to(device), labels.to(device)
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            decay.step()
            total += loss.detach() * len(labels)
            count += len(labels)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(1e3 * (time.perf_counter() - begin))
            step += 1
            on_step()
            if step % schedule.rank_every == 0:
                measure_ranks()
        losses.append(float(total) / count)
        if not math.isfinite(losses[-1]):
            raise FxExpandError(
                f"training: the loss is {losses[-1]} after {step} steps. Lower lr={schedule.lr:g}."
            )
        epoch_steps.append(step)
        accuracies.append(accuracy(model, test))
    measure_ranks()
    return History(
        epoch_steps=tuple(epoch_steps),
        loss=tuple(losses),
        test_accuracy=tuple(accuracies),
        train_accuracy=accuracy(model, train),
        rank_steps=tuple(rank_steps),
        ranks={name: tuple(values) for name, values in ranks.items()},
        step_ms=median(times),
    )


def logits(model: nn.Module, batches: Batches) -> Tensor:
    """The outputs of ``model`` in evaluation mode for all batches, ``(images, classes)``, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        return torch.cat([model(images.to(device)).cpu() for images, _ in batches])


def accuracy(model: nn.Module, batches: Batches) -> float:
    """The share of images whose largest logit is that of their label, in per cent."""
    device = next(model.parameters()).device
    right = torch.zeros((), dtype=torch.long, device=device)
    count = 0
    with evaluating(model):
        for images, labels in batches:
            right += (model(images.to(device)).argmax(-1) == labels.to(device)).sum()
            count += len(labels)
    return 100.0 * int(right) / count
