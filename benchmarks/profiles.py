"""Where does the time go, and what limits it? ``python -m benchmarks.profiles [--quick]``

How fast this machine multiplies, decomposes and convolves; and the operators, by torch.profiler, in
which ``expand`` and ``fuse`` of ResNet-50 and training steps of ResNet-18 spend their time. What explains the
ratios of ``benchmarks.surgery_cost`` and ``benchmarks.training_cost``. On the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile

from benchmarks.evidence import FOLDER, headline, machine, publish, save, variant
from benchmarks.fusing.surgery_cost import timed
from fxexpand import Chain, expand, fuse
from fxexpand.reporting.table import table

# Operators by the start of their names; what is none of these is "other".
KINDS = {
    "products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution", "aten::_slow_conv", "aten::_conv"),
    "eigenvectors": ("aten::_linalg_eigh",),
    "copies": ("aten::copy_",),
    "optimizer": ("aten::_fused_sgd",),
}
RECIPE = Chain(depth=3, width=4)  # of the training steps: the costliest of benchmarks.training_cost


def rates(quick: bool) -> list[dict[str, Any]]:
    """A rate of this machine: ``amount`` of ``unit`` per second, or the seconds themselves."""
    n = 256 if quick else 2048
    single, double = torch.randn(n, n), torch.randn(n, n, dtype=torch.float64)
    few = torch.randn(32, n)
    images, weight = torch.randn(8, 256, 14, 14), torch.randn(256, 256, 3, 3)
    convolve = partial(F.conv2d, images, weight, padding=1)
    large = torch.randn(2 * n, 2 * n)
    gram = large @ large.T
    cube, convolved = 2e-9 * n**3, 2e-9 * images.numel() * weight[0].numel()
    rows: list[tuple[str, str, Callable[[], Any], float | None, str]] = [
        ("product, float32", f"{n} x {n} x {n}", lambda: single @ single, cube, "GFLOP/s"),
        ("product, float32", f"32 x {n} x {n}", lambda: few @ single, cube * 32 / n, "GFLOP/s"),
        ("product, float64", f"{n} x {n} x {n}", lambda: double @ double, cube, "GFLOP/s"),
        ("convolution, float32", "8 x 256 x 14 x 14, 3 x 3", convolve, convolved, "GFLOP/s"),
        ("product, float32", f"{2 * n} x {2 * n} x {2 * n}", lambda: large @ large, None, "s"),
        ("eigenvectors, float32", f"{2 * n} x {2 * n}", lambda: torch.linalg.eigh(gram), None, "s"),
    ]
    found = []
    for what, size, function, amount, unit in rows:
        function()
        seconds = median(timed(function)[0] for _ in range(3 if amount is None else 15))
        value = seconds if amount is None else amount / seconds
        found.append({"what": what, "size": size, "value": value, "unit": unit})
    return found


def measure(what: str, work: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Milliseconds of ``work`` by kind of operator, medians over ``rounds``; the FLOPs of its products."""
    work()
    seconds = [timed(work)[0] for _ in range(rounds)]
    runs = []
    for _ in range(rounds):
        with profile(with_flops=True) as found:
            work()
        spent, flops, calls = dict.fromkeys(KINDS, 0.0), 0, 0
        for event in found.key_averages():
            kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), None)
            if kind is not None:
                spent[kind] += event.self_cpu_time_total / 1e3
            if kind == "products":
                flops, calls = flops + event.flops, calls + event.count
        runs.append((spent, flops, calls))
    kinds = {kind: median(spent[kind] for spent, _, _ in runs) for kind in KINDS}
    _, flops, calls = runs[0]
    return {"what": what, "ms": 1e3 * median(seconds), **kinds, "flops": flops, "calls": calls}


def profiles(quick: bool) -> list[dict[str, Any]]:
    """Surgery on ResNet-50, and training steps of ResNet-18 at batch 8, 64 x 64, plain and expanded."""
    import torchvision

    rounds, name, size, small = (1, "resnet18", 32, 32) if quick else (5, "resnet50", 224, 64)
    model, plain = torchvision.models.get_model(name, weights=None), torchvision.models.resnet18()
    x = torch.randn(8, 3, size, size)
    recipe = Chain(depth=2, width=1) if quick else RECIPE
    wide = expand(plain, recipe, init="kaiming")
    rows = [
        measure(f"{name}: pass", partial(_pass, model, x), rounds),
        measure(f"{name}: expand", partial(expand, model), rounds),
        measure(f"{name}: fuse", partial(fuse, expand(model), scope="expanded"), rounds),
    ]
    for title, network in (("step", plain), (f"step, ({recipe.depth}, {recipe.width:g})", wide)):
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9, fused=True)
        step = partial(_step, network, torch.randn(8, 3, small, small), optimizer)
        rows.append(measure(f"resnet18: {title}", step, 3 * rounds))
    return rows


def _pass(network: nn.Module, x: torch.Tensor) -> None:
    loss: Any = network(x).square().mean()
    loss.backward()


def _step(network: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    _pass(network, x)
    optimizer.step()


def tables(found: Sequence[dict[str, Any]], profiled: Sequence[dict[str, Any]]) -> str:
    """Both tables."""
    one = [(row["what"], row["size"], f"{row['value']:.4g} {row['unit']}") for row in found]
    two = []
    for row in profiled:
        products, flops = row["products"], row["flops"]
        rest = row["ms"] - sum(row[kind] for kind in KINDS)
        rate = f"{1e-6 * flops / products:.0f}" if flops else "-"
        times = [f"{row[kind]:.0f}" for kind in KINDS]
        two.append((row["what"], f"{row['ms']:.0f}", *times, f"{rest:.0f}", f"{1e-9 * flops:.1f}", rate))
    head = ("ms", "all", *KINDS, "rest", "GFLOP of products", "GFLOP/s")
    return f"{table(('this machine', 'size', 'rate'), one)}\n\n{table(head, two)}"


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing published")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/profiles[-quick].json")
    options = parser.parse_args(given)
    torch.manual_seed(0)
    found, profiled = rates(options.quick), profiles(options.quick)
    about, text = machine(), tables(found, profiled)
    print(f"{headline(about)}\n\n{text}")
    name = f"profiles{variant()}"
    out = options.out or FOLDER / "results" / f"{name}{'-quick' if options.quick else ''}.json"
    save(out, {"benchmark": "profiles", "machine": about, "rates": found, "profiles": profiled})
    if not options.quick and options.out is None:
        publish(name, f"{headline(about)}.\n\n```\n{text}\n```")
    return 0


if __name__ == "__main__":
    sys.exit(main())
