"""Is a fused network as fast as the original, or faster? ``python -m benchmarks.latency [--quick]``

Four networks of one function, batch 1, in turns: the original (with the statistics of a trained one),
expanded by ``Chain(depth=3, width=2)``, folded again (``scope="expanded"``), and with everything folded. In
eager mode, and in onnxruntime, whose exporter folds many norms by itself; the expanded one only eagerly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from benchmarks.models import Network
from benchmarks.settle import settle
from fxexpand import Chain, LatencyReport, expand, fuse, measure_latency
from fxexpand.reporting.table import short, table

NETWORKS = (
    Network("torchvision", "resnet18"),
    Network("torchvision", "mobilenet_v3_small"),
    Network("timm", "repvgg_a0"),
    Network("timm", "mobileone_s0"),
    Network("timm", "fastvit_t8"),
    Network("timm", "vit_tiny_patch16_224"),
)
QUICK = (Network("timm", "test_resnet"),)
RECIPE = Chain(depth=3, width=2)
NAMES = ("original", "expanded", "fused", "all folded")
SAME = 0.03  # a fused network whose interval is further from 1 than this is not as fast as the original


def forms(model: nn.Module, x: torch.Tensor) -> dict[str, nn.Module]:
    """The four networks of one function."""
    big = expand(model, RECIPE)
    small = fuse(big, scope="expanded")
    return {"original": model, "expanded": big, "fused": small, "all folded": fuse(model, x)}


def measure(network: Network, px: int, rounds: int, exported: bool = True) -> list[dict[str, Any]]:
    """A row per form and backend."""
    torch.manual_seed(0)
    model, x = network.build().eval().requires_grad_(False), torch.randn(1, 3, px, px)
    settle(model, x.repeat(2, 1, 1, 1))
    models = forms(model, x)
    rows = rows_of(network, px, measure_latency(models, x, backends=("eager",), rounds=rounds))
    if exported:
        del models["expanded"]
        found = measure_latency(models, x, backends=("onnxruntime",), rounds=rounds, skip_unavailable=True)
        rows += rows_of(network, px, found)
    return rows


def rows_of(network: Network, px: int, report: LatencyReport) -> list[dict[str, Any]]:
    """The figures of each form in a report, with its ratio to the original."""
    rows = []
    for each in report.measurements:
        row = {
            "network": str(network),
            "px": px,
            "form": each.model,
            **{
                key: getattr(each, key) for key in ("backend", "median", "low", "high", "peak_bytes", "error")
            },
            "device": report.device,
            "dtype": report.dtype,
            "threads": report.threads,
            "rounds": report.rounds,
        }
        if each.model != "original":
            ratio = report.difference("original", each.model, each.backend)
            row["ratio"] = {"median": ratio.ratio, "low": ratio.low, "high": ratio.high, "real": ratio.real}
        rows.append(row)
    missing = [str(each) for each in report.unavailable]
    return [*rows, *({"network": str(network), "px": px, "unavailable": text} for text in missing)]


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The conditions that do not hold, in words."""
    found = []
    for row in rows:
        if "ratio" not in row or row["form"] == "expanded":
            continue
        low, high = row["ratio"]["low"], row["ratio"]["high"]
        faster_is_wrong = row["form"] == "fused" and high < 1 - SAME
        if low > 1 + SAME or faster_is_wrong:
            found.append(
                f"{row['network']}, {row['form']} on {row['backend']}: {row['ratio']['median']:.3f} "
                f"[{low:.3f}, {high:.3f}] of the original"
            )
    return found


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and what does not hold."""
    body = []
    for row in rows:
        if "unavailable" in row:
            continue
        ratio = row.get("ratio")
        body.append(
            (
                row["network"],
                str(row["px"]),
                row["backend"],
                row["form"],
                f"{row['median']:.2f}",
                f"[{row['low']:.2f}, {row['high']:.2f}]",
                f"{ratio['median']:.3f}" if ratio else "1",
                f"[{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else "",
                ("real" if ratio["real"] else "noise") if ratio else "",
                "-" if row["peak_bytes"] is None else f"{short(row['peak_bytes'])}B",
            )
        )
    head = ("network", "px", "backend", "form", "ms", "interval", "ratio", "interval", "", "peak")
    lines = [table(head, body, left=(0, 2, 3)), ""]
    lines += [row["unavailable"] for row in rows if "unavailable" in row]
    missed = misses(rows)
    return "\n".join([*lines, "Not as fast as the original:", *missed] if missed else [*lines, "All hold."])


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if a fused network is not as fast as the original."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small network, nothing published")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="networks whose name holds this; nothing published")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/latency[-quick].json")
    options = parser.parse_args(given)
    partly = bool(options.quick or options.only)
    chosen = [network for network in (QUICK if options.quick else NETWORKS) if options.only in str(network)]
    px, rounds = (32, 10) if options.quick else (224, options.rounds)
    rows: list[dict[str, Any]] = []
    for network in chosen:
        print(f"[{chosen.index(network) + 1}/{len(chosen)}] {network} ...", file=sys.stderr, flush=True)
        size = 256 if network.name == "fastvit_t8" else px
        rows += measure(network, size, rounds)
    about, text = machine(), summary(rows)
    print(f"{headline(about)}\n\n{text}")
    out = options.out or FOLDER / "results" / f"latency{'-quick' if partly else ''}.json"
    save(out, {"benchmark": "latency", "machine": about, "rows": rows})
    if not partly and options.out is None:
        conditions = (
            f"float32, batch 1, {rounds} rounds in turns, joint 95 % intervals per network and backend"
        )
        publish("latency", f"{headline(about)}; {conditions}.\n\n```\n{text}\n```")
    return 0 if options.quick else int(bool(misses(rows)))


if __name__ == "__main__":
    sys.exit(main())
