"""Experiment A: the rank of random networks falls with their depth, before any training."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.low_rank_bias import targets
from benchmarks.low_rank_bias.networks import Distribution, draw, identity
from fxexpand.lowrank.features import FeatureKernel, kernel_rank
from fxexpand.lowrank.measures import spectral_entropy
from fxexpand.reporting.figures import new_figure

TITLE = "A. Rank at initialisation"
POINTS = 128
WITHIN = 0.05  # nats
# Their figure shows 1.91, but one layer has no activation, so it must have the entropy of the linear network:
# 1.83 here, and 1.85 with 512 points. At width 32 their two networks do agree at depth 1.
OUT_OF_REACH = [("relu", "cosine_distance", 16, 1)]
KERNELS: tuple[FeatureKernel, ...] = ("gram", "cosine", "cosine_distance")
DISTRIBUTIONS: tuple[Distribution, ...] = ("normal", "uniform")


def run(quick: bool = False) -> dict[str, Any]:
    """Entropies per width, network, distribution, measure and depth: all draws, with mean and deviation."""
    draws = 40 if quick else 400
    rows = []
    for width in (16, 32):
        for distribution in DISTRIBUTIONS:
            generator = torch.Generator().manual_seed(width)
            networks = draw(
                targets.DEPTHS_A, draws, width, generator, distribution=distribution, dtype=torch.float64
            )
            count = len(targets.DEPTHS_A) * draws
            inputs = torch.randn(count, width, POINTS, generator=generator, dtype=torch.float64)
            measured: dict[tuple[str, str], Tensor] = {
                ("linear", "end-to-end matrix"): spectral_entropy(networks.product(), batched=True)
            }
            for network, activation in (("linear", identity), ("relu", torch.relu)):
                features = networks.outputs(inputs, activation).mT
                for kernel in KERNELS:
                    measured[network, kernel] = kernel_rank(features, kernel, measure="entropy", batched=True)
            for (network, measure), values in measured.items():
                target = targets.INITIALISATION.get((network, measure, width))
                for place, (depth, found) in enumerate(
                    zip(targets.DEPTHS_A, networks.of(values), strict=True)
                ):
                    rows.append(
                        {
                            "width": width,
                            "distribution": distribution,
                            "network": network,
                            "measure": measure,
                            "depth": depth,
                            "mean": float(found.mean()),
                            "deviation": float(found.std()),
                            "target": None if target is None else target[place],
                            "quantiles": [
                                round(float(q), 3)
                                for q in torch.quantile(found, torch.linspace(0, 1, 21, dtype=found.dtype))
                            ],
                        }
                    )
    return {"draws": draws, "points": POINTS, "rows": rows}


def table_rows(content: dict[str, Any]) -> list[list[str]]:
    """The measurements beside the targets; uniform entries are compared with the same figures."""
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        key = (row["network"], row["measure"], row["width"], row["distribution"])
        series.setdefault(key, []).append(row)
    shown = []
    for key, rows in series.items():
        name = f"{key[0]}, {key[1]}, width {key[2]}, {key[3]}"
        wanted = [row["target"] for row in rows]
        ours = " ".join(f"{row['mean']:.2f}" for row in rows)
        spread = f"±{max(row['deviation'] for row in rows):.2f}"
        if None in wanted:
            shown.append([name, ours, spread, "-", "-"])
        else:
            worst = max(abs(row["mean"] - row["target"]) for row in rows)
            shown.append([name, ours, spread, " ".join(f"{t:.2f}" for t in wanted), f"{worst:.3f}"])
    return shown


HEAD = ["entropy at depth 1, 2, 4, 8, 16", "ours", "deviation", "theirs", "worst gap"]


def failures(content: dict[str, Any]) -> list[str]:
    """Means of normal entries further than 0.05 nats from a figure."""
    return [
        f"A: {row['network']}, {row['measure']}, depth {row['depth']}: {row['mean']:.3f}, not {row['target']}"
        for row in content["rows"]
        if row["target"] is not None
        and row["distribution"] == "normal"
        and abs(row["mean"] - row["target"]) > WITHIN
        and (row["network"], row["measure"], row["width"], row["depth"]) not in OUT_OF_REACH
    ]


def plot(content: dict[str, Any]) -> Any:
    """The distribution of the entropy per depth, as in their first figure."""
    import matplotlib

    shown = list(targets.INITIALISATION)
    figure, axes = new_figure(1, len(shown), width=2.9, height=2.5)
    colours = matplotlib.colormaps["viridis_r"]
    for axis, key in zip(axes, shown, strict=True):
        for place, depth in enumerate(targets.DEPTHS_A):
            for distribution, style in (("normal", "-"), ("uniform", ":")):
                [row] = [
                    r
                    for r in content["rows"]
                    if (r["network"], r["measure"], r["width"]) == key
                    and r["depth"] == depth
                    and r["distribution"] == distribution
                ]
                # Between two quantiles lies one tenth of the draws.
                quantiles = row["quantiles"][::2]
                steps = [(a, b) for a, b in pairwise(quantiles) if b > a]
                x = [(a + b) / 2 for a, b in steps]
                y = [1 / (len(quantiles) - 1) / (b - a) for a, b in steps]
                shade = colours(0.15 + 0.2 * place)
                axis.plot(x, y, style, color=shade, linewidth=1.2, label=f"{depth}" if style == "-" else None)
            axis.axvline(row["target"], color=shade, linewidth=0.8, alpha=0.6, linestyle="--")
        axis.set_title(f"{key[0]}, {key[1]},\nwidth {key[2]}", loc="left")
        axis.set_xlabel("entropy, nats")
    axes[0].set_ylabel("density")
    axes[0].legend(title="depth", fontsize=7)
    figure.supxlabel("solid: normal, dotted: uniform entries; dashed: their figure", fontsize=7)
    return figure
