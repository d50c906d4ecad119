"""What is known of a training run: its settings, its log, and what came out."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from fxexpand.errors import SelectionError
from fxexpand.layers.expanded import FORMS, Form
from fxexpand.layers.param_groups import TARGETS, Target
from fxexpand.recipes import INITS, Init
from fxexpand.reporting.files import write_whole
from fxexpand.reporting.table import short, table

OptimizerName: TypeAlias = Literal["sgd", "adamw"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
Precision: TypeAlias = Literal["off", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

LOG = "log.jsonl"
WEIGHTS = "model.safetensors"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Settings:
    """How a network is trained.

    Attributes:
        model, data, recipe: what is trained on what, as names; ``train`` is given the things themselves.
        select: patterns of the layers to expand; none stands for all.
        batch_size: images per step, over all processes and micro-batches.
        lr: at the end of the warm-up; then it falls to 0 along half a cosine, step by step.
        warmup: epochs in which the learning rate rises linearly.
        optimizer: ``"sgd"`` with a Nesterov momentum of 0.9, or ``"adamw"``.
        decay_on: what the weight decay is meant for, see ``fxexpand.optim.param_groups``.
        clip: largest norm of all gradients together; 0 for none.
        accumulate: micro-batches per step.
        amp: autocast to this; fp16 with loss scaling.
        ema: decay of an exponential moving average of the weights, per step; 0 for none.
        fsdp: shard the model over the processes, instead of a copy in each.
        save_every: steps between checkpoints within an epoch; each epoch ends with one anyway.
        rank_every: epochs between measurements of the effective ranks; 0 for the first and the last alone.
        workers: processes that read images, for each process that trains.
    """

    model: str
    data: str
    recipe: str = "none"
    select: tuple[str, ...] = ()
    init: Init = "preserve"
    form: Form = "auto"
    epochs: int = 40
    batch_size: int = 50
    lr: float = 1e-3
    warmup: float = 0.0
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0
    decay_on: Target = "factors"
    clip: float = 0.0
    accumulate: int = 1
    amp: Precision = "off"
    ema: float = 0.0
    seed: int = 0
    compile: bool = False
    fsdp: bool = False
    save_every: int = 1000
    rank_every: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("init", INITS),
            ("form", FORMS),
            ("optimizer", OPTIMIZERS),
            ("decay_on", TARGETS),
            ("amp", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise SelectionError(f"{name}={getattr(self, name)!r}: choose from {', '.join(known)}.")
        for name in ("epochs", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise SelectionError(f"{name}={getattr(self, name)}: choose 1 or more.")
        for name in ("weight_decay", "warmup", "clip", "rank_every", "workers", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SelectionError(f"{name}={getattr(self, name)}: choose 0 or more.")
        if not 0 < self.lr < math.inf:
            raise SelectionError(f"lr={self.lr}: choose a positive number.")
        if not 0 <= self.ema < 1:
            raise SelectionError(f"ema={self.ema}: choose a decay below 1, such as 0.999, or 0 for none.")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step ``step``, from 0, with ``steps`` in an epoch; nothing else decides."""
        rising = self.warmup * steps
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        share = (step - rising) / max(self.epochs * steps - rising, 1)
        return self.lr * (1 + math.cos(math.pi * min(share, 1.0))) / 2


# What a run may be resumed with other values of: it goes on with the same steps, up to rounding.
FREE = ("accumulate", "compile", "fsdp", "save_every", "rank_every", "workers")


def require_same(folder: Path, now: Settings, then: Mapping[str, Any]) -> None:
    """That a run goes on as it began.

    Raises: SelectionError: a setting differs; the message names the first.
    """
    for name, value in json.loads(json.dumps(asdict(now))).items():
        if name not in FREE and then.get(name) != value:
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise SelectionError(
                f"{folder}: was trained with {option} {then.get(name)}, not {value}. Resume it with the same "
                "options, or name another folder with --out."
            )


