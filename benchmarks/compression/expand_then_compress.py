"""Does the low-rank bias buy compression? ``python -m benchmarks.expand_then_compress [--quick]``

The whole chain on scikit-learn's digits: the demo's network, trained plain and expanded (same start, same
batches, same schedule, Adam without weight decay), fused, then factored to shares of its FLOPs without any
further training. The curve is test accuracy against FLOPs, paired by seed; beside it the fewest FLOPs at
which a network is within one point of what the plain one reaches uncompressed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from fxexpand import count_flops, expand, export_onnx, factorize, fuse, measure_latency, rank_report
from fxexpand.errors import SelectionError
from fxexpand.recipes import Chain
from fxexpand.reporting.table import short, table
from fxexpand.training.data import Data, InMemory, batches, digits
from fxexpand.training.demo import Digits
from fxexpand.training.demo.findings import Spread
from fxexpand.training.loop import accuracy, fit
from fxexpand.training.options import Schedule

SHARES = (0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
WITHIN = 1.0  # points of test accuracy that a compressed network may lose


@dataclass(frozen=True)
class Arm:
    """A network to train: plain, or expanded to this depth."""

    depth: int

    @property
    def name(self) -> str:
        """As in the tables."""
        return "plain" if self.depth == 1 else f"expanded, depth {self.depth}"


def trained(arm: Arm, seed: int, data: Data, schedule: Schedule) -> nn.Module:
    """The fused network, in evaluation mode."""
    torch.manual_seed(seed)
    model: nn.Module = Digits()
    if arm.depth > 1:
        model = expand(model, Chain(depth=arm.depth, width=2))
    train = batches(data.train, schedule.batch_size, seed=seed)
    fit(model, train, batches(data.test, 500), schedule)
    example = next(iter(batches(data.test, 1)))[0]
    return fuse(model.eval(), example)


def curve(small: nn.Module, data: Data, shares: Sequence[float]) -> dict[str, Any]:
    """Accuracy and FLOPs of a network, whole and factored, by weights and by data."""
    test, example = batches(data.test, 500), next(iter(batches(data.test, 1)))[0]
    train = batches(data.train, 300)
    assert isinstance(train, InMemory)
    whole = count_flops(small, example).total
    ranks = [row.effective_rank for row in rank_report(small).rows]
    rows: dict[str, Any] = {"flops": whole, "accuracy": accuracy(small, test), "ranks": ranks, "by": {}}
    for by, calibration in (("weights", None), ("data", [train.images[:300]])):
        points = []
        for share in shares:
            try:
                low = factorize(small, example, flops=share, calibration=calibration)
            except SelectionError:
                continue  # below rank 1 everywhere
            flops = count_flops(low, example).total
            params = sum(parameter.numel() for parameter in low.parameters())
            points.append({"share": share, "flops": flops, "params": params, "accuracy": accuracy(low, test)})
        rows["by"][by] = points
    return rows


def fewest(points: Sequence[dict[str, Any]], whole: int, goal: float) -> dict[str, Any] | None:
    """The point of fewest FLOPs from which on all dearer ones reach the goal; None where the first fails."""
    found = None
    for point in sorted(points, key=lambda point: -point["flops"]):
        if point["accuracy"] < goal:
            return found
        found = point
    return found


def measured(arms: Sequence[Arm], runs: Sequence[dict[str, Any]], seed: int, data: Data, schedule: Schedule,
             rounds: int) -> dict[str, Any]:  # fmt: skip
    """Latency and size on disk of one seed's networks at the fewest FLOPs that keep the accuracy."""
    example = next(iter(batches(data.test, 1)))[0]
    models: dict[str, nn.Module] = {}
    sizes: dict[str, Any] = {}
    run = next(run for run in runs if run["seed"] == seed)
    goal = run["arms"]["plain"]["accuracy"] - WITHIN
    for arm in arms:
        small, rows = trained(arm, seed, data, schedule), run["arms"][arm.name]
        if not models:
            models["plain, whole"] = small
        point = fewest(rows["by"]["data"], rows["flops"], goal)
        if point is not None:
            train = batches(data.train, 300)
            assert isinstance(train, InMemory)
            images = train.images[:300]
            models[arm.name] = factorize(small, example, flops=point["share"], calibration=[images])
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            report = export_onnx(model, Path(folder) / "model.onnx", (example,))
            sizes[name] = {"bytes": report.size, "flops": count_flops(model, example).total,
                           "params": sum(p.numel() for p in model.parameters())}  # fmt: skip
    timed = measure_latency(
        models, example, backends=["eager", "onnxruntime"], rounds=rounds, tolerance=float("inf")
    )
    for row in timed.measurements:
        sizes[row.model][row.backend] = row.median
    return sizes


