"""Does Trained Rank Pruning beat decomposing afterwards? ``python -m benchmarks.trp [--quick]``

Each arm trains the same network from the same start on the same batches by SGD with momentum: plain, with
projections (TRP), and with projections and the nuclear norm (TRP+Nu). All are then decomposed to the same
share of their FLOPs, without fine-tuning; the ranks of the layers are chosen alike. Channel-wise and spatial.
On scikit-learn's digits; with ``--cifar ROOT``, ResNet-20 on CIFAR-10 with the paper's schedule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from benchmarks.compression.expand_then_compress import unfinished
from benchmarks.evidence import FOLDER, headline, machine, publish, save
from fxexpand import TrainedRankPruning, count_flops, factorize
from fxexpand.errors import SelectionError
from fxexpand.lowrank.cuts import SCHEMES, Scheme
from fxexpand.reporting.table import table
from fxexpand.training.data import Data, batches, cifar, digits
from fxexpand.training.demo import Digits
from fxexpand.training.demo.findings import Spread
from fxexpand.training.loop import accuracy

SHARES = (0.7, 0.5, 0.4, 0.3, 0.2)
ARMS = ("plain", "TRP", "TRP+Nu")


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without weights (option A of the ResNet paper)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, h, w)`` to ``(batch, out, h / stride, w / stride)``."""
        short = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + short)


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR-10: three stages of three blocks, 0.27 M parameters."""
    widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *(Block(*width) for width in widths), *head)


def train(
    model: nn.Module, data: Data, options: argparse.Namespace, seed: int, pruning: dict[str, Any] | None
) -> TrainedRankPruning | None:
    """SGD with momentum 0.9 and weight decay 1e-4; the rate falls by 10 at a half and three quarters."""
    device = next(model.parameters()).device
    rounds = batches(data.train, options.batch, seed=seed, workers=options.workers)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=1e-4)
    steps = options.epochs * len(rounds)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])
    trp = None if pruning is None else TrainedRankPruning(model, **pruning).attach(optimizer)
    for _ in range(options.epochs):
        model.train()
        for images, labels in rounds:
            optimizer.zero_grad(set_to_none=True)
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            decay.step()
    if trp is not None:
        trp.finish()
    return trp


def arm(name: str, scheme: Scheme, seed: int, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """One network, trained and decomposed: accuracies by share of FLOPs."""
    torch.manual_seed(seed)
    model = (resnet20() if options.cifar else Digits()).to(options.device)
    pruning = {
        "every": options.every,
        "energy": options.energy,
        "nuclear": options.nuclear if name == "TRP+Nu" else 0.0,
        "scheme": scheme,
    }
    trp = train(model, data, options, seed, None if name == "plain" else pruning)
    layers = (trp or TrainedRankPruning(model, **pruning)).names
    test, model = batches(data.test, 500, workers=options.workers), model.eval()
    example = next(iter(test))[0][:1].to(options.device)
    row: dict[str, Any] = {
        "arm": name,
        "scheme": scheme,
        "seed": seed,
        "accuracy": accuracy(model, test),
        "ranks": {} if trp is None else {each.layer: [each.rank, each.full_rank] for each in trp.last},
        "points": [],
    }
    for share in SHARES:
        try:
            small = factorize(model, example, flops=share, scheme=scheme, select=layers)
        except SelectionError:
            continue  # the layers that are left out cost more than that
        flops = count_flops(small, example).total / count_flops(model, example).total
        row["points"].append({"share": share, "flops": flops, "accuracy": accuracy(small, test)})
    return row


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Per scheme: accuracy by share of FLOPs and arm, and the differences from plain, paired by seed."""
    parts = []
    for scheme in SCHEMES:
        some = [row for row in rows if row["scheme"] == scheme]
        body = []
        for share in (None, *SHARES):
            by = {name: _accuracies(some, name, share) for name in ARMS}
            if not all(by.values()):
                continue
            changes = []
            for name in ARMS[1:]:
                change = Spread.of([b - a for a, b in zip(by["plain"], by[name], strict=True)])
                low, high = change.interval()
                changes.append(f"{change.mean:+.2f} [{low:+.2f}, {high:+.2f}]")
            cells = [Spread.of(by[name]).text() for name in ARMS]
            body.append(("whole" if share is None else f"{share:g}", *cells, *changes))
        head = (f"{scheme}-wise, FLOPs", *ARMS, *(f"{name} - plain [95 %]" for name in ARMS[1:]))
        parts.append(table(head, body))
    return "\n\n".join(parts)


def _accuracies(rows: Sequence[dict[str, Any]], name: str, share: float | None) -> list[float]:
    found = []
    for row in rows:
        points = {point["share"]: point["accuracy"] for point in row["points"]}
        if row["arm"] == name and (share is None or share in points):
            found.append(row["accuracy"] if share is None else points[share])
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed of two epochs, nothing published")
    parser.add_argument("--cifar", type=Path, help="folder with CIFAR-10; digits without it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="default: 30 on digits, 164 on CIFAR-10")
    parser.add_argument("--batch", type=int, help="default: 50 on digits, 128 on CIFAR-10")
    parser.add_argument("--lr", type=float, help="default: 0.05 on digits, 0.1 on CIFAR-10")
    parser.add_argument("--every", type=int, default=5, help="steps from projection to projection")
    parser.add_argument("--energy", type=float, default=0.9, help="share of the squared norm that is kept")
    parser.add_argument("--nuclear", type=float, default=3e-4, help="weight of the nuclear norm")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/trp[-cifar].json")
    options = parser.parse_args(given)
    for name, digit, large in (("epochs", 30, 164), ("batch", 50, 128), ("lr", 0.05, 0.1)):
        if getattr(options, name) is None:
            setattr(options, name, large if options.cifar else digit)
    if options.quick:
        options.seeds, options.epochs = 1, 2
    name = "trp-quick" if options.quick else "trp-cifar" if options.cifar else "trp"
    out, about = options.out or FOLDER / "results" / f"{name}.json", machine()
    left_out = ("out", "quick", "seeds", "workers", "device")
    settings = {key: str(value) for key, value in vars(options).items() if key not in left_out}
    content: dict[str, Any] = {"benchmark": "trp", "machine": about, "settings": settings}
    content["shares"] = list(SHARES)
    rows = unfinished(out, content)
    data = digits() if options.cifar is None else cifar(options.cifar)
    for seed in range(len(rows) // (len(SCHEMES) * len(ARMS)), options.seeds):
        print(f"seed {seed} ...", file=sys.stderr, flush=True)
        data = data if options.cifar else digits(seed)
        rows += [arm(name, scheme, seed, data, options) for scheme in SCHEMES for name in ARMS]
        save(out, {**content, "runs": rows, "unfinished": True})
    text = tables(rows)
    print(f"{headline(about)}\n\n{text}")
    save(out, {**content, "runs": rows})
    if options.quick or options.out is not None or options.cifar:
        return 0
    note = (
        f"{data.name}, {options.seeds} seeds, {options.epochs} epochs, projection every "
        f"{options.every} steps to energy {options.energy}, nuclear {options.nuclear}"
    )
    publish("trp", f"{headline(about)}; {note}.\n\n```\n{text}\n```")
    return 0


if __name__ == "__main__":
    sys.exit(main())
