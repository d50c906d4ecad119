"""What does surgery cost, and does it grow linearly? ``python -m benchmarks.surgery_cost [--quick]``

``expand`` and ``fuse(scope="expanded")`` with the default recipe, timed in turns with forward-backward passes
of the same network (batch 8, 224 x 224, training mode), for ResNet-50, 101 and 152; for chains of 10, 100 and
1000 Linear layers; and ``expand`` alone, with its memory, for networks of many kinds at their default sizes.
Quoted are medians, and ratios within the run.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.evidence import FOLDER, headline, machine, publish, save, variant
from fxexpand import expand, fuse
from fxexpand.deploy.latency.timing import peak_bytes
from fxexpand.reporting.table import short, table
from fxexpand.running.outputs import tensors_of

T = TypeVar("T")
RESNETS = ("resnet50", "resnet101", "resnet152")
TARGET = 3.0  # forward-backward passes, for ResNet-50
LIMIT = 10.0  # forward-backward passes that expand takes, for any network
MEMORY = 3.0  # times the parameters of the network, beyond those of the expanded one
# Classifiers of many kinds, small ones and those of the largest Linear layers.
SPREAD = (
    *("timm:convnext_atto", "timm:regnetx_002", "timm:ghostnet_050", "timm:cait_xxs24_224"),
    *("timm:fastvit_t8", "timm:efficientvit_b0", "timm:mobilevit_xxs", "timm:vit_tiny_patch16_224"),
    *("torchvision:resnet18", "torchvision:swin_t", "torchvision:alexnet", "torchvision:vgg11"),
)
BATCH = 8
# The networks with the largest Linear layers also at their published batch (VGG: 256, on four GPUs).
PUBLISHED = (("torchvision:alexnet", 128), ("torchvision:vgg11", 64))


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def resnet_row(name: str, rounds: int, batch: int, size: int) -> dict[str, Any]:
    """Medians over ``rounds`` of a pass, an expansion and a fold, taken in turns after one warm-up."""
    import torchvision

    model = torchvision.models.get_model(name, weights=None)
    x = torch.randn(batch, 3, size, size)

    def forward_backward() -> None:
        model.train()(x).sum().backward()
        model.zero_grad()

    forward_backward()
    passes, expansions, folds = [], [], []
    for _ in range(rounds):
        passes.append(timed(forward_backward)[0])
        seconds, big = timed(lambda: expand(model))
        expansions.append(seconds)
        folds.append(timed(partial(fuse, big, scope="expanded"))[0])
        del big
    return {
        "name": name,
        "sites": sum(isinstance(module, nn.Linear | nn.Conv2d) for module in model.modules()),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "pass_s": median(passes),
        "expand_s": median(expansions),
        "fuse_s": median(folds),
        "ratio": median((e + f) / p for p, e, f in zip(passes, expansions, folds, strict=True)),
    }


def network_row(spec: str, rounds: int, batch: int = BATCH) -> dict[str, Any]:
    """``expand`` beside passes of a network at its default size, and the memory it takes meanwhile.

    ``working`` is what is allocated at the peak beyond the tensors of the expanded network that is returned,
    in parameters of the original.
    """
    model, size = built(spec)
    x = torch.randn(batch, *size)

    def forward_backward() -> None:
        loss: Any = torch.stack([tensor.sum() for tensor in tensors_of(model.train()(x))]).sum()
        loss.backward()
        model.zero_grad()

    forward_backward()
    passes, expansions = [], []
    for _ in range(rounds):
        passes.append(timed(forward_backward)[0])
        expansions.append(timed(lambda: expand(model))[0])
    made: list[nn.Module] = []
    gc.collect()  # what is freed in between would count as taken away
    peak = peak_bytes(lambda: made.append(expand(model)), torch.device("cpu"))
    assert peak is not None
    [big] = made
    tensors = {tensor.untyped_storage().data_ptr(): tensor for tensor in big.state_dict().values()}
    result = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    original = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "name": spec,
        "size": list(size),
        "batch": batch,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "pass_s": median(passes),
        "expand_s": median(expansions),
        "ratio": median(e / p for p, e in zip(passes, expansions, strict=True)),
        "result": result / original,
        "working": max(0, peak - result) / original,
    }


def built(spec: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A classifier of timm or torchvision with random weights, and the size of its images."""
    library, _, name = spec.partition(":")
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(name, weights=None), (3, 224, 224)
    import timm

    model: Any = timm.create_model(name, pretrained=False)
    return model, model.pretrained_cfg["input_size"]


