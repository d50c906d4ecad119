"""Train many networks of one architecture at once: seeds, learning rates and penalties side by side.

The networks are stacked (``torch.func.stack_module_state``) and run under ``vmap``; the optimiser works on
each entry alone, so each replica is trained exactly as it would be by itself, with a rate and a penalty of
its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

MOMENTUM = 0.9
Loss = Callable[[Tensor, Tensor], Tensor]  # outputs and targets of all replicas -> (replicas,)
Penalty = Callable[[Tensor], Tensor]  # a weight of all replicas (replicas, out, in) -> (replicas,)


@dataclass(frozen=True)
class Split:
    """Data of each replica: inputs ``(replicas, points, ...)`` and targets."""

    x: Tensor
    y: Tensor

    def of(self, rows: Tensor) -> Split:
        """The same points of every replica where ``rows`` is ``(replicas, points)``."""
        places = torch.arange(len(rows))[:, None]
        return Split(self.x[places, rows], self.y[places, rows])


@dataclass(frozen=True)
class Setting:
    """The training options of one replica."""

    seed: int
    rate: float
    strength: float = 0.0  # of the penalty
    decay: float = 0.0  # of every weight with two dimensions


class Replicas:
    """Networks built by ``build(seed)``, one per setting."""

    def __init__(self, build: Callable[[int], nn.Module], settings: Sequence[Setting]) -> None:
        self.settings = list(settings)
        made = {seed: build(seed) for seed in {setting.seed for setting in settings}}
        self.models = [copy.deepcopy(made[setting.seed]) for setting in settings]
        stacked, self.buffers = stack_module_state(self.models)
        self.parameters = {name: tensor.detach().requires_grad_() for name, tensor in stacked.items()}
        self.skeleton = copy.deepcopy(self.models[0]).to("meta")
        self.dead = torch.zeros(len(self.models), dtype=torch.bool)

    def outputs(self, x: Tensor) -> Tensor:
        """The outputs of every replica for its own inputs, ``(replicas, points, ...)``."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], points: Tensor) -> Tensor:
            found: Tensor = functional_call(self.skeleton, (parameters, buffers), (points,))
            return found

        stacked: Tensor = vmap(one)(self.parameters, self.buffers, x)
        return stacked

    def fit(self, data: Split, loss: Loss, *, steps: int, batch: int, penalty: Penalty | None = None) -> None:
        """SGD with momentum; the rate falls along half a cosine; batches are drawn by each replica's seed.

        A replica whose loss is no longer finite is dead: its weights are set to zero, and stay there.
        """
        rates = torch.tensor([setting.rate for setting in self.settings])
        strengths = torch.tensor([setting.strength for setting in self.settings], dtype=torch.float64)
        decays = torch.tensor([setting.decay for setting in self.settings])
        generators = [torch.Generator().manual_seed(setting.seed) for setting in self.settings]
        count = data.x.shape[1]
        momenta = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        for step in range(steps):
            rows = torch.stack([torch.randperm(count, generator=g)[:batch] for g in generators])
            part = data.of(rows)
            each = loss(self.outputs(part.x), part.y)
            total = each.sum()
            if penalty is not None:
                weights = [tensor for tensor in self.parameters.values() if tensor.ndim == 3]
                costs = torch.stack([penalty(weight) for weight in weights])
                total = total + (strengths * costs.sum(0)).sum()
            gradients = torch.autograd.grad(total, list(self.parameters.values()))
            with torch.no_grad():
                self.dead |= ~each.isfinite()
                now = rates * 0.5 * (1 + math.cos(math.pi * step / steps))
                for (name, tensor), gradient in zip(self.parameters.items(), gradients, strict=True):
                    ones = [1] * (tensor.ndim - 1)
                    if tensor.ndim == 3:
                        gradient = gradient + decays.view(-1, *ones) * tensor
                    momenta[name].mul_(MOMENTUM).add_(gradient)
                    tensor.sub_(now.view(-1, *ones) * momenta[name])
                    bad = self.dead | ~tensor.flatten(1).isfinite().all(1)
                    if bool(bad.any()):
                        self.dead |= bad
                        for other in (*self.parameters.values(), *momenta.values()):
                            other[bad] = 0.0

    def trained(self) -> list[nn.Module]:
        """The networks, with what was learnt."""
        for place, model in enumerate(self.models):
            values = {name: tensor[place].detach() for name, tensor in self.parameters.items()}
            model.load_state_dict(values, strict=False)
        return self.models
