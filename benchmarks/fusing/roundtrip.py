"""Does every network survive expand, training and fuse? ``python -m benchmarks.roundtrip [--quick]``

One row per network: how many of its Linear and convolution layers were expanded, the error of the expanded
network in float64 and float32, three SGD steps, and whether ``fuse(scope="expanded")`` gives back the class,
a state dict that loads strictly into a fresh network, the outputs and the FLOPs. Networks run in processes
of their own: a crash or a timeout is a row. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from benchmarks.journey import settled, train
from benchmarks.models import Network, timm_networks, torchvision_networks
from benchmarks.processes import rows_of
from fxexpand import Chain, expand, fuse, report
from fxexpand.reporting.table import short, table
from fxexpand.running.outputs import outputs_of, worst_error
from fxexpand.running.verify import tolerance

QUICK = [
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "torchvision:googlenet",
    "torchvision:vit_b_32",
    "torchvision:swin_t",
    "timm:convnext_atto",
    "timm:repvgg_a0",
    "timm:levit_128s",
    "timm:xcit_nano_12_p16_224",
    "timm:resnetv2_50",
    "timm:mobilevit_xxs",
    "timm:efficientformer_l1",
]
RECIPE = Chain(depth=2, width=1)
HEAVY = 160_000_000  # parameters of a network that runs alone: float64 copies of two do not fit in 24 GB


def measure(network: Network) -> dict[str, Any]:
    """The row of one network.

    The errors are relative to the largest output, in evaluation mode, against the network before surgery.
    """
    started = time.perf_counter()
    size, built = network.smallest()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    row: dict[str, Any] = {"name": str(network), "size": size}

    # Built twice: a copy of the largest would not fit.
    wide = settled(partial(network.build, built), x).double()
    exact = outputs_of(wide, x.double())
    expand(wide, RECIPE, inplace=True)
    row["error64"] = worst_error(outputs_of(wide, x.double()), exact)
    del wide

    model = settled(partial(network.build, built), x)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
    row["params"], row["layers"] = sum(p.numel() for p in model.parameters()), len(layers)
    before = outputs_of(model, x)
    row["noise32"] = worst_error(before, exact)
    row["contrast"] = worst_error([y.flip(0) for y in exact], exact)
    del exact
    expand(model, RECIPE, inplace=True)
    found = report(model)
    row["error32"] = worst_error(outputs_of(model, x), before)
    row["sites"] = len(found.changed)
    row["refused"] = {r.site: r.reason for r in found.refusals}
    plain = {name for name in layers if model.get_submodule(name)._parameters.get("weight") is not None}
    missed = [name for name in plain if not {name, f"{name}.weight"} & row["refused"].keys()]
    row["missed"], row["expanded_layers"] = missed, len(layers) - len(plain)
    row["params_expanded"] = sum(p.numel() for p in model.parameters())
    del before

    row["losses"] = train(model, x)
    after = outputs_of(model, x)
    fuse(model, scope="expanded", inplace=True)
    fresh = network.build(built).eval()
    row["class_kept"] = type(model) is type(fresh)
    fresh.load_state_dict(model.state_dict(), strict=True)
    row["fused_error"] = worst_error(outputs_of(fresh, x), after)
    row["flops"], row["flops_fused"] = _flops(fresh, x), _flops(model.eval(), x)
    row["tolerance32"] = tolerance(torch.float32, row["sites"])
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["failures"] = failures(row)
    return row


def failures(row: dict[str, Any]) -> list[str]:
    """The conditions that do not hold; empty for a good row."""
    checks = {
        "a layer neither expanded nor refused": not row["missed"],
        "outputs that do not depend on the input": row["contrast"] > 1e-4,
        "float64 error above 1e-10": row["error64"] <= 1e-10,
        "float32 error above its tolerance": row["error32"] <= row["tolerance32"],
        "training": all(math.isfinite(loss) for loss in row["losses"]),
        "class": row["class_kept"],
        "error after fusing above its tolerance": row["fused_error"] <= row["tolerance32"],
        "FLOPs": row["flops"] == row["flops_fused"],
    }
    return [name for name, holds in checks.items() if not holds]


def _flops(model: nn.Module, x: torch.Tensor) -> int:
    model.requires_grad_(False)  # the counter fails on a parameter that is the input of a module
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


def _fits(network: Network, running: Sequence[Network]) -> bool:
    """Whether it may start beside those that run."""
    return not any(n.parameters() > HEAVY for n in (network, *running))


def sweep(networks: Sequence[Network], jobs: int, timeout: float, threads: int) -> Iterator[dict[str, Any]]:
    """The rows of ``networks`` as they finish."""
    return rows_of(measure, networks, jobs=jobs, timeout=timeout, threads=threads, beside=_fits)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The table of all rows, and a line that counts."""
    head = (
        "network",
        "px",
        "params",
        "layers",
        "sites",
        "float64",
        "noise32",
        "float32",
        "fused",
        "FLOPs",
        "s",
        "holds",
    )
    lines = []
    for row in sorted(rows, key=lambda row: row["name"]):
        if "error64" not in row:
            lines.append((row["name"], *["-"] * 10, "; ".join(row["failures"])))
            continue
        covered = f"{row['expanded_layers']}/{row['layers']}"
        lines.append(
            (
                row["name"],
                str(row["size"]),
                short(row["params"]),
                covered,
                str(row["sites"]),
                f"{row['error64']:.0e}",
                f"{row['noise32']:.0e}",
                f"{row['error32']:.0e}",
                f"{row['fused_error']:.0e}",
                "equal" if row["flops"] == row["flops_fused"] else "DIFFER",
                f"{row['seconds']:.0f}",
                "; ".join(row["failures"]) or "all",
            )
        )
    good = sum(not row["failures"] for row in rows)
    return f"{table(head, lines, left=(0, 11))}\n\n{good} of {len(rows)} networks: everything holds."


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="twelve networks, nothing published")
    parser.add_argument("--only", default="*", help="a glob over library:name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per network")
    parser.add_argument("--fresh", action="store_true", help="do not go on with an interrupted run")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/roundtrip[-quick].json")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if a promise does not hold."""
    options = _arguments(given)
    networks = [
        n for n in (*torchvision_networks(), *timm_networks()) if fnmatch.fnmatch(str(n), options.only)
    ]
    if options.quick:
        networks = [n for n in networks if str(n) in QUICK]
    out = options.out or FOLDER / "results" / ("roundtrip-quick.json" if options.quick else "roundtrip.json")
    journal = out.with_suffix(".jsonl")
    if options.fresh or options.quick:
        journal.unlink(missing_ok=True)
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    done = {row["name"] for row in rows}
    # The small ones first: most rows are there early.
    rest = sorted((n for n in networks if str(n) not in done), key=Network.parameters)
    about = {**machine(), "threads": options.threads}
    journal.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for row in sweep(rest, options.jobs, options.timeout, options.threads):
        rows.append(row)
        with open(journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        verdict = "; ".join(row["failures"]) or "holds"
        print(f"[{len(rows)}/{len(networks)}] {row['name']}: {verdict}", file=sys.stderr, flush=True)
    text = summary(rows)
    print(
        f"{headline(about)}\n{RECIPE}, {options.jobs} processes, {time.monotonic() - started:.0f} s\n\n{text}"
    )
    rows.sort(key=lambda row: row["name"])
    save(out, {"benchmark": "roundtrip", "machine": about, "recipe": str(RECIPE), "rows": rows})
    journal.unlink(missing_ok=True)
    if options.out is None and not options.quick and options.only == "*":
        publish("roundtrip", f"{headline(about)}; {RECIPE}.\n\n```\n{text}\n```")
    return int(any(row["failures"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
