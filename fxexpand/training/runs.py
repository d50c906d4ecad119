"""The files, the log and the outcome of a training run."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxexpand.reporting.files import write_whole
from fxexpand.reporting.rows import plain
from fxexpand.reporting.table import short, table
from fxexpand.training.options import Settings
from fxexpand.training.options import require_same as require_same  # its old address

LOG = "log.jsonl"
WEIGHTS = "model.safetensors"
CHECKPOINTS = "checkpoints"


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
        fused_error: largest relative error of the fused network's logits against the trained one's.
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
        lines = [f"{s.model} on {s.data}: {self.sizes[0]} training and {self.sizes[1]} test images"]
        steps = f"{s.epochs} epochs of {self.steps} steps in {seconds:.1f} s ({where})"
        lines += textwrap.wrap(f"recipe {s.recipe}: {steps}", 80, subsequent_indent="  ")
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
        found: dict[str, Any] = plain(self)
        return found