def unfinished(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The seeds that an interrupted run with the same settings has saved."""
    if not path.exists():
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    same = all(saved.get(key) == content[key] for key in ("benchmark", "settings", "shares"))
    return list(saved["runs"]) if same and saved.get("unfinished") else []


def tables(arms: Sequence[Arm], runs: Sequence[dict[str, Any]], chain: dict[str, Any]) -> str:
    """The curves, the fewest FLOPs, and what was measured of them, as text."""
    sums = {a.name: [sum(run["arms"][a.name]["ranks"]) for run in runs] for a in arms}
    ranks = [(name, Spread.of(values).text()) for name, values in sums.items()]
    parts = [table(("fused network", "effective rank, sum over layers"), ranks)]
    for by in ("weights", "data"):
        rows = [("whole", *(_spread(runs, arm, None, by) for arm in arms), _difference(runs, arms, None, by))]
        for share in SHARES:
            if all(_accuracy(run, arms[0], share, by) is not None for run in runs):
                cells = [_spread(runs, arm, share, by) for arm in arms]
                rows.append((f"{share:g}", *cells, _difference(runs, arms, share, by)))
        head = (f"FLOPs, by {by}", *(arm.name for arm in arms), "expanded - plain [95 %]")
        parts.append(table(head, rows))
        least = [(arm.name, *_fewest(runs, arm, by)) for arm in arms]
        parts.append(table((f"within {WITHIN:g} point of plain, by {by}", "share of FLOPs", "seeds"), least))
    rows = [
        (name, short(row["params"]), short(row["flops"]), short(row["bytes"]), f"{row['eager']:.3f}",
         f"{row['onnxruntime']:.4f}") for name, row in chain.items()
    ]  # fmt: skip
    head = ("first seed, by data", "params", "FLOPs", "ONNX bytes", "eager ms", "onnxruntime ms")
    return "\n\n".join([*parts, table(head, rows), verdict(arms, runs)])


def verdict(arms: Sequence[Arm], runs: Sequence[dict[str, Any]]) -> str:
    """A sentence from the figures: the number of shares whose interval lies on one side of zero."""
    lines = []
    for by in ("weights", "data"):
        for arm in arms[1:]:
            better: list[str] = []
            worse: list[str] = []
            count = 0
            for share in SHARES:
                change = _paired(runs, arms[0], arm, share, by)
                if change is None or change.count < 2:
                    continue
                count += 1
                if change.excludes_zero(1.0 - 0.05 / len(SHARES)):
                    (better if change.mean > 0 else worse).append(f"{share:g}")
            lines.append(
                f"By {by}, {arm.name}: above plain at {len(better)} of {count} shares of FLOPs "
                f"({', '.join(better) or 'none'}), below it at {len(worse)} ({', '.join(worse) or 'none'}); "
                "at the others within the spread of the seeds (intervals hold jointly with 95 %)."
            )
    return "\n".join(lines)


def _accuracy(run: dict[str, Any], arm: Arm, share: float | None, by: str) -> float | None:
    rows = run["arms"][arm.name]
    if share is None:
        return float(rows["accuracy"])
    return next((float(p["accuracy"]) for p in rows["by"][by] if p["share"] == share), None)


def _spread(runs: Sequence[dict[str, Any]], arm: Arm, share: float | None, by: str) -> str:
    values = [value for run in runs if (value := _accuracy(run, arm, share, by)) is not None]
    return Spread.of(values).text() if values else "-"


def _paired(
    runs: Sequence[dict[str, Any]], plain: Arm, arm: Arm, share: float | None, by: str
) -> Spread | None:
    pairs = [(_accuracy(run, plain, share, by), _accuracy(run, arm, share, by)) for run in runs]
    changes = [after - before for before, after in pairs if before is not None and after is not None]
    return Spread.of(changes) if changes else None


def _difference(runs: Sequence[dict[str, Any]], arms: Sequence[Arm], share: float | None, by: str) -> str:
    texts = []
    for arm in arms[1:]:
        change = _paired(runs, arms[0], arm, share, by)
        if change is None:
            texts.append("-")
        else:
            low, high = change.interval()
            texts.append(f"{change.mean:+.2f} [{low:+.2f}, {high:+.2f}]")
    return "; ".join(texts)


def _fewest(runs: Sequence[dict[str, Any]], arm: Arm, by: str) -> tuple[str, str]:
    shares = []
    for run in runs:
        rows = run["arms"][arm.name]
        point = fewest(rows["by"][by], rows["flops"], run["arms"]["plain"]["accuracy"] - WITHIN)
        shares.append(1.0 if point is None else point["flops"] / rows["flops"])
    return Spread.of(shares).text(3), str(len(shares))


def plot(arms: Sequence[Arm], runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against the share of FLOPs: mean and range over the seeds, by weights and by data."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    FigureCanvasSVG(figure)
    for panel, by in zip(figure.subplots(1, 2, sharey=True), ("weights", "data"), strict=True):
        for arm in arms:
            known = [s for s in SHARES if all(_accuracy(run, arm, s, by) is not None for run in runs)]
            values = [[_accuracy(run, arm, share, by) or 0.0 for run in runs] for share in known]
            panel.plot(known, [fmean(v) for v in values], marker="o", markersize=3, label=arm.name)
            panel.fill_between(known, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
        panel.set_xscale("log")
        panel.set_xticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
        panel.set_title(f"approximated by {by}", fontsize=10)
        panel.set_xlabel("share of FLOPs")
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed of two epochs, nothing published")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--depths", type=int, nargs="+", default=[3])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--train-size", type=int, default=600)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/expand_then_compress.json")
    options = parser.parse_args(given)
    if options.quick:
        options.seeds, options.epochs, options.depths = 1, 2, options.depths[:1]
    arms = [Arm(1), *map(Arm, options.depths)]
    schedule = Schedule(epochs=options.epochs, rank_every=10**9)
    default = FOLDER / "results" / f"expand_then_compress{'-quick' if options.quick else ''}.json"
    out, about = options.out or default, machine()
    content: dict[str, Any] = {
        "benchmark": "expand_then_compress",
        "machine": about,
        "settings": {key: getattr(options, key) for key in ("depths", "epochs", "train_size")},
        "shares": list(SHARES),
    }
    runs = unfinished(out, content)
    for seed in range(len(runs), options.seeds):
        print(f"seed {seed} ...", file=sys.stderr, flush=True)
        data = digits(seed, options.train_size)
        curves = {arm.name: curve(trained(arm, seed, data, schedule), data, SHARES) for arm in arms}
        runs.append({"seed": seed, "arms": curves})
        save(out, {**content, "runs": runs, "unfinished": True})
    data = digits(0, options.train_size)
    chain = measured(arms, runs, 0, data, schedule, rounds=10 if options.quick else 50)
    text = tables(arms, runs, chain)
    print(f"{headline(about)}\n\n{text}")
    save(out, {**content, "runs": runs, "chain": chain})
    if options.quick or options.out is not None:
        return 0
    plot(arms, runs, default.with_suffix(".svg"))
    note = f"{options.seeds} seeds, {options.epochs} epochs, {options.train_size} training images"
    publish("expand_then_compress", f"{headline(about)}; {note}.\n\n```\n{text}\n```")
    return 0


if __name__ == "__main__":
    sys.exit(main())
