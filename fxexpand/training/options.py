"""The options of a training run and of the demo, in Python, on the command line and in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from fxexpand.errors import SelectionError
from fxexpand.reporting.options import option

if TYPE_CHECKING:
    from fxexpand.layers.expanded import Form
    from fxexpand.layers.param_groups import Decayed
    from fxexpand.recipes import Init

OptimizerName: TypeAlias = Literal["sgd", "adamw"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
Precision: TypeAlias = Literal["off", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

MODEL = "timm:NAME, torchvision:NAME or package.module:factory."
RECIPE = "Chain(depth=3, width=2)"
# A run may be resumed with other values of these: it takes the same steps, up to rounding.
FREE = ("accumulate", "compile", "fsdp", "save_every", "rank_every", "workers")


@dataclass(frozen=True)
class Schedule:
    """Adam without weight decay; the learning rate falls from ``lr`` to 0 along half a cosine.

    There is no weight decay because decay of the factors is not decay of their product: with it, a plain and
    an expanded network would be regularised differently, and their comparison would not show the effect of
    the parameterisation alone.
    """

    epochs: int = option(40, "Epochs each is trained for.", min=1)
    batch_size: int = 50
    lr: float = 1e-3
    rank_every: int = 20

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "rank_every"):
            if getattr(self, name) < 1:
                raise SelectionError(f"{name}={getattr(self, name)}: choose 1 or more.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise SelectionError(f"lr={self.lr}: choose a positive number.")


@dataclass(frozen=True)
class DemoOptions:
    """How much the demo trains and measures; see ``fxexpand.training.demo.run``."""

    seeds: int = option(3, "Pairs of networks to train.", min=1)
    train_size: int = option(600, "Digits to train on, of 1797.", min=10)
    rounds: int = option(30, "Rounds of the latency measurement.", min=8)


@dataclass(frozen=True)
class Settings:
    """How a network is trained; ``model``, ``data`` and ``recipe`` name the arguments of ``train``.

    Raises: SelectionError: a value out of range.
    """

    model: str = option("fxexpand.demo:Digits", MODEL, argument=True, metavar="MODEL")
    data: str = option("digits", "digits, cifar10, cifar100, or imagenet: images in folders.")
    recipe: str = option(RECIPE, "Recipe of each layer: RepVGG, Chain(depth=2)... or none.", metavar="RECIPE")
    select: tuple[str, ...] = option(
        (), "Only layers whose name matches. Repeatable.", list[str], metavar="PATTERN"
    )
    init: Init = option("preserve", "preserve, matched or kaiming.")
    form: Form = option("auto", "auto, chain or collapsed.")
    epochs: int = option(20, "Passes over the training images.")
    batch_size: int = option(64, "Images per step, over all processes and micro-batches.")
    lr: float = option(1e-3, "Learning rate; it falls to 0 along half a cosine.")
    warmup: float = option(0.0, "Epochs in which the learning rate rises.")
    optimizer: OptimizerName = option("adamw", "sgd (Nesterov momentum of 0.9) or adamw.")
    weight_decay: float = option(0.0, "Of weights; not of biases and norms.")
    decay_on: Decayed = option("factors", "factors, or the effective weight.")
    clip: float = option(0.0, "Largest norm of the gradients; 0 for any.")
    accumulate: int = option(1, "Micro-batches per step.")
    amp: Precision = option("off", "Autocast: bf16, fp16 (with loss scaling) or off.")
    ema: float = option(0.0, "Decay of a moving average of the weights; 0: none.")
    seed: int = option(0, "Of weights, order and crops.")
    workers: int = option(0, "Processes that read images, for each that trains.")
    save_every: int = option(1000, "Steps between checkpoints within an epoch.")
    rank_every: int = option(1, "Epochs between rank measurements; 0: ends only.")
    compile: bool = option(False, "With torch.compile.")
    fsdp: bool = option(False, "Under torchrun: shard, not replicate.")

    def __post_init__(self) -> None:
        from fxexpand.layers.expanded import FORMS
        from fxexpand.layers.param_groups import DECAYED
        from fxexpand.recipes import INITS

        for name, known in (
            ("init", INITS),
            ("form", FORMS),
            ("optimizer", OPTIMIZERS),
            ("decay_on", DECAYED),
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
        return self.lr * cosine((step - rising) / max(self.epochs * steps - rising, 1))


def cosine(share: float) -> float:
    """The factor of the learning rate after a share of the steps: from 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * min(share, 1.0))) / 2


def require_same(folder: Path, now: Settings, then: Mapping[str, Any]) -> None:
    """That a run goes on as it began.

    Raises: SelectionError: a setting differs; the message names the first.
    """
    for name, value in json.loads(json.dumps(asdict(now))).items():
        if name not in FREE and then.get(name) != value:
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            # Text of a file may have control characters, which a terminal would obey.
            before, after = (str(v) if str(v).isprintable() else repr(v) for v in (then.get(name), value))
            raise SelectionError(
                f"{folder}: was trained with {option} {before}, not {after}. Resume it with the same "
                "options, or name another folder with --out."
            )
