"""Where does the low-rank bias help? ``python -m benchmarks.generalisation [--quick]``

Plain networks, expanded ones (recipes and depths) and explicit regularisers, on digits with 100 training
images and on noisy linear maps of low and of full rank. Every arm has the same budget of 12 trials on 3
tuning seeds (12 learning rates, or 4 rates and 3 strengths), chosen on a validation set; then 12 other seeds,
each a split, a first weight and an order of batches that all arms share. Quoted are paired differences from
the plain network with their intervals. There is no weight decay but in the arms that say so.

With ``--data cifar10|cifar100|imagenet --root FOLDER``: the long schedules on data of your own, see
``benchmarks/image_schedules.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from benchmarks.training import image_schedules
from benchmarks.training.replicas import Loss, Penalty, Replicas, Setting, Split
from fxexpand.deploy.latency.intervals import median_interval
from fxexpand.lowrank import effective_rank, rank_report
from fxexpand.lowrank.measures import nuclear_norm, stable_rank
from fxexpand.recipes import Chain, ExpandNetFC, Recipe
from fxexpand.recipes.recipe import Init
from fxexpand.reporting.table import table
from fxexpand.surgery.expand import expand
from fxexpand.training.data import digits

README = FOLDER / "low_rank_bias" / "README.md"
TUNING, SEEDS = (100, 101, 102), tuple(range(12))
TRIALS = 12


@dataclass(frozen=True)
class Arm:
    """A way to train."""

    name: str
    recipe: Recipe | None = None
    penalty: Penalty | None = None
    strengths: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()
    init: Init = "matched"

    def trials(self, rates: Sequence[float]) -> list[tuple[float, float, float]]:
        """(rate, strength, decay), as many for every arm."""
        if not self.strengths and not self.decays:
            return [(rate, 0.0, 0.0) for rate in rates]
        few = rates[1::3]
        return [(r, s, d) for r in few for s in self.strengths or (0.0,) for d in self.decays or (0.0,)]


def nuclear(weight: Tensor) -> Tensor:
    """The nuclear norm."""
    return nuclear_norm(weight, batched=True)


def entropy_rank(weight: Tensor) -> Tensor:
    """The effective rank, in units of the full rank."""
    return effective_rank(weight, batched=True) / min(weight.shape[1:])


def norm_rank(weight: Tensor) -> Tensor:
    """The stable rank, in units of the full rank."""
    return stable_rank(weight, batched=True) / min(weight.shape[1:])


DECAYS = (1e-3, 1e-2, 1e-1)
ARMS = (
    Arm("plain"),
    Arm("Chain(depth=2)", Chain(depth=2, width=2)),
    Arm("Chain(depth=3)", Chain(depth=3, width=2)),
    Arm("Chain(depth=3), same start", Chain(depth=3, width=2), init="preserve"),
    Arm("Chain(depth=6)", Chain(depth=6, width=1)),
    Arm("ExpandNetFC", ExpandNetFC()),
    Arm("weight decay", decays=DECAYS),
    Arm("nuclear norm", penalty=nuclear, strengths=(1e-3, 1e-2, 1e-1)),
    Arm("effective rank", penalty=entropy_rank, strengths=(0.01, 0.1, 1.0)),
    Arm("stable rank", penalty=norm_rank, strengths=(0.01, 0.1, 1.0)),
    Arm("Chain(depth=3), decay", Chain(depth=3, width=2), decays=DECAYS),
)


@dataclass(frozen=True)
class Task:
    """A task: data by seed, the network, and a score in per cent, the higher the better."""

    name: str
    data: Callable[[int], tuple[Split, Split, Split]]  # training, validation, test; one replica
    network: Callable[[], nn.Module]
    loss: Loss
    score: Callable[[Tensor, Tensor], Tensor]
    rates: tuple[float, ...]
    batch: int
    steps: int
    unit: str


def classification(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each replica."""
    logs = outputs.log_softmax(-1).gather(-1, labels[..., None])
    return -logs.mean((1, 2))


