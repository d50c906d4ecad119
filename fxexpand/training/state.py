"""The state of a training run, in torch's ``Stateful`` protocol."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fxexpand.training import checkpoint
from fxexpand.training.distributed import Processes
from fxexpand.training.loop import Loop
from fxexpand.training.runs import Epoch


class State:
    """Everything that a run takes from one step to the next.

    Attributes:
        loop: the network, its optimizer, its average, and the number of steps.
        total: the sum of the losses of this epoch's steps in this process.
        seconds: of training and measuring in this epoch.
        epochs: the lines of the log.
        full_ranks: the largest effective rank that each weight can have.
    """

    def __init__(self, loop: Loop, group: Processes, seed: int) -> None:
        self.loop, self.group, self.seed = loop, group, seed
        self.total = torch.zeros((), dtype=torch.float64, device=group.device)
        self.seconds = 0.0
        self.epochs: list[Epoch] = []
        self.full_ranks: dict[str, int] = {}
        self._random = f"random.{group.world}.{group.rank}"

    def mean_loss(self, steps: int) -> float:
        """The mean loss of this epoch's ``steps`` over all processes: each has the mean over its share."""
        return float(self.group.sum(self.total.clone())) / self.group.world / steps

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values by name; all processes call it."""
        loop, group = self.loop, self.group
        found: dict[str, Any] = dict(checkpoint.states(loop.model, loop.optimizer))
        if loop.average is not None:
            average = checkpoint.states(loop.average.module)
            found |= {f"average.{name}": value for name, value in average.items()}
            found["average.count"] = loop.average.n_averaged
        found[f"{self._random}.cpu"] = torch.get_rng_state()
        if group.device.type == "cuda":
            found[f"{self._random}.cuda"] = torch.cuda.get_rng_state(group.device)
        return found | {
            "step": loop.step,
            "total": self.mean_loss(1),
            "seconds": self.seconds,
            "scaler": loop.scaler.state_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "full_ranks": self.full_ranks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the result of ``state_dict`` back.

        Random numbers go on only in as many processes as wrote them; else they are seeded anew.
        """
        loop, group = self.loop, self.group
        tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
        kept = {n: t for n, t in tensors.items() if n.startswith(("model.", "optimizer."))}
        checkpoint.restore(kept, loop.model, loop.optimizer)
        if loop.average is not None:
            inner = {n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")}
            loop.average.n_averaged.copy_(inner.pop("count"))
            checkpoint.restore(inner, loop.average.module)
        loop.scaler.load_state_dict(state_dict["scaler"])
        loop.step, self.seconds = state_dict["step"], state_dict["seconds"]
        self.total.fill_(state_dict["total"] * group.world if group.first else 0.0)
        self.epochs = [Epoch(**epoch) for epoch in state_dict["epochs"]]
        self.full_ranks = state_dict["full_ranks"]
        if f"{self._random}.cpu" in tensors:
            torch.set_rng_state(tensors[f"{self._random}.cpu"])
        else:  # the number of processes has changed
            torch.manual_seed(self.seed + group.rank + loop.step)
        if f"{self._random}.cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{self._random}.cuda"], group.device)
