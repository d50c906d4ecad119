"""Networks of many depths and draws, computed together: one batched product per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["normal", "uniform"]


def identity(x: Tensor) -> Tensor:
    """No activation."""
    return x


@dataclass
class Networks:
    """``draws`` square networks of each of ``depths`` (ascending), without biases.

    ``layers[l]`` holds layer l of the networks that are deeper than l, ``(count, width, width)``: as the
    depths ascend, those are the last ``count`` networks, and no network computes layers that it does not
    have.
    """

    depths: tuple[int, ...]
    draws: int
    layers: list[Tensor]

    def product(self) -> Tensor:
        """The end-to-end matrices ``W_d ... W_1``, ``(networks, width, width)``."""
        return self._through(self.layers[0], 1, identity)

    def outputs(self, x: Tensor, activation: Callable[[Tensor], Tensor] = identity) -> Tensor:
        """``W_d a(... a(W_1 x))`` for ``x`` of ``(networks, width, points)``; none after the last layer."""
        return self._through(self.layers[0] @ x, 1, activation)

    def of(self, values: Tensor) -> Tensor:
        """``(networks, ...)`` as ``(depths, draws, ...)``."""
        return values.reshape(len(self.depths), self.draws, *values.shape[1:])

    def _through(self, x: Tensor, first: int, activation: Callable[[Tensor], Tensor]) -> Tensor:
        finished = []
        for weight in self.layers[first:]:
            ended = len(x) - len(weight)
            if ended:
                finished.append(x[:ended])
            x = weight @ activation(x[ended:])
        return torch.cat([*finished, x])


def draw(
    depths: Sequence[int],
    draws: int,
    width: int,
    generator: torch.Generator,
    *,
    distribution: Distribution = "normal",
    gain: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Networks:
    """Random networks; the entries have mean 0 and variance ``gain² / width``."""
    counts = [draws * sum(depth > layer for depth in depths) for layer in range(max(depths))]
    return Networks(
        tuple(depths),
        draws,
        [
            entries((count, width, width), generator, distribution, gain / width**0.5, dtype)
            for count in counts
        ],
    )


def draw_low_rank(
    depths: Sequence[int], draws: int, width: int, generator: torch.Generator, factors: int = 32
) -> Networks:
    """Networks whose end-to-end matrix is a product of ``factors`` Gaussians, whatever their depth.

    The layers of a network of depth d are products of ``factors / d`` of them: its rank is that of a network
    of depth ``factors`` as drawn by ``draw``.
    """
    single = [
        entries((len(depths) * draws, width, width), generator, "normal", width**-0.5, torch.float32)
        for _ in range(factors)
    ]
    layers = []
    for layer in range(max(depths)):
        made = []
        for place, depth in enumerate(depths):
            if depth > layer:
                begin, end = factors * layer // depth, factors * (layer + 1) // depth
                rows = slice(place * draws, (place + 1) * draws)
                weight = single[begin][rows]
                for factor in single[begin + 1 : end]:
                    weight = factor[rows] @ weight
                made.append(weight)
        layers.append(torch.cat(made))
    return Networks(tuple(depths), draws, layers)


def entries(
    shape: tuple[int, ...],
    generator: torch.Generator,
    distribution: Distribution,
    deviation: float,
    dtype: torch.dtype,
) -> Tensor:
    """Independent entries with mean 0."""
    if distribution == "normal":
        return deviation * torch.randn(shape, generator=generator, dtype=dtype)
    return deviation * 3**0.5 * (2 * torch.rand(shape, generator=generator, dtype=dtype) - 1)


def teacher(draws: int, width: int, rank: int, generator: torch.Generator) -> Tensor:
    """Gaussian matrices ``(draws, width, width)`` of variance ``2 / width``, cut to their top ``rank``."""
    whole = entries((draws, width, width), generator, "normal", (2 / width) ** 0.5, torch.float32)
    if rank >= width:
        return whole
    u, s, v = torch.linalg.svd(whole)
    cut: Tensor = u[..., :rank] * s[..., None, :rank] @ v[..., :rank, :]
    return cut


def descend(
    networks: Networks,
    loss: Callable[[Networks], Tensor],
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int,
    *,
    clip: float | None = None,
) -> Iterator[int]:
    """Train all networks at once; yields the number of steps done.

    ``loss`` gives one value per network: the gradient of their sum is that of each, as they share no weight,
    and an optimiser that works on each entry alone does not notice that they are stacked.

    Args:
        clip: the largest norm of one network's gradient over all of its layers.
    """
    for layer in networks.layers:
        layer.requires_grad_()
    optimiser = make(networks.layers)
    for step in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward([loss(networks).sum()])
        if clip is not None:
            _clip(networks, clip)
        optimiser.step()
        yield step + 1


def _clip(networks: Networks, largest: float) -> None:
    total = torch.zeros(len(networks.layers[0]))
    for layer in networks.layers:
        assert layer.grad is not None
        total[len(total) - len(layer) :] += layer.grad.square().sum((-2, -1))
    factor = (largest / total.sqrt().clamp(min=1e-30)).clamp(max=1.0)
    for layer in networks.layers:
        assert layer.grad is not None
        layer.grad *= factor[len(factor) - len(layer) :, None, None]
