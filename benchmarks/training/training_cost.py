"""What does a training step of an expanded network cost? ``python -m benchmarks.training_cost [--quick]``

Side by side, in turns within one process: the original network; the chain on activations, as peers train it;
the product by ``torch.nn.utils.parametrize``, multiplied from the first factor to the last; ``fxexpand`` with
``form="auto"``; and the same with ``accumulate(batches=4)``. A step is forward, backward and SGD with
momentum (torch's fused kernel). Of accumulation it is a quarter of four micro-batches and one optimizer step,
compared with the original network doing the same. Quoted are medians, and medians of ratios within a round.

Memory is counted beyond parameters and optimizer state. ``kept`` is what one forward pass keeps for backward:
activations, and products of factors. ``peak`` is the most that forward and backward hold, gradients included.

On a CPU the C library keeps freed memory, for all forms alike.

A killed run goes on where it was, configuration by configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from benchmarks.evidence import FOLDER, headline, machine, publish, save, variant
from benchmarks.models import Network
from benchmarks.training.floor import extra_macs, matmul_rate
from benchmarks.training.training_steps import (
    CPU,
    CUDA,
    META,
    Setting,
    Steps,
    free_bytes,
    keep_memory,
    parametrized,
    return_memory,
    timed,
    twin,
)
from benchmarks.training.training_table import BATCHES, TARGETS, misses, summary
from fxexpand import Chain, expand
from fxexpand.layers.expanded import Form

ROUNDS, SECONDS = 9, 20.0  # of a configuration: it ends with either, after 2 rounds at least
SLOW = 4.0  # seconds of a rival's step from which on it is timed in one round only


@dataclass(frozen=True)
class Case:
    """A configuration: a network, the size of its images, the batch, and the recipe."""

    network: Network
    size: int
    batch: int
    depth: int
    width: float

    def __str__(self) -> str:
        return f"{self.network.name}-{self.size}-{self.batch}-{self.depth}-{self.width:g}"

    @property
    def key(self) -> dict[str, Any]:
        """Its columns of a row."""
        return asdict(self) | {"network": str(self.network)}


RESNET18, RESNET50 = Network("torchvision", "resnet18"), Network("torchvision", "resnet50")
MOBILENET, VIT = Network("torchvision", "mobilenet_v2"), Network("timm", "vit_small_patch16_224")
RECIPES = ((2, 1), (3, 1), (3, 2), (3, 4))
QUICK = [Case(RESNET18, 64, 8, 3, 1)]
ON_CPU = [
    Case(network, 64, batch, *recipe)
    for network, batches in (
        (RESNET18, (8, 32, 64)),
        (MOBILENET, (8, 32)),
        (RESNET50, (8, 32)),
        (VIT, (8, 32)),
    )
    for recipe in RECIPES
    for batch in batches
    if recipe != (3, 4) or network in (RESNET18, MOBILENET) or batch == 8  # the others take minutes
]
ON_CUDA = [
    Case(network, 224, batch, *recipe)
    for batch in (256, 64)
    for recipe in ((3, 2), (2, 1), (3, 1), (3, 4))
    for network in (RESNET18, RESNET50, MOBILENET, VIT)
]


class Contest:
    """All ways of training a configuration, ready to run in turns.

    Raises: MemoryError: there is too little, in words.
    """

    def __init__(self, case: Case, setting: Setting) -> None:
        if setting.compiler is not None:
            torch.compiler.reset()
        torch.manual_seed(0)
        self.setting = setting
        abstract = _networks(case, META)
        count = sum(p.numel() for p in abstract[1].parameters())
        if setting.device == "cpu":
            _require_memory(14 * count)  # factors, gradients, momentum, and some for the rest
        self.abstract = _ways(case, META, *abstract, None, None)
        original, big = (setting.placed(network) for network in _networks(case, setting))
        self.optimizers = {
            "original": _optimizer(original, setting),
            "auto": _optimizer(big, setting),
        }
        self.ways = _ways(case, setting, original, big, *self.optimizers.values())
        self.failed: dict[str, str] = {}
        self.peaks: dict[str, int] = {}
        self.slow: set[str] = set()
        self.times: dict[str, dict[int, float]] = {name: {} for name in self.ways}
        self.own: dict[str, list[float]] = {name: [] for name in self.optimizers}
        self.rates: list[float] = []
        self.activations = 0
        self.extra = {b: 3 * extra_macs(abstract[1], self.abstract["auto"].x, b) for b in (1, BATCHES)}

    def warm(self) -> None:
        """A first step of each, which measures the memory, and a second one of those that are fast."""
        for name, way in self.ways.items():
            try:
                if self.setting.compiler is not None:
                    way.step()  # compiling needs memory of its own
                start = time.perf_counter()
                self.peaks[name] = way.peak()
                seconds = time.perf_counter() - start
                assert way.optimizer is not None
                way.optimizer.step()
                if self.setting.compiler is not None or seconds < SLOW:
                    seconds = timed(way.step, self.setting.device)
                if name == "original":
                    self.activations = way.activation_peak()
            except torch.OutOfMemoryError:
                self.failed[name] = "out of memory"
            else:
                if name in ("chain", "parametrize") and seconds > SLOW:
                    self.slow.add(name)
            way.clear()

    def race(self, rounds: int, seconds: float) -> None:
        """Steps in turns, each round in another order."""
        start = time.perf_counter()
        running = [name for name in self.ways if name not in self.failed]
        for number in range(rounds):
            if number >= 2 and time.perf_counter() - start > seconds:
                break
            self.rates.append(matmul_rate(self.setting.device, self.setting.half))
            for name in running[number % len(running) :] + running[: number % len(running)]:
                if number and name in self.slow:
                    continue
                way = self.ways[name]
                self.times[name][number] = way.seconds()
                if name in self.optimizers:
                    self.own[name].append(timed(self.optimizers[name].step, self.setting.device))
                way.clear()

    def rows(self) -> list[dict[str, Any]]:
        """One per way of training."""
        return [self._row(name) for name in self.abstract]

    def _row(self, name: str) -> dict[str, Any]:
        batches = self.abstract[name].batches
        row: dict[str, Any] = {
            "name": name,
            "failed": self.failed.get(name),
            "params": sum(p.numel() for p in self.abstract[name].model.parameters()),
            "flops": self.abstract[name].flops(),
        }
        if not self.setting.half and not self.abstract[name].shared:
            row["kept_activations"], row["kept_products"] = self.abstract[name].kept()
        if name in self.failed:
            return row
        times, base = self.times[name], self.times["original x4" if batches > 1 else "original"]
        row["seconds"] = median(times.values())
        row["rounds"] = len(times)
        row["ratio"] = _quartiles([times[n] / base[n] for n in times])
        row["peak_bytes"] = self.peaks[name]
        # The memory of the original without gradients, 2 % more, and the gradients of the factors.
        row["allowed_bytes"] = round(1.02 * self.activations) + 4 * row["params"]
        if name in ("auto", "accumulate"):
            own = max(0.0, median(self.own["auto"]) - median(self.own["original"]))
            extra = self.extra[batches] / median(self.rates)
            row["floor"] = 1.0 + (extra + own / batches) / median(base.values())
            row["extra_seconds"], row["optimizer_seconds"] = extra, own / batches
        if name == "auto":
            row["against"] = {
                rival: _quartiles([times[n] / self.times[rival][n] for n in self.times[rival]])
                for rival in ("chain", "parametrize")
                if rival not in self.failed
            }
        return row


def _networks(case: Case, setting: Setting) -> tuple[nn.Module, nn.Module]:
    """The original and the expanded network, which do not share anything."""
    with torch.device("meta" if setting.device == "meta" else "cpu"):
        original: Any = case.network.build(case.size if case.network == VIT else None)
    # Only what is a layer: a chain on activations cannot be put in place of any other weight.
    layers = [name for name, module in original.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    recipe = Chain(depth=case.depth, width=case.width)
    return original, expand(original, recipe, select=layers, init="kaiming")


def _optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=True)


def _ways(
    case: Case,
    setting: Setting,
    original: nn.Module,
    big: nn.Module,
    of_original: torch.optim.Optimizer | None,
    of_factors: torch.optim.Optimizer | None,
) -> dict[str, Steps]:
    x = setting.placed(torch.randn(case.batch, 3, case.size, case.size))
    # Compiled code shares products where it is known beforehand that there are any.
    form: Form = "auto" if setting.compiler is None else "collapsed"
    start = partial(Steps, x=x, setting=setting)
    ways = {
        "original": start(original, optimizer=of_original),
        "chain": start(twin(big, "chain"), optimizer=of_factors),
        "parametrize": start(parametrized(big), optimizer=of_factors),
        "auto": start(big, optimizer=of_factors),
        "accumulate": start(twin(big, form), optimizer=of_factors, batches=BATCHES, shared=True),
    }
    if setting.device != "meta":
        ways["original x4"] = start(twin(original), optimizer=of_original, batches=BATCHES)
    return ways


def _quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return list(values) * 3 if len(values) == 1 else quantiles(values, n=4, method="inclusive")


def _require_memory(needed: int) -> None:
    free = free_bytes()
    if needed > free:
        raise MemoryError(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def measure(
    case: Case, setting: Setting, rounds: int = ROUNDS, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """One row per way of training; a single one with the reason where there is too little memory."""
    key = {**case.key, "device": setting.device}
    keep_memory()
    try:
        contest = Contest(case, setting)
    except MemoryError as error:
        return [{**key, "name": "all", "failed": str(error)}]
    contest.warm()
    contest.race(rounds, seconds)
    rows = [{**key, **row} for row in contest.rows()]
    del contest
    return_memory()
    return rows


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="ResNet-18, batch 8, (3, 1); nothing published")
    parser.add_argument("--targets", action="store_true", help="only what the targets are about")
    parser.add_argument("--only", help="some configurations, as resnet18-64-32-3-4, or a part of that")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of rounds, per configuration")
    parser.add_argument("--fresh", action="store_true", help="do not go on with an interrupted run")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/training_cost-DEVICE[-quick].json"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if a target is missed in a full run."""
    options = _arguments(given)
    setting = CUDA if options.device == "cuda" else CPU
    if setting == CUDA and not torch.cuda.is_available():
        print("training_cost --device cuda: not measured, there is no CUDA device.")
        return 0
    cases = QUICK if options.quick else ON_CUDA if setting == CUDA else ON_CPU
    if options.targets:
        cases = [case for case in cases if (*case.key.values(), options.device) in TARGETS]
    if options.only:
        cases = [case for case in cases if options.only in f"{case}-"]
    partly = options.quick or options.only or options.targets
    name = f"training_cost-{options.device}{variant()}{'-quick' if partly else ''}.json"
    out = options.out or FOLDER / "results" / name
    journal = out.with_suffix(".jsonl")
    if options.fresh or options.quick:
        journal.unlink(missing_ok=True)
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    done = {line["case"]: line["rows"] for line in map(json.loads, lines)}
    journal.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=str(case))
            if str(case) not in done:
                rows = measure(case, setting, 2 if options.quick else options.rounds, options.seconds)
                done[str(case)] = rows
                with open(journal, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"case": str(case), "rows": rows}) + "\n")
            bar.advance(task)
    about, rows = machine(), [row for case in cases for row in done[str(case)]]
    text = summary(rows)
    print(f"{headline(about)}\n\n{text}")
    save(out, {"benchmark": "training_cost", "machine": about, "rows": rows})
    journal.unlink(missing_ok=True)
    if partly or options.out is not None:
        return 0
    marker = "training_cost_cuda" if setting == CUDA else f"training_cost{variant()}"
    publish(marker, f"{headline(about)}.\n\n```\n{text}\n```")
    return int(bool(misses(rows)))


if __name__ == "__main__":
    sys.exit(main())
