"""What does a training step of an expanded network cost? ``python -m benchmarks.training_cost [--quick]``

Side by side, in turns within one process: the original network; the chain on activations, as peers train it;
the product by ``torch.nn.utils.parametrize``, multiplied from the first factor to the last; ``fxexpand`` with
``form="auto"``; and the same with ``accumulate(batches=4)``. A step is forward, backward and SGD with
momentum (torch's fused kernel). Of accumulation it is a quarter of four micro-batches and one optimizer step,
compared with the original network doing the same. Quoted are medians, and medians of ratios within a round.

The floor is what arithmetic asks for: the original step, the extra FLOPs of each layer's cheapest form at the
measured rate of matrix products, and what the optimizer takes for that many more parameters. "peak MB" is
what forward and backward hold beyond the parameters: activations, products and gradients.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from benchmarks.models import Network
from fxexpand import Chain, expand
from fxexpand.accumulation import accumulate
from fxexpand.kernel import macs
from fxexpand.layers import Expanded, bare
from fxexpand.ops import kernel_of
from fxexpand.table import short, table
from fxexpand.weights import expanded_weights

RECIPES = ((2, 1), (3, 1), (3, 2), (3, 4))
NAMES = ("original", "chain", "parametrize", "auto", "accumulate")
BATCHES = 4  # micro-batches of one accumulated step
ABOVE_FLOOR = 1.15


@dataclass(frozen=True)
class Case:
    """A network, the size of its images, and the batch."""

    network: Network
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.network.name}-{self.size}-{self.batch}-"


RESNET18, RESNET50 = Network("torchvision", "resnet18"), Network("torchvision", "resnet50")
MOBILENET, VIT = Network("torchvision", "mobilenet_v2"), Network("timm", "vit_small_patch16_224")
CPU = [
    *(Case(RESNET18, 64, batch) for batch in (8, 32, 128)),
    *(Case(RESNET50, 64, batch) for batch in (8, 32)),
    *(Case(MOBILENET, 64, batch) for batch in (8, 32)),
    *(Case(VIT, 64, batch) for batch in (8, 32)),
]
CUDA = [Case(network, 224, batch) for network in (RESNET18, RESNET50, MOBILENET, VIT) for batch in (64, 256)]
# (network, size, batch, depth, width, device): the highest ratios of auto and of accumulate to the original.
TARGETS = {
    ("torchvision:resnet18", 64, 32, 3, 1, "cpu"): (1.5, 1.25),
    ("torchvision:resnet18", 64, 32, 3, 4, "cpu"): (4.0, 3.0),
    ("torchvision:resnet18", 224, 256, 3, 2, "cuda"): (1.10, None),
    ("torchvision:resnet50", 224, 256, 3, 2, "cuda"): (1.10, None),
}


class Product(nn.Module):
    """What one writes without a library: the factors as matrices, multiplied in turn."""

    def __init__(self, block: nn.Sequential, groups: int) -> None:
        super().__init__()
        self.factors = [part.get_parameter("weight").detach() for part in block]
        self.groups = groups

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The factors that were planned."""
        return tuple(factor.clone() for factor in self.factors)

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """The weight."""
        product = first.reshape(self.groups, first.shape[0] // self.groups, -1)
        for factor in others:
            product = factor.reshape(self.groups, -1, product.shape[1]) @ product
        return product.reshape(-1, *first.shape[1:])


def parametrized(big: nn.Module) -> nn.Module:
    """A copy of an expanded network whose layers are stock layers with a ``Product``."""
    model = copy.deepcopy(big)
    for module in list(model.modules()):
        if isinstance(module, Expanded):
            block, weight = module.expansion, module.weight.detach()
            stock: Any = bare(module, weight)
            stock._parameters["bias"] = module._parameters["bias"]
            for attribute in ("recipe", "form", "normed", "collapse_from", "chain", "held"):
                stock.__dict__.pop(attribute, None)
            module.__class__ = type(stock)
            module.__dict__.clear()
            module.__dict__.update(stock.__dict__)
            groups = getattr(module, "groups", 1)
            parametrize.register_parametrization(module, "weight", Product(block, groups), unsafe=True)
    return model


class Runner:
    """Steps of one network, and how long they take.

    Args:
        batches: micro-batches per step; the time is that of one.
        shared: use ``accumulate``.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, compiled: bool, batches: int = 1, shared: bool = False
    ) -> None:
        self.model = model.train()
        self.x, self.batches, self.shared = x, batches, shared
        self.device = x.device.type
        self.run: Any = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True
        )
        self.towards = torch.randint(0, 1000, (x.shape[0],), device=x.device)

    def gradients(self) -> None:
        """Forward and backward, of all micro-batches."""
        half = torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()
        with accumulate(self.model, self.batches) if self.shared else nullcontext():
            for _ in range(self.batches):
                with half:
                    loss = nn.functional.cross_entropy(self.run(self.x).float(), self.towards)
                loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """A whole step."""
        self.optimizer.zero_grad()
        self.gradients()
        self.optimizer.step()

    def seconds(self) -> float:
        """Of one micro-batch's share of a step."""
        return timed(self.step, self.device) / self.batches

    def peak(self) -> int:
        """Bytes that forward and backward hold beyond parameters and optimizer state."""
        self.optimizer.zero_grad()
        return peak_bytes(self.gradients, self.device)


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The highest number of bytes that torch holds beyond those at the start."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    held = peak = 0
    results: Any = profile.profiler
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def matmul_rate(device: str, size: int = 1024) -> float:
    """Multiply-adds per second of a square matrix product, the median of 9; in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    return size**3 / median(timed(partial(torch.mm, a, a), device) for _ in range(9))


def extra_macs(big: nn.Module, x: Tensor, batches: int) -> float:
    """Multiply-adds that the cheapest forms add to one forward, with a product for every ``batches``."""
    seen: dict[nn.Module, float] = {}

    def note(module: Any, args: Any, output: Any) -> None:
        original = macs(kernel_of(bare(module, module.weight.detach())))
        seen[module] = cheapest(module, output.numel() / output.shape[_channel(module, output)], batches)
        seen[module] -= original * output.numel() / output.shape[_channel(module, output)]

    layers = [module for module in big.modules() if isinstance(module, Expanded)]
    handles = [module.register_forward_hook(note) for module in layers]
    with torch.no_grad():
        big(x)
    for handle in handles:
        handle.remove()
    for module in big.modules():
        for _, _, expansion in expanded_weights(module):
            seen[expansion] = _fold_macs(expansion.structure) / batches
    return sum(seen.values())


def _channel(module: nn.Module, output: Tensor) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def cheapest(module: Any, positions: float, batches: int) -> float:
    """Multiply-adds of a layer with the factors multiplied in the cheapest of all ways, the input last."""
    chain = module.chain
    costs = []
    for _, way in chain.ways:
        products = sum(_segment_macs(chain.sizes[a : b + 1]) for a, b in way) / batches
        weights = sum(chain.sizes[a] * chain.sizes[b] for a, b in way)
        costs.append(chain.groups * (products + positions * weights))
    return float(min(costs))


def _segment_macs(sizes: Sequence[int]) -> int:
    """Matrix-chain ordering, once more, and as plainly as it goes."""
    if len(sizes) <= 2:
        return 0
    return min(
        _segment_macs(sizes[: k + 1]) + _segment_macs(sizes[k:]) + sizes[0] * sizes[k] * sizes[-1]
        for k in range(1, len(sizes) - 1)
    )


def _fold_macs(block: nn.Sequential) -> int:
    groups = kernel_of(block[0]).groups
    shapes = [kernel_of(part).weight.shape for part in block]
    sizes = [shapes[0][1:].numel(), *(shape[0] // groups for shape in shapes)]
    return groups * _segment_macs(sizes)


def measure(case: Case, depth: int, width: float, rounds: int, device: str) -> Iterator[dict[str, Any]]:
    """One row per way of training, timed in turns after two rounds of warm-up."""
    torch.manual_seed(0)
    cuda = device == "cuda"
    original: Any = case.network.build(case.size if case.network == VIT else None).to(device)
    x = torch.randn(case.batch, 3, case.size, case.size, device=device)
    if cuda:
        original = original.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    recipe = Chain(depth=depth, width=width)
    # Only what is a layer: a chain on activations cannot be put in place of any other weight.
    layers = [name for name, module in original.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    grow = partial(expand, original, recipe, select=layers, init="kaiming")
    big = grow()
    runners = {
        "original": Runner(copy.deepcopy(original), x, cuda),
        "chain": Runner(grow(form="chain"), x, cuda),
        "parametrize": Runner(parametrized(big), x, cuda),
        "auto": Runner(big, x, cuda),
        "accumulate": Runner(grow(form="collapsed" if cuda else "auto"), x, cuda, BATCHES, shared=True),
        "original x4": Runner(copy.deepcopy(original), x, cuda, BATCHES),
    }
    for runner in runners.values():
        runner.step()
        runner.step()
    times: dict[str, list[float]] = {name: [] for name in runners}
    optimizers: dict[str, list[float]] = {name: [] for name in runners}
    rates = []
    for _ in range(rounds):
        rates.append(matmul_rate(device))
        for name, runner in runners.items():
            times[name].append(runner.seconds())
        for name in ("original", "auto"):
            optimizers[name].append(timed(runners[name].optimizer.step, device))
    rate = median(rates)
    own = max(0.0, median(optimizers["auto"]) - median(optimizers["original"]))
    for name in NAMES:
        runner = runners[name]
        batches = runner.batches
        base = times["original x4" if batches > 1 else "original"]
        extra = 3 * extra_macs(big, x, batches)  # one forward, two backward
        floor = median(base) + extra / rate + own / batches
        yield {
            "network": str(case.network),
            "size": case.size,
            "batch": case.batch,
            "depth": depth,
            "width": width,
            "device": device,
            "name": name,
            "seconds": median(times[name]),
            "ratio": median(t / b for t, b in zip(times[name], base, strict=True)),
            "floor": floor / median(base) if name in ("auto", "accumulate") else None,
            "flops": step_flops(runner),
            "peak_bytes": runner.peak(),
            "params": sum(p.numel() for p in runner.model.parameters()),
            "rate": rate,
        }


def step_flops(runner: Runner) -> int:
    """Of forward and backward, per micro-batch, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    compiled, runner.run = runner.run, runner.model
    counter = FlopCounterMode(display=False)
    with counter:
        runner.gradients()
    runner.run = compiled
    return int(counter.get_total_flops()) // runner.batches


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What does not hold, in words."""
    found = []
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("network", "size", "batch", "depth", "width", "device"))
        groups.setdefault(key, {})[row["name"]] = row
    for key, by_name in groups.items():
        where = f"{key[0]} {key[1]} px, batch {key[2]}, ({key[3]}, {key[4]:g})"
        for name, limit in zip(("auto", "accumulate"), TARGETS.get(key, (None, None)), strict=True):
            if limit is not None and by_name[name]["ratio"] > limit:
                found.append(
                    f"{where}: {name} takes {by_name[name]['ratio']:.2f} of the original, not {limit:g}"
                )
        for name in ("auto", "accumulate"):
            row = by_name[name]
            if row["ratio"] > ABOVE_FLOOR * row["floor"]:
                found.append(f"{where}: {name} is {row['ratio'] / row['floor']:.2f} times the floor")
        for other in ("chain", "parametrize"):
            if by_name["auto"]["ratio"] > by_name[other]["ratio"]:
                found.append(f"{where}: auto is slower than {other}")
        auto, original = by_name["auto"], by_name["original"]
        # Products stand in for the weights of the original; gradients are those of the factors.
        allowed = 1.02 * (original["peak_bytes"] + 4 * original["params"]) + 4 * auto["params"]
        if auto["peak_bytes"] > allowed:
            found.append(f"{where}: auto holds {auto['peak_bytes'] / allowed:.2f} of the memory allowed")
    return found


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and what does not hold."""
    head = (*("network", "px", "batch", "(d, w)", "form"), *("ms", "x original", "floor", "GFLOPs"))
    body = [
        (
            row["network"].partition(":")[2],
            str(row["size"]),
            str(row["batch"]),
            f"({row['depth']}, {row['width']:g})",
            row["name"],
            f"{1e3 * row['seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['floor']:.2f}" if row["floor"] else "-",
            f"{row['flops'] / 1e9:.3g}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            short(row["params"]),
        )
        for row in rows
    ]
    missed = misses(rows)
    verdict = "\n".join(["Not reached:", *missed]) if missed else "Every target is reached."
    return f"{table((*head, 'peak MB', 'params'), body)}\n\n{verdict}"


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if a target is missed in a full run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="ResNet-18, batch 8, (3, 1); nothing published")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="some cases, as resnet18-64-32-")
    parser.add_argument("--recipe", help="one recipe, as 3,4")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/training_cost-DEVICE[-quick].json"
    )
    options = parser.parse_args(given)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("training_cost --device cuda: not measured, there is no CUDA device.")
        return 0
    cases = CUDA if device == "cuda" else CPU
    recipes: Sequence[tuple[int, float]] = RECIPES
    if options.quick:
        cases, recipes = [Case(RESNET18, 64, 8)], [(3, 1)]
    if options.only:
        cases = [c for c in cases if options.only in str(c)]
    if options.recipe:
        depth, width = options.recipe.split(",")
        recipes = [(int(depth), float(width))]
    rows: list[dict[str, Any]] = []
    about = machine()
    partly = options.quick or options.only or options.recipe
    out = options.out or FOLDER / "results" / f"training_cost-{device}{'-quick' if partly else ''}.json"
    for case in cases:
        for depth, width in recipes:
            print(
                f"{case.network} {case.size} {case.batch} ({depth}, {width:g}) ...",
                file=sys.stderr,
                flush=True,
            )
            rows.extend(measure(case, depth, width, 2 if options.quick else options.rounds, device))
            save(out, {"benchmark": "training_cost", "machine": about, "rows": rows})
    text = summary(rows)
    print(f"{headline(about)}\n\n{text}")
    if partly or options.out is not None:
        return 0
    other = "" if device == "cuda" else "\n\nOn a GPU: not measured here."
    publish(
        "training_cost",
        f"{headline(about)}; medians of {options.rounds} rounds in turns.{other}\n\n```\n{text}\n```",
    )
    return int(bool(misses(rows)))


if __name__ == "__main__":
    sys.exit(main())
