"""Experiment D: the bias with seven activations, after training.

A full-rank linear teacher of width 32 (the entropy of its features is the 2.16 of the figure's truth), the
cosine distance of 128 unseen points, 150 steps of gradient descent with momentum from weights of gain 0.85:
the figure states none of this, and steps and gain were chosen so that the *linear* networks have its values;
the other activations follow from it. SIREN comes with its own gain. tanh has the values of the figure if it
starts as ``nn.Linear`` does, with a gain of ``1 / sqrt(3)`` (the row ``TANH``): the smaller the start, the
lower the rank that training leaves.

The figure's axis says depth 2, 4, 8, 16. All its activations have the same value at the first of these, 2.17,
which two layers with an activation between them do not have here, at any number of steps: it is that of one
layer, where there is none. So we take its axis to be 1, 2, 4, 8 layers, and give the gap for the axis as
printed too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.low_rank_bias import targets
from benchmarks.low_rank_bias.networks import Networks, descend, draw, identity, teacher
from fxexpand.lowrank.features import kernel_rank
from fxexpand.reporting.figures import new_figure

TITLE = "D. Non-linearities"
WIDTH, SAMPLES, POINTS = 32, 32, 128
RATE, MOMENTUM, STEPS = 0.005, 0.9, 150
GAIN = 0.85  # the deviation of an entry times the root of the width
DEPTHS = (1, 2, 4, 8, 16)
TANH = "tanh, started as nn.Linear"
TANH_STEPS = 180
# (activation, gain). SIREN comes with its own.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "linear": (identity, GAIN),
    "tanh": (torch.tanh, GAIN),
    "ReLU": (torch.relu, GAIN),
    "leaky ReLU": (lambda x: F.leaky_relu(x, 0.01), GAIN),
    "SELU": (F.selu, GAIN),
    "GELU": (F.gelu, GAIN),
    "SIREN": (torch.sin, 2**0.5),
}


def run(quick: bool = False) -> dict[str, Any]:
    """Entropies before and after training, and losses, per activation, depth and draw."""
    draws, steps = (2, 20) if quick else (5, STEPS)
    rows = []
    for name, (activation, gain) in ACTIVATIONS.items():
        rows += one_activation(name, activation, gain, draws, steps)
    rows += one_activation(TANH, torch.tanh, 3**-0.5, draws, min(steps, 20) if quick else TANH_STEPS)
    return {"draws": draws, "steps": steps, "rate": RATE, "samples": SAMPLES, "rows": rows}


def one_activation(
    name: str, activation: Callable[[Tensor], Tensor], gain: float, draws: int, steps: int
) -> list[dict[str, Any]]:
    """All depths and draws at once; the same teachers and samples for every activation."""
    depths = DEPTHS
    generator = torch.Generator().manual_seed(0)
    teachers = teacher(draws, WIDTH, WIDTH, generator)
    x = torch.randn(draws, WIDTH, SAMPLES, generator=generator)
    unseen = torch.randn(draws, WIDTH, POINTS, generator=generator).repeat(len(depths), 1, 1)
    networks = draw(depths, draws, WIDTH, generator, gain=gain)
    inputs, wanted = (t.repeat(len(depths), 1, 1) for t in (x, teachers @ x))
    truth = teachers.repeat(len(depths), 1, 1) @ unseen

    def loss(trained: Networks) -> Tensor:
        return (trained.outputs(inputs, activation) - wanted).square().mean((-2, -1))

    def entropy() -> Tensor:
        with torch.no_grad():
            features = networks.outputs(unseen, activation).mT
            return networks.of(kernel_rank(features, "cosine_distance", measure="entropy", batched=True))

    before = entropy()
    for _ in descend(networks, loss, lambda p: torch.optim.SGD(p, RATE, momentum=MOMENTUM), steps):
        pass
    after = entropy()
    with torch.no_grad():
        train = networks.of(loss(networks))
        test = networks.of((networks.outputs(unseen, activation) - truth).square().mean((-2, -1)))
    return [
        {
            "activation": name,
            "depth": depth,
            "initial": [round(v, 4) for v in before[i].tolist()],
            "entropy": [round(v, 4) for v in after[i].tolist()],
            "train": [round(v, 4) for v in train[i].tolist()],
            "test": [round(v, 4) for v in test[i].tolist()],
        }
        for i, depth in enumerate(depths)
    ]


HEAD = [
    "activation: entropy at 1, 2, 4, 8, 16 layers",
    "ours",
    "deviation",
    "theirs",
    "gap 1..8",
    "gap 2..16",
]


def means(content: dict[str, Any], name: str, what: str = "entropy") -> list[float]:
    """Over the draws, at ``DEPTHS``."""
    return [sum(row[what]) / len(row[what]) for row in content["rows"] if row["activation"] == name]


def table_rows(content: dict[str, Any]) -> list[list[str]]:
    """Beside the targets, with the worst gap for both readings of their axis."""
    shown = []
    for name, wanted in {**targets.NONLINEARITIES, TANH: targets.NONLINEARITIES["tanh"]}.items():
        ours = means(content, name)
        deviations = [torch.tensor(r["entropy"]).std() for r in content["rows"] if r["activation"] == name]
        gaps = [max(abs(a - b) for a, b in zip(some, wanted, strict=True)) for some in (ours[:4], ours[1:])]
        shown.append(
            [
                name,
                " ".join(f"{v:.2f}" for v in ours),
                f"±{float(max(deviations)):.2f}",
                " ".join(f"{v:.2f}" for v in wanted),
                *[f"{gap:.2f}" for gap in gaps],
            ]
        )
    return shown


def failures(content: dict[str, Any]) -> list[str]:
    """Activations with which eight layers do not have a lower entropy than one."""
    found = []
    for name in targets.NONLINEARITIES:
        ours = means(content, name)
        if ours[3] >= ours[0]:
            found.append(f"D: {name}: the entropy does not fall with depth: {ours}")
    return found


def plot(content: dict[str, Any]) -> Any:
    """Entropy over depth, a panel per activation; before training dotted, their figure dashed."""
    figure, axes = new_figure(2, 4, width=2.5, height=2.1)
    for axis, (name, wanted) in zip(axes, targets.NONLINEARITIES.items(), strict=False):
        rows = [row for row in content["rows"] if row["activation"] == name]
        axis.plot(DEPTHS, means(content, name, "initial"), ":", color="#9ca3af", label="before training")
        axis.plot(DEPTHS, means(content, name), marker="o", markersize=3, color="#4c6a92", label="trained")
        low, high = [min(row["entropy"]) for row in rows], [max(row["entropy"]) for row in rows]
        axis.fill_between(DEPTHS, low, high, color="#4c6a92", alpha=0.2, linewidth=0)
        axis.plot(DEPTHS[:4], wanted, "--", color="#d9722e", label="their figure")
        if name == "tanh":
            axis.plot(DEPTHS, means(content, TANH), marker=".", color="#4c6a92", alpha=0.5, linewidth=1)
            axis.text(1, 1.03, "thin: started as nn.Linear", fontsize=7, color="#4c6a92")
        axis.set_xscale("log", base=2)
        axis.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
        axis.set_ylim(0.95, 2.3)
        axis.set_title(name, loc="left")
    axes[-1].set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center")
    figure.supxlabel("layers", fontsize=9)
    figure.supylabel("entropy of the features, nats", fontsize=9)
    return figure
