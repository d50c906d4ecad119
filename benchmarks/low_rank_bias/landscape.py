"""Experiment E: the rank around one point, for one matrix and for the product of two.

``ρ(W + αu + βv)`` and ``ρ((W2 + αu2 + βv2)(W1 + αu1 + βv1))`` with ``W = W2 W1`` (balanced), along random
directions. Beyond the picture: how much of the volume around the point has a lower rank, over many points and
directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxexpand.lowrank.measures import spectral_entropy
from fxexpand.reporting.figures import new_figure

TITLE = "E. Landscape of the rank"
WIDTH, REACH, GRID = 16, 3.0, 41


def run(quick: bool = False) -> dict[str, Any]:
    """The two surfaces, and entropies at random places around many points."""
    generator = torch.Generator().manual_seed(0)
    grid = 11 if quick else GRID
    axis = torch.linspace(-REACH, REACH, grid, dtype=torch.float64)
    one, two = surfaces(axis, generator)
    points, places = (4, 20) if quick else (64, 128)
    changes: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(points):
        along = REACH * (2 * torch.rand(places, 2, dtype=torch.float64, generator=generator) - 1)
        whole, factors = start(generator)
        begin = float(spectral_entropy(whole))
        for name, matrices in (("one", [whole]), ("two", factors)):
            found = spectral_entropy(moved(matrices, along, generator), batched=True)
            changes[name].append(float(found.mean()) - begin)
    return {
        "axis": axis.tolist(),
        "one": [[round(v, 3) for v in row] for row in one.tolist()],
        "two": [[round(v, 3) for v in row] for row in two.tolist()],
        "changes": changes,
        "places": places,
    }


def start(generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """A product of two Gaussian matrices, and its balanced factors, first applied first."""
    a, b = torch.randn(2, WIDTH, WIDTH, dtype=torch.float64, generator=generator) / WIDTH**0.5
    whole = a @ b
    u, s, v = torch.linalg.svd(whole)
    return whole, [s.sqrt()[:, None] * v, u * s.sqrt()]


def moved(matrices: list[Tensor], along: Tensor, generator: torch.Generator) -> Tensor:
    """The products of ``matrices`` moved along two random directions each by ``along``, ``(places, 2)``.

    A direction has the norm of the matrix it moves, so that one unit is as far for one matrix as for two.
    """
    whole: Tensor | None = None
    for matrix in matrices:
        directions = torch.randn(2, *matrix.shape, dtype=matrix.dtype, generator=generator)
        directions *= matrix.norm() / directions.flatten(1).norm(dim=1)[:, None, None]
        place = matrix + torch.einsum("pk,kij->pij", along, directions)
        whole = place if whole is None else place @ whole
    assert whole is not None
    return whole


def surfaces(axis: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The entropies on the grid for one matrix and for two, ``(grid, grid)`` each."""
    whole, factors = start(generator)
    along = torch.cartesian_prod(axis, axis)
    one, two = (
        spectral_entropy(moved(matrices, along, generator), batched=True).view(len(axis), len(axis))
        for matrices in ([whole], factors)
    )
    return one, two


HEAD = [
    "parameterisation",
    "entropy around the point, minus that at it",
    "deviation",
    "points where it falls",
]


def table_rows(content: dict[str, Any]) -> list[list[str]]:
    """The mean change over many points."""
    shown = []
    for name, values in content["changes"].items():
        found = torch.tensor(values)
        shown.append(
            [
                {"one": "one matrix", "two": "two factors"}[name],
                f"{float(found.mean()):+.2f}",
                f"±{float(found.std()):.2f}",
                f"{float((found < 0).double().mean()):.0%}",
            ]
        )
    return shown


def failures(content: dict[str, Any]) -> list[str]:
    """Two factors must have less rank around a point than one matrix."""
    one, two = (torch.tensor(content["changes"][name]).mean() for name in ("one", "two"))
    return [] if two < one else [f"E: two factors {float(two):+.3f}, one matrix {float(one):+.3f}"]


def plot(content: dict[str, Any]) -> Any:
    """Both surfaces in one scale of colours."""
    figure, axes = new_figure(1, 2, width=3.4, height=2.9)
    low = min(min(map(min, content[name])) for name in ("one", "two"))
    high = max(max(map(max, content[name])) for name in ("one", "two"))
    axis = content["axis"]
    for panel, name, title in zip(axes, ("one", "two"), ("one matrix", "two factors"), strict=True):
        levels = [low + (high - low) * i / 12 for i in range(13)]
        image = panel.contourf(axis, axis, content[name], levels=levels, cmap="viridis")
        panel.plot(0, 0, "w+", markersize=9)
        panel.set_title(title, loc="left")
        panel.set_xlabel("β")
        panel.grid(visible=False)
    axes[0].set_ylabel("α")
    figure.colorbar(image, ax=axes, label="entropy, nats", format="%.2f")
    return figure
