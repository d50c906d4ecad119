"""Experiment C: the bias comes with every optimiser, those without gradients included.

Least squares with the low-rank teacher, from 20 samples of 32 inputs: so few leave the rank of the converged
map of depth 1 at 2.88 (closed form), which is what the gradient methods of the figure reach there. Adam, SGD
and Nesterov work on each entry alone and train all depths and draws in one batch; L-BFGS and CMA-ES take a
network at a time.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.low_rank_bias import targets
from benchmarks.low_rank_bias.networks import descend, draw, teacher
from fxexpand.lowrank.measures import spectral_entropy
from fxexpand.reporting.figures import new_figure

TITLE = "C. Optimisers"
WIDTH, SAMPLES, RANK = 32, 20, 8
STEPS = 2000
LONG = 5  # times the steps, for SGD, which is not at the end of its way after 2000
SEARCHED = 2000  # random networks, of which the best is kept
GENERATIONS = 600  # of CMA-ES
GRADIENT: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.001),
}


class Task:
    """The least-squares problem of one draw: ``loss`` of end-to-end matrices ``(..., width, width)``."""

    def __init__(self, teachers: Tensor, covariance: Tensor) -> None:
        self.teachers, self.covariance = teachers, covariance

    def loss(self, products: Tensor) -> Tensor:
        """The mean square over samples and outputs."""
        away = products - self.teachers
        return (away @ self.covariance * away).sum((-2, -1)) / WIDTH

    def of(self, draw_: int) -> Task:
        """The task of one draw."""
        return Task(self.teachers[draw_], self.covariance[draw_])


def run(quick: bool = False) -> dict[str, Any]:
    """Entropies and losses per optimiser, depth and draw."""
    draws = 2 if quick else 5
    few = 1 if quick else 2  # draws of CMA-ES, which takes minutes
    generator = torch.Generator().manual_seed(0)
    teachers = teacher(draws, WIDTH, RANK, generator)
    x = torch.randn(draws, WIDTH, SAMPLES, generator=generator)
    task = Task(teachers, x @ x.mT / SAMPLES)
    depths = targets.DEPTHS_C
    rows = []
    steps = 100 if quick else STEPS
    for name, make in GRADIENT.items():
        rows += by_gradient(name, make, task, draws, steps)
    long = by_gradient("SGD", GRADIENT["SGD"], task, draws, LONG * steps)
    for depth in depths:
        generator = torch.Generator().manual_seed(depth)
        found = [lbfgs(start(depth, generator), task.of(d), 20 if quick else 300) for d in range(draws)]
        rows.append(row("L-BFGS", depth, torch.stack(found), task))
        found = [search(depth, task.of(d), generator, 50 if quick else SEARCHED) for d in range(draws)]
        rows.append(row("random search", depth, torch.stack(found), task))
        limit = 30 if quick else GENERATIONS
        found = [cma_es(start(depth, generator), task.of(d), limit, seed=d + 1) for d in range(few)]
        rows.append(row("CMA-ES", depth, torch.stack(found), task))
    return {
        "samples": SAMPLES,
        "steps": STEPS,
        "searched": SEARCHED,
        "generations": GENERATIONS,
        "truth": float(spectral_entropy(teachers, batched=True).mean()),
        "rows": rows,
        "long": long,
    }


def by_gradient(
    name: str, make: Callable[[list[Tensor]], torch.optim.Optimizer], task: Task, draws: int, steps: int
) -> list[dict[str, Any]]:
    """All depths and draws at once."""
    depths = targets.DEPTHS_C
    networks = draw(depths, draws, WIDTH, torch.Generator().manual_seed(1))
    wide = Task(*(t.repeat(len(depths), 1, 1) for t in (task.teachers, task.covariance)))
    for _ in descend(networks, lambda trained: wide.loss(trained.product()), make, steps):
        pass
    products = networks.of(networks.product().detach())
    return [row(name, depth, products[i], task) for i, depth in enumerate(depths)]


def row(name: str, depth: int, products: Tensor, task: Task) -> dict[str, Any]:
    """One point of the figure."""
    few = len(products)
    losses = Task(task.teachers[:few], task.covariance[:few]).loss(products)
    entropies = spectral_entropy(products, batched=True)
    target = targets.OPTIMISERS[name][targets.DEPTHS_C.index(depth)]
    return {
        "optimiser": name,
        "depth": depth,
        "entropy": [round(v, 4) for v in entropies.tolist()],
        "train": [round(v, 6) for v in losses.tolist()],
        "target": target,
    }


def start(depth: int, generator: torch.Generator) -> list[Tensor]:
    """One random network."""
    return draw((depth,), 1, WIDTH, generator).layers


def product(layers: list[Tensor]) -> Tensor:
    """``W_d ... W_1`` over any leading dimensions."""
    whole = layers[0]
    for layer in layers[1:]:
        whole = layer @ whole
    return whole


def lbfgs(layers: list[Tensor], task: Task, steps: int) -> Tensor:
    """The end-to-end matrix after L-BFGS with a strong Wolfe line search."""
    for layer in layers:
        layer.requires_grad_()
    optimiser = torch.optim.LBFGS(layers, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = task.loss(product(layers)).sum()
        torch.autograd.backward([loss])
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return product(layers).detach()[0]


def search(depth: int, task: Task, generator: torch.Generator, count: int) -> Tensor:
    """The best of ``count`` random networks."""
    products = product(draw((depth,), count, WIDTH, generator).layers)
    return products[task.loss(products).argmin()]


def cma_es(layers: list[Tensor], task: Task, generations: int, seed: int) -> Tensor:
    """The end-to-end matrix after CMA-ES with a diagonal covariance: the full one has up to 8192² entries."""
    import cma

    depth = len(layers)
    first = torch.cat([layer.flatten() for layer in layers]).double().numpy()
    options = {
        "CMA_diagonal": True,
        "seed": seed,
        "verbose": -9,
        "maxiter": generations,
        "tolfun": 1e-6,
        "popsize": 32,
    }
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        state = cma.CMAEvolutionStrategy(first, 0.3 * WIDTH**-0.5, options)
        while not state.stop():
            asked = state.ask()
            points = torch.tensor(asked, dtype=torch.float32).reshape(-1, depth, WIDTH, WIDTH)
            state.tell(asked, task.loss(product(list(points.unbind(1)))).tolist())
    best = torch.tensor(state.result.xfavorite, dtype=torch.float32).reshape(depth, WIDTH, WIDTH)
    return product(list(best.unbind(0)))


HEAD = ["optimiser: entropy at depth 1, 2, 4, 8", "ours", "deviation", "theirs", "worst gap", "train loss"]


def table_rows(content: dict[str, Any]) -> list[list[str]]:
    """Means over the draws beside the targets."""
    shown = []
    series = [
        (name, [row for row in content["rows"] if row["optimiser"] == name]) for name in targets.OPTIMISERS
    ]
    for name, rows in [*series, (f"SGD, {LONG} times the steps", content["long"])]:
        values = [torch.tensor(row["entropy"]) for row in rows]
        means = [float(v.mean()) for v in values]
        spread = max(float(v.std()) if len(v) > 1 else 0.0 for v in values)
        wanted = [row["target"] for row in rows]
        shown.append(
            [
                name,
                " ".join(f"{m:.2f}" for m in means),
                f"±{spread:.2f}",
                " ".join(f"{t:.2f}" for t in wanted),
                f"{max(abs(m - t) for m, t in zip(means, wanted, strict=True)):.2f}",
                " ".join(f"{sum(row['train']) / len(row['train']):.3f}" for row in rows),
            ]
        )
    return shown


def failures(content: dict[str, Any]) -> list[str]:
    """Optimisers whose entropy does not fall with depth."""
    found = []
    for name in targets.OPTIMISERS:
        rows = [row for row in content["rows"] if row["optimiser"] == name]
        means = [sum(row["entropy"]) / len(row["entropy"]) for row in rows]
        if sorted(means, reverse=True) != means:
            found.append(f"C: {name}: the entropy does not fall with depth: {means}")
    return found


def plot(content: dict[str, Any]) -> Any:
    """Entropy over depth, a panel per optimiser, their figure dashed."""
    figure, axes = new_figure(2, 3, width=2.8, height=2.2)
    for axis, (name, wanted) in zip(axes, targets.OPTIMISERS.items(), strict=True):
        rows = [row for row in content["rows"] if row["optimiser"] == name]
        depths = [row["depth"] for row in rows]
        means = [sum(row["entropy"]) / len(row["entropy"]) for row in rows]
        axis.plot(depths, means, marker="o", color="#4c6a92", label="ours")
        axis.fill_between(
            depths, [min(row["entropy"]) for row in rows], [max(row["entropy"]) for row in rows], alpha=0.2
        )
        axis.plot(targets.DEPTHS_C, wanted, "--", color="#d9722e", label="their figure")
        axis.set_xscale("log", base=2)
        axis.set_xticks(depths, [str(depth) for depth in depths])
        axis.set_ylim(1.9, 3.4)
        axis.set_title(name, loc="left")
    axes[0].legend(fontsize=7)
    figure.supxlabel("depth", fontsize=9)
    figure.supylabel("entropy of the product, nats", fontsize=9)
    return figure