def linear_row(layers: int) -> dict[str, Any]:
    """One expansion and fold of a chain of Linear layers, after a warm-up on a short one."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(layers)])
    expand_s, big = timed(lambda: expand(model))
    fuse_s, _ = timed(lambda: fuse(big, scope="expanded"))
    return {"layers": layers, "expand_s": expand_s, "fuse_s": fuse_s}


def tables(
    resnets: Sequence[dict[str, Any]], chains: Sequence[dict[str, Any]], networks: Sequence[dict[str, Any]]
) -> str:
    """The tables, as text."""
    one = [
        (
            row["name"],
            str(row["sites"]),
            short(row["params"]),
            f"{row['pass_s']:.2f}",
            f"{row['expand_s']:.2f}",
            f"{row['fuse_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{1e9 * (row['expand_s'] + row['fuse_s']) / row['params']:.0f}",
        )
        for row in resnets
    ]
    two = [
        (
            str(row["layers"]),
            f"{row['expand_s']:.3f}",
            f"{row['fuse_s']:.3f}",
            f"{1e3 * (row['expand_s'] + row['fuse_s']) / row['layers']:.2f}",
        )
        for row in chains
    ]
    three = [
        (
            row["name"],
            "x".join(map(str, row["size"])),
            str(row["batch"]),
            short(row["params"]),
            f"{row['pass_s']:.2f}",
            f"{row['expand_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['result']:.1f}",
            f"{row['working']:.2f}",
        )
        for row in networks
    ]
    worst = max(networks, key=lambda row: float(row["ratio"]))
    largest = max(networks, key=lambda row: float(row["working"]))
    extremes = f"{worst['ratio']:.2f} ({worst['name']}) and {largest['working']:.2f} ({largest['name']})"
    columns = ("network", "image", "batch", "params", "pass s", "expand s", "expand / pass")
    head = ("network", "sites", "params", "pass s", "expand s", "fuse s", "both / pass", "ns / param")
    return (
        f"{table(head, one)}\n\n"
        f"{table(('Linear layers', 'expand s', 'fuse s', 'ms / layer'), two)}\n\n"
        f"{table((*columns, 'result', 'working'), three)}\n\n"
        f"Targets: both / pass below {TARGET:.0f} for resnet50; expand / pass below {LIMIT:.0f} and working "
        f"memory below\n{MEMORY:.0f} x params everywhere. Largest: {extremes}."
    )


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if a target is missed in a full run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="ResNet-18 and short chains, nothing published")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/surgery_cost[-quick].json")
    options = parser.parse_args(given)
    torch.manual_seed(0)
    names, lengths = (("resnet18",), (10, 100)) if options.quick else (RESNETS, (10, 100, 1000))
    rounds, size = (1, 96) if options.quick else (options.rounds, 224)
    linear_row(3)
    chains = [linear_row(length) for length in lengths]
    resnets = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        resnets.append(resnet_row(name, rounds, BATCH, size))
    networks = []
    spread = [(spec, BATCH) for spec in SPREAD]
    for spec, batch in spread[:3] if options.quick else (*spread, *PUBLISHED):
        print(f"{spec} ...", file=sys.stderr, flush=True)
        networks.append(network_row(spec, 1 if options.quick else 2, batch))
    about, text = machine(), tables(resnets, chains, networks)
    print(f"{headline(about)}\n\n{text}")
    name = f"surgery_cost{variant()}"
    out = options.out or FOLDER / "results" / f"{name}{'-quick' if options.quick else ''}.json"
    measured = {"resnets": resnets, "chains": chains, "networks": networks}
    save(out, {"benchmark": "surgery_cost", "machine": about, **measured})
    if options.quick or options.out is not None:
        return 0
    publish(name, f"{headline(about)}; median of {rounds} rounds.\n\n```\n{text}\n```")
    within = all(row["ratio"] < LIMIT and row["working"] < MEMORY for row in networks)
    return int(resnets[0]["ratio"] >= TARGET or not within)


if __name__ == "__main__":
    sys.exit(main())
