"""The training loop of ``fxexpand train`` and of the demo, which watches ranks in a short one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from fxexpand.errors import FxExpandError
from fxexpand.layers.accumulation import accumulate
from fxexpand.lowrank import rank_report
from fxexpand.running.evaluation import evaluating
from fxexpand.training.data import Batches
from fxexpand.training.options import Precision, Schedule, cosine

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
Batch: TypeAlias = tuple[Tensor, Tensor]  # images and labels


class Loop:
    """Steps of an optimizer on the mean cross-entropy of batches, each in one micro-batch or several.

    Attributes:
        model: the network that is trained; ``network`` runs it, as it is, compiled or in several processes.
        step: the number of steps taken.
        average: of the weights, brought up to date after each step.
        scaler: of the loss, where ``amp`` is fp16.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float],
        *,
        network: Any = None,
        average: AveragedModel | None = None,
        amp: Precision = "off",
        clip: float = 0.0,
    ) -> None:
        """
        Args:
            rate: the learning rate of a step, by the number of steps before it.
            clip: largest norm of all gradients together; 0 for any.
        """
        self.model, self.optimizer, self.rate = model, optimizer, rate
        self.network = model if network is None else network
        self.average, self.amp, self.clip = average, amp, clip
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.step = 0

    def steps(
        self,
        batches: Iterable[Sequence[Batch]],
        *,
        reducing: Callable[[bool], AbstractContextManager[Any]] = lambda last: nullcontext(),
        check: Callable[[Tensor, Tensor], None] = lambda logits, labels: None,
        shares: bool = True,
    ) -> Iterator[tuple[Tensor, int]]:
        """Take a step on each batch, a list of micro-batches; after each, its mean loss and its images.

        Args:
            reducing: around the backward pass of a micro-batch, told whether it is the last one.
            check: of the logits of a micro-batch; raises where they do not fit the labels.
            shares: form each product of factors once for all micro-batches.
        """
        self.model.train()
        for micro_batches in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(self.step)
            losses, count = [], len(micro_batches)
            with accumulate(self.network, count) if shares and count > 1 else nullcontext():
                for i, (images, labels) in enumerate(micro_batches):
                    with reducing(i == count - 1):
                        with self.autocast():
                            logits = self.network(images)
                            check(logits, labels)
                            loss = cross_entropy(logits, labels) / count
                        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                    losses.append(loss.detach())
            if self.clip:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.step += 1
            yield torch.stack(losses).sum(), sum(len(labels) for _, labels in micro_batches)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the network runs."""
        dtype = PRECISION.get(self.amp)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class History:
    """Measurements taken while a network was trained.

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
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], schedule.lr)
    last = schedule.epochs * len(train)
    loop = Loop(model, optimizer, lambda step: schedule.lr * cosine(step / last))
    begin, times = 0.0, list[float]()
    epochs: list[tuple[int, float, float]] = []
    ranks: dict[int, dict[str, float]] = {0: effective_ranks(model)}

    def batches() -> Iterator[list[Batch]]:
        nonlocal begin
        for images, labels in train:
            begin = time.perf_counter()
            yield [(images.to(loop.device), labels.to(loop.device))]

    for _ in range(schedule.epochs):
        total, count = torch.zeros((), device=loop.device), 0
        for loss, images in loop.steps(batches()):
            total += loss * images
            count += images
            if loop.device.type != "cpu":
                torch.accelerator.synchronize(loop.device)
            times.append(1e3 * (time.perf_counter() - begin))
            on_step()
            if loop.step % schedule.rank_every == 0:
                ranks[loop.step] = effective_ranks(model)
        mean = float(total) / count
        if not math.isfinite(mean):
            raise FxExpandError(
                f"training: the loss is {mean} after {loop.step} steps. Lower lr={schedule.lr:g}."
            )
        epochs.append((loop.step, mean, accuracy(model, test)))
    if loop.step not in ranks:
        ranks[loop.step] = effective_ranks(model)
    epoch_steps, losses, accuracies = zip(*epochs, strict=True)
    return History(
        epoch_steps=epoch_steps,
        loss=losses,
        test_accuracy=accuracies,
        train_accuracy=accuracy(model, train),
        rank_steps=tuple(ranks),
        ranks={name: tuple(at[name] for at in ranks.values()) for name in ranks[0]},
        step_ms=median(times),
    )


def effective_ranks(model: nn.Module) -> dict[str, float]:
    """The effective rank of each layer's weight."""
    return {row.name.removesuffix(".weight"): row.effective_rank for row in rank_report(model).rows}


def logits(model: nn.Module, batches: Batches) -> Tensor:
    """The outputs of ``model`` in evaluation mode for all batches, ``(images, classes)``, on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        return torch.cat([model(images.to(device)).cpu() for images, _ in batches])


def accuracy(model: nn.Module, batches: Batches) -> float:
    """The share of images whose largest logit is that of their label, in per cent."""
    device = next(model.parameters()).device
    with evaluating(model):
        right = [model(images.to(device)).argmax(-1) == labels.to(device) for images, labels in batches]
    found = torch.cat(right)
    return 100.0 * int(found.sum()) / len(found)
