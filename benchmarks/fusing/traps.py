"""Small networks in which a fold by the types of neighbours alone is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import perturb


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2.0 * output


class Shared(nn.Module):
    """One convolution, called twice; a norm after one of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        result: Tensor = self.conv(F.relu(y))
        return result


class Steps(nn.Module):
    """A norm of the steps of a sequence, after a Linear over its features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4 steps, 5 features)
        result: Tensor = self.norm(self.linear(x))
        return result


class SharedNorm(nn.Module):
    """One norm after two convolutions, each of which must get its own copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.two(F.relu(self.norm(self.one(x)))))
        return result


class Border(nn.Module):
    """Zero padding after a norm: the border is not the norm of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(self.norm(x))
        return result


def _hooked() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    conv.register_forward_hook(_doubled)
    return nn.Sequential(conv, nn.BatchNorm2d(4))


def _hooked_block() -> nn.Module:
    """A block of timm with a method of its own, and a hook that scales what it gives."""
    from timm.models.repvit import ConvNorm

    block: nn.Module = ConvNorm(3, 4, 3)
    block.register_forward_hook(_doubled)
    return nn.Sequential(block, nn.ReLU())


def _tied() -> nn.Module:
    """Two convolutions with one weight, of which one has a norm."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3))
    model[3].weight = model[0].weight
    return model


def _built(make: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturb(make()).eval().requires_grad_(False), torch.randn(2, *shape)


# By name: what gives a network in evaluation mode, and its input.
TRAPS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "border": lambda: _built(Border, 3, 8, 7),
    "hooked block": lambda: _built(_hooked_block, 3, 8, 7),
    "hooked conv": lambda: _built(_hooked, 3, 8, 7),
    "norm of steps": lambda: _built(Steps, 4, 5),
    "shared conv": lambda: _built(Shared, 3, 8, 7),
    "shared norm": lambda: _built(SharedNorm, 3, 8, 7),
    "tied convs": lambda: _built(_tied, 3, 8, 7),
}
