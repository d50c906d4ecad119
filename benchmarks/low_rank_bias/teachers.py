"""Experiment B: least squares with a linear teacher, by linear networks of depth 1 to 32.

The figures give no number of samples, step size or stop rule. Ours are one choice for all curves, made on a
grid of a few values so that the training losses of the full-rank teacher are theirs: as many samples as
inputs, 2000 steps of gradient descent with momentum 0.9 on all samples. Teachers have entries of variance ``2
/ width`` (so that the loss of a zero map is 2, which their losses at depth 32 ask for), networks ``1 /
width``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.low_rank_bias import targets
from benchmarks.low_rank_bias.networks import Networks, descend, draw, draw_low_rank, teacher
from fxexpand.lowrank.features import kernel_rank
from fxexpand.lowrank.measures import spectral_entropy
from fxexpand.reporting.figures import BLUE, GREY, ORANGE, new_figure

TITLE = "B. Least squares with a teacher"
WIDTH, SAMPLES, RATE, MOMENTUM, STEPS = 32, 32, 0.005, 0.9, 2000
POINTS = 128
LONG = 20  # times the steps, for the depth that the figure's stop rule decides
CASES = [
    ("low rank", "default"),
    ("full rank", "default"),
    ("low rank", "low rank"),
    ("full rank", "low rank"),
]
RANKS = {"low rank": 8, "full rank": WIDTH}


def run(quick: bool = False) -> dict[str, Any]:
    """Per teacher, initialisation and depth: entropies and losses of every draw."""
    draws, steps = (2, 200) if quick else (5, STEPS)
    depths = (1, 4, 8) if quick else targets.DEPTHS_B
    curves = [one_case(rank, start, depths, draws, steps) for rank, start in CASES]
    return {
        "draws": draws,
        "steps": steps,
        "samples": SAMPLES,
        "rate": RATE,
        "momentum": MOMENTUM,
        "depths": list(depths),
        "curves": curves,
        "long": one_case("low rank", "default", (1,), draws, steps * LONG),
        "speed": speed(depths, draws, 5 if quick else 30),
    }


def one_case(rank: str, start: str, depths: tuple[int, ...], draws: int, steps: int) -> dict[str, Any]:
    """All depths and draws at once; the same teachers and samples for every depth and initialisation."""
    generator = torch.Generator().manual_seed(0)
    teachers = teacher(draws, WIDTH, RANKS[rank], generator)
    x = torch.randn(draws, WIDTH, SAMPLES, generator=generator)
    unseen = torch.randn(draws, WIDTH, POINTS, generator=generator)
    build = draw if start == "default" else draw_low_rank
    networks = build(depths, draws, WIDTH, generator)
    wanted, covariance = (t.repeat(len(depths), 1, 1) for t in (teachers, x @ x.mT / SAMPLES))

    def loss(trained: Networks) -> Tensor:
        away = trained.product() - wanted
        return (away @ covariance * away).sum((-2, -1)) / WIDTH  # the mean square over samples and outputs

    def features(matrices: Tensor) -> Tensor:
        points = unseen.repeat(len(matrices) // draws, 1, 1)
        return kernel_rank((matrices @ points).mT, "cosine_distance", measure="entropy", batched=True)

    found: dict[str, Tensor] = {"initial": spectral_entropy(networks.product(), batched=True)}
    for _ in descend(networks, loss, lambda p: torch.optim.SGD(p, RATE, momentum=MOMENTUM), steps):
        pass
    with torch.no_grad():
        product = networks.product()
        away = (product - wanted) @ unseen.repeat(len(depths), 1, 1)
        found["converged"] = spectral_entropy(product, batched=True)
        found["converged features"] = features(product)
        found["train"] = loss(networks)
        found["test"] = away.square().mean((-2, -1))
    return {
        "teacher": rank,
        "initialisation": start,
        "truth": float(spectral_entropy(teachers, batched=True).mean()),
        "truth features": float(features(teachers).mean()),
        "depths": list(depths),
        **{
            name: [[round(v, 4) for v in row] for row in networks.of(values).tolist()]
            for name, values in found.items()
        },
    }


def speed(depths: tuple[int, ...], draws: int, steps: int) -> dict[str, float]:
    """Seconds for ``steps`` steps of all networks: in one batch, and one network after the other."""

    def seconds(groups: Sequence[tuple[tuple[int, ...], int]]) -> float:
        begin = time.perf_counter()
        for some, count in groups:
            networks = draw(some, count, WIDTH, torch.Generator().manual_seed(0))
            make = lambda p: torch.optim.SGD(p, RATE, momentum=MOMENTUM)  # noqa: E731
            for _ in descend(networks, lambda n: n.product().square().mean((-2, -1)), make, steps):
                pass
        return time.perf_counter() - begin

    alone = [((depth,), 1) for depth in depths for _ in range(draws)]
    together = [(depths, draws)]
    seconds(together)
    batch, single = seconds(together), seconds(alone)
    return {"steps": steps, "batched_s": batch, "single_s": single, "speed_up": single / batch}


HEAD = ["teacher, initialisation: measure", "ours", "deviation", "theirs", "worst gap"]


def table_rows(content: dict[str, Any]) -> list[list[str]]:
    """Means over the draws beside the targets."""
    shown = []
    for curve in content["curves"]:
        key = (curve["teacher"], curve["initialisation"])
        for measure in ("initial", "converged", "converged features", "train", "test"):
            values = torch.tensor(curve[measure])
            wanted = targets.TEACHERS.get(key, {}).get(measure)
            ours = values.mean(1).tolist()
            if wanted is not None and len(wanted) == len(ours):
                gap = f"{max(abs(a - b) for a, b in zip(ours, wanted, strict=True)):.2f}"
                theirs = " ".join(f"{v:.2f}" for v in wanted)
            else:
                gap = theirs = "-"
            line = " ".join(f"{v:.2f}" for v in ours)
            shown.append(
                [f"{key[0]}, {key[1]}: {measure}", line, f"±{float(values.std(1).max()):.2f}", theirs, gap]
            )
    long = content["long"]
    for measure in ("converged", "test"):
        mean, deviation = float(torch.tensor(long[measure]).mean()), float(torch.tensor(long[measure]).std())
        target = targets.TEACHERS["low rank", "default"][measure][0]
        name = f"depth 1 alone, {LONG} times the steps: {measure}"
        shown.append([name, f"{mean:.2f}", f"±{deviation:.2f}", f"{target:.2f}", f"{abs(mean - target):.2f}"])
    speed, count = content["speed"], len(content["depths"]) * content["draws"]
    name = f"{count} networks at once ({1e3 * speed['batched_s'] / speed['steps']:.0f} ms a step), one by one"
    shown.append(
        [name, f"{1e3 * speed['single_s'] / speed['steps']:.0f} ms", "-", "-", f"{speed['speed_up']:.1f}x"]
    )
    return shown


def failures(content: dict[str, Any]) -> list[str]:
    """The statements of the figures that do not hold here."""
    found = []
    for curve in content["curves"]:
        ranks = [sum(row) / len(row) for row in curve["converged"]]
        if curve["initialisation"] == "default" and ranks[0] <= ranks[-1]:
            found.append(f"B: {curve['teacher']}: the converged entropy does not fall with depth")
    full = next(c for c in content["curves"] if c["teacher"] == "full rank")
    losses = [sum(row) / len(row) for row in full["test"]]
    if losses[-1] <= losses[0]:
        found.append("B: too much depth does not hurt with the full-rank teacher")
    return found


def plot(content: dict[str, Any]) -> Any:
    """Entropy and losses over depth: mean and range over the draws, their figures dashed."""
    curves = [c for c in content["curves"] if (c["teacher"], c["initialisation"]) in targets.TEACHERS]
    figure, axes = new_figure(2, len(curves), width=3.3)
    for place, curve in enumerate(curves):
        known = targets.TEACHERS[curve["teacher"], curve["initialisation"]]
        upper, lower = axes[place], axes[len(curves) + place]
        for axis, measure, colour in (
            (upper, "initial", GREY),
            (upper, "converged", BLUE),
            (lower, "train", GREY),
            (lower, "test", ORANGE),
        ):
            rows = curve[measure]
            axis.plot(
                curve["depths"], [sum(r) / len(r) for r in rows], color=colour, label=measure, marker="."
            )
            low, high = [min(r) for r in rows], [max(r) for r in rows]
            axis.fill_between(curve["depths"], low, high, color=colour, alpha=0.18, linewidth=0)
            if measure in known:
                axis.plot(
                    targets.DEPTHS_B, known[measure], "--", color=colour, linewidth=1, label="their figure"
                )
        upper.axhline(curve["truth"], color="black", linewidth=0.8, linestyle=":", label="teacher")
        upper.set_title(f"{curve['teacher']} teacher, {curve['initialisation']} start", loc="left")
        lower.set_xlabel("depth")
        upper.set_ylim(0.9, 3.5)
        lower.set_ylim(bottom=0.0)
        upper.legend(fontsize=6.5)
        lower.legend(fontsize=6.5)
    axes[0].set_ylabel("entropy of the product, nats")
    axes[len(curves)].set_ylabel("loss")
    return figure