@dataclass(frozen=True)
class Epoch:
    """A line of the log: after ``step`` steps; epoch 0 is before the first.

    Attributes:
        loss: mean over the epoch's steps, of the training images as they were seen.
        accuracy: of the test images, in per cent; ``ema_accuracy`` that of the averaged weights.
        ranks: the effective rank of each weight, where it was measured.
        seconds: of training and measuring, in this process.
    """

    epoch: int
    step: int
    loss: float | None
    test_loss: float
    accuracy: float
    ema_accuracy: float | None
    lr: float | None
    ranks: dict[str, float]
    seconds: float

    def __str__(self) -> str:
        parts = [f"epoch {self.epoch:>3}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        parts.append(f"test loss {self.test_loss:.4f}  accuracy {self.accuracy:.2f} %")
        if self.ema_accuracy is not None:
            parts.append(f"ema {self.ema_accuracy:.2f} %")
        if self.loss is not None:
            parts.append(f"{self.seconds:.1f} s")
        return "  ".join(parts)


def write_log(folder: Path, epochs: list[Epoch]) -> None:
    """Write the log whole, one JSON object a line: no line twice and none cut off, whenever a run ended."""
    write_whole(folder / LOG, "".join(json.dumps(asdict(epoch)) + "\n" for epoch in epochs))


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        full_ranks: of each weight, the most that its effective rank can be.
        parameters: trained, and in the fused network.
        fused_error: largest relative difference of the fused network's logits from the trained one's.
        resumed: the step from which the run went on; None if it was not interrupted.
        left: layers that the recipe refuses, with the reasons.
    """

    folder: Path
    settings: Settings
    sizes: tuple[int, int]
    processes: int
    device: str
    steps: int
    epochs: tuple[Epoch, ...]
    full_ranks: dict[str, int]
    parameters: tuple[int, int]
    fused_error: float
    resumed: int | None
    left: tuple[str, ...]

    def __str__(self) -> str:
        s, begin, end = self.settings, self.epochs[0], self.epochs[-1]
        seconds = sum(epoch.seconds for epoch in self.epochs)
        where = self.device if self.processes == 1 else f"{self.processes} processes, {self.device}"
        lines = [
            f"{s.model} on {s.data}: {self.sizes[0]} training and {self.sizes[1]} test images",
            f"recipe {s.recipe}: {s.epochs} epochs of {self.steps} steps in {seconds:.1f} s ({where})",
        ]
        if self.resumed is not None:
            lines.append(f"resumed after step {self.resumed}")
        if self.left:
            more = f" And {len(self.left) - 1} more." if len(self.left) > 1 else ""
            lines += textwrap.wrap(f"not expanded: {self.left[0]}{more}", 80, subsequent_indent="  ")
        rows = [
            ("training loss", "-", "-" if end.loss is None else f"{end.loss:.4f}"),
            ("test loss", f"{begin.test_loss:.4f}", f"{end.test_loss:.4f}"),
            ("test accuracy, %", f"{begin.accuracy:.2f}", f"{end.accuracy:.2f}"),
        ]
        if end.ema_accuracy is not None:
            rows.append(("  of the averaged weights", "-", f"{end.ema_accuracy:.2f}"))
        before, after = map(short, self.parameters)
        rows.append(("parameters, trained and fused", before, after))
        for name, full in self.full_ranks.items():
            label = name if len(name) <= 40 else f"...{name[-37:]}"
            rows.append(
                (f"effective rank of {label} ({full})", f"{begin.ranks[name]:.2f}", f"{end.ranks[name]:.2f}")
            )
        lines += ["", table(("", "before", "after"), rows), ""]
        lines.append(f"fused: logits within {self.fused_error:.1e} of the trained network's")
        lines.append(f"{self.folder}: {WEIGHTS}, {LOG}, {CHECKPOINTS}/")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **plain,
            "folder": str(self.folder),
            "settings": asdict(self.settings),
            "sizes": list(self.sizes),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "parameters": list(self.parameters),
            "left": list(self.left),
        }