def right(outputs: Tensor, labels: Tensor) -> Tensor:
    """The share of right answers."""
    return 100.0 * (outputs.argmax(-1) == labels).double().mean(1)


def regression(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The mean square of each replica."""
    return (outputs - wanted).square().mean((1, 2))


def explained(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The explained share of the variance."""
    rest = (outputs - wanted).double().square().mean((1, 2)) / wanted.double().square().mean((1, 2))
    return (100.0 * (1.0 - rest)).clamp(min=-100.0).nan_to_num(-100.0)


def digits_data(seed: int) -> tuple[Split, Split, Split]:
    """100 digits to learn from, 300 to choose by, 1397 to test on."""
    found = digits(seed, 400)
    x, y = found.train.tensors  # type: ignore[attr-defined]
    unseen_x, unseen_y = found.test.tensors  # type: ignore[attr-defined]
    order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
    a, b = order[:100], order[100:]
    return Split(x[a][None], y[a][None]), Split(x[b][None], y[b][None]), Split(unseen_x[None], unseen_y[None])


def linear_data(rank: int, seed: int, width: int = 32, points: int = 48) -> tuple[Split, Split, Split]:
    """Noisy outputs of a map of the given rank: signal and noise have variance 1 and 1/4."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    teacher = normal(width, rank) @ normal(rank, width) if rank < width else normal(width, width)
    teacher /= teacher.norm() / width**0.5

    def split(count: int, noise: float) -> Split:
        x = normal(1, count, width)
        return Split(x, x @ teacher.T + noise * normal(1, count, width))

    return split(points, 0.5), split(points, 0.5), split(1000, 0.0)


def classifier() -> nn.Module:
    """64-32-32-10."""
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*layers)


def linear_map() -> nn.Module:
    """One matrix."""
    return nn.Sequential(nn.Linear(32, 32, bias=False))


def rates(low: float, high: float) -> tuple[float, ...]:
    """``TRIALS`` learning rates, evenly spread in logarithm."""
    return tuple(low * (high / low) ** (i / (TRIALS - 1)) for i in range(TRIALS))


TASKS = (
    Task("digits", digits_data, classifier, classification, right, rates(0.003, 0.5), 50, 300, "accuracy %"),
    Task(
        "low-rank map",
        lambda seed: linear_data(3, seed),
        linear_map,
        regression,
        explained,
        rates(0.01, 2.0),
        48,
        200,
        "explained %",
    ),
    Task(
        "full-rank map",
        lambda seed: linear_data(32, seed),
        linear_map,
        regression,
        explained,
        rates(0.01, 2.0),
        48,
        200,
        "explained %",
    ),
)


def train(
    task: Task, arm: Arm, settings: Sequence[Setting], steps: int
) -> tuple[Replicas, tuple[Tensor, Tensor, Tensor]]:
    """The replicas, and their scores on the training, the validation and the test set."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = task.network()
        if arm.recipe is None:
            return model
        # "matched": random factors whose product has the plain weights' scale, and a lower rank at the start;
        # "preserve": their product is the plain weights, so that only the way from there is another.
        return expand(model, arm.recipe, init=arm.init, form="collapsed", inplace=True)

    sets = {seed: task.data(seed) for seed in {setting.seed for setting in settings}}
    splits = [
        Split(
            torch.cat([sets[setting.seed][part].x for setting in settings]),
            torch.cat([sets[setting.seed][part].y for setting in settings]),
        )
        for part in range(3)
    ]
    replicas = Replicas(build, settings)
    replicas.fit(splits[0], task.loss, steps=steps, batch=task.batch, penalty=arm.penalty)
    with torch.no_grad():
        scores = [task.score(replicas.outputs(split.x), split.y) for split in splits]
    fitted, validation, test = (torch.where(replicas.dead, -100.0, score) for score in scores)
    return replicas, (fitted, validation, test)


def measure(task: Task, arm: Arm, steps: int, tuning: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """Tune one arm on one task, and run it on the seeds."""
    begin = time.perf_counter()
    trials = arm.trials(task.rates)
    assert len(trials) == TRIALS
    settings = [Setting(seed, *trial) for trial in trials for seed in tuning]
    scores = train(task, arm, settings, steps)[1][1].view(TRIALS, len(tuning)).mean(1)
    best = trials[int(scores.argmax())]
    replicas, (fitted, _, test) = train(task, arm, [Setting(seed, *best) for seed in seeds], steps)
    ranks = []
    for model in replicas.trained():
        rows = rank_report(model).rows
        ranks.append(mean(row.effective_rank / row.full_rank for row in rows))
    return {
        "task": task.name,
        "unit": task.unit,
        "arm": arm.name,
        "rate": best[0],
        "strength": best[1] or best[2],
        "edge": best[0] in (task.rates[0], task.rates[-1]),
        "tuning": [round(v, 2) for v in scores.tolist()],
        "steps": steps,
        "train": [round(v, 3) for v in fitted.tolist()],
        "test": [round(v, 3) for v in test.tolist()],
        "rank_share": [round(v, 4) for v in ranks],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A table per task: means, paired differences from plain with intervals, and the rank of the weights."""
    parts = []
    for name in dict.fromkeys(row["task"] for row in rows):
        some = [row for row in rows if row["task"] == name]
        plain = next(row for row in some if row["arm"] == "plain")
        lines = []
        for row in some:
            differences = [a - b for a, b in zip(row["test"], plain["test"], strict=True)]
            shown, verdict = "-", "-"
            if row is not plain and len(differences) >= 6:
                interval = median_interval(differences)
                shown = f"{interval.median:+.2f} ({interval.low:+.2f}..{interval.high:+.2f})"
                better = "better" if interval.median > 0 else "worse"
                verdict = better if interval.excludes(0.0) else "no difference shown"
            lines.append(
                [
                    row["arm"],
                    f"{row['rate']:.3g}",
                    f"{row['strength']:g}" if row["strength"] else "-",
                    f"{mean(row['train']):.1f}",
                    f"{mean(row['test']):.2f}",
                    f"±{stdev(row['test']):.2f}",
                    shown,
                    f"{mean(row['rank_share']):.0%}",
                    verdict,
                ]
            )
        head = [name, "rate", "strength", "train", some[0]["unit"], "±"]
        head += ["minus plain, median", "rank", "verdict"]
        parts.append(table(head, lines, left=(0, 8)))
    return "\n\n".join(parts)


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; a finished arm is not run again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps and seeds, nothing published")
    parser.add_argument("--steps", type=int, help="of training; default: 300 on digits, 200 on maps")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/generalisation[-quick].json")
    parser.add_argument("--data", choices=("digits", *image_schedules.EPOCHS), default="digits")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="digits")
    if first.parse_known_args(given)[0].data in image_schedules.EPOCHS:
        return image_schedules.main(given)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    results = FOLDER / "results"
    out: Path = options.out or results / f"generalisation{'-quick' if options.quick else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.with_suffix(".jsonl")  # what an interrupted run has done
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(row["task"], row["arm"]) for row in rows}
    todo = [(task, arm) for task in TASKS for arm in ARMS if (task.name, arm.name) not in done]
    tuning, seeds = (TUNING[:1], SEEDS[:6]) if options.quick else (TUNING, SEEDS)
    for task, arm in track(todo, "arms", console=Console(stderr=True)):
        steps = options.steps or (10 if options.quick else task.steps)
        rows.append(measure(task, arm, steps, tuning, seeds))
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    about, text = machine(), summary(rows)
    print(f"{headline(about)}\n\n{text}")
    content = {"benchmark": "generalisation", "machine": about, "seeds": len(seeds)}
    save(out, {**content, "trials": TRIALS, "rows": rows})
    lines.unlink(missing_ok=True)
    if not options.quick and options.out is None:
        line = f"{headline(about)}; {len(seeds)} seeds."
        publish("generalisation", f"{line}\n\n```\n{text}\n```", README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
