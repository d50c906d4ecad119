"""Does a fused network cost what the original costs, exactly? ``python -m benchmarks.flops [--quick]``

Counted by ``fxexpand.count_flops`` on the meta device, where shapes alone are computed: the network as it is,
expanded, folded again (``fuse(scope="expanded")``), and with everything folded (``fuse``). The third count
must be the first, in total and in every module; the fourth may not be above it. First each kind of site with
each recipe that takes it, then networks of 40 families with the default recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from benchmarks.models import Network
from fxexpand import Chain, Recipe, count_flops, expand, fuse, report
from fxexpand.recipes import DBB, OREPA, ACNet, DOConv, ExpandNetCK, ExpandNetCL, MobileOne, RepVGG
from fxexpand.reporting.table import short, table
from fxexpand.running.inputs import ExampleInputs, tensors


class Plain(nn.Module):
    """Parameters that no layer owns: a matrix, and one matrix per head."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(12, 16))
        self.heads = nn.Parameter(torch.randn(2, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = F.linear(x, self.mix).unsqueeze(1) @ self.heads.mT
        return result


class Attention(nn.Module):
    """Packed projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


class Standardised(nn.Conv2d):
    """A layer with a forward of its own: the weight is standardised at every call."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
        result: Tensor = self._conv_forward(x, flat.reshape(self.weight.shape), self.bias)
        return result


class Tied(nn.Module):
    """A head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tokens(tokens))
        return logits


SITES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(16, 12), (3, 5, 16)),
    "Conv1d": (lambda: nn.Conv1d(16, 12, 3, padding=1), (2, 16, 9)),
    "Conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 9, 7)),
    "Conv2d 1x1": (lambda: nn.Conv2d(16, 12, 1), (2, 16, 9, 7)),
    "Conv2d strided": (lambda: nn.Conv2d(16, 12, 3, 2, 1), (2, 16, 9, 7)),
    "Conv2d dilated": (lambda: nn.Conv2d(16, 12, 3, padding=2, dilation=2), (2, 16, 9, 7)),
    "Conv2d groups": (lambda: nn.Conv2d(16, 12, 3, padding=1, groups=4), (2, 16, 9, 7)),
    "Conv2d depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 9, 7)),
    "Conv2d circular": (lambda: nn.Conv2d(16, 12, 3, padding=1, padding_mode="circular"), (2, 16, 9, 7)),
    "Conv2d, own forward": (lambda: Standardised(16, 12, 3), (2, 16, 9, 7)),
    "Conv3d": (lambda: nn.Conv3d(8, 6, 3), (1, 8, 5, 6, 7)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(16, 12, 3, 2), (2, 16, 9)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(16, 12, 3, 2, groups=2), (2, 16, 9, 7)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(8, 6, 2), (1, 8, 5, 6, 7)),
    "attention, packed": (Attention, (3, 5, 16)),
    "LSTM": (lambda: nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True), (3, 5, 16)),
    "GRU": (lambda: nn.GRU(16, 12, batch_first=True), (3, 5, 16)),
    "RNN": (lambda: nn.RNN(16, 12, batch_first=True), (3, 5, 16)),
    "Bilinear": (lambda: _Pair(nn.Bilinear(16, 16, 12)), (3, 16)),
    "embedding, tied": (Tied, (3, 5)),
    "plain parameters": (Plain, (3, 5, 16)),
}


class _Pair(nn.Module):
    """A layer of two inputs, given the same one twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x, x)
        return result


RECIPES: tuple[Recipe, ...] = (
    Chain(depth=2, width=1),
    Chain(depth=3, width=2),
    ExpandNetCL(),
    ExpandNetCK(),
    RepVGG(),
    MobileOne(),
    ACNet(),
    DBB(),
    DOConv(),
    OREPA(),
)
DEFAULT = Chain(depth=3, width=2)

TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf"),
    *("resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vgg16"),
    *("vit_b_16", "wide_resnet50_2"),
)
TIMM = (
    *("beit_base_patch16_224", "cait_xxs24_224", "coatnet_0_rw_224", "convmixer_768_32"),
    *(
        "deit3_small_patch16_224",
        "dla34",
        "edgenext_xx_small",
        "efficientformer_l1",
        "fasternet_t0",
        "fastvit_t8",
        "ghostnet_100",
    ),
    *("hrnet_w18_small", "levit_128s", "mixer_s32_224", "mobileone_s0", "mobilevit_xxs", "pvt_v2_b0"),
    *("repghostnet_100", "repvgg_a0", "repvit_m0_9", "resnest14d", "tiny_vit_5m_224", "xcit_nano_12_p16_224"),
)
QUICK = ("resnet18", "repvgg_a0", "tiny_vit_5m_224")


def networks(quick: bool = False) -> list[Network]:
    """The 44 networks, or a few."""
    every = [*(Network("torchvision", n) for n in TORCHVISION), *(Network("timm", n) for n in TIMM)]
    return [network for network in every if not quick or network.name in QUICK]


def measure(name: str, model: nn.Module, given: ExampleInputs, recipe: Recipe) -> dict[str, Any]:
    """Four counts of one model in evaluation mode, on the device it is on."""
    on_meta = all(tensor.is_meta for tensor in tensors(given))
    big = expand(model, recipe)
    small = fuse(big, scope="expanded", verify=not on_meta)
    least = fuse(small, given, verify=not on_meta)
    original, expanded, fused, folded = (count_flops(each, given) for each in (model, big, small, least))
    found = report(big)
    return {
        "name": name,
        "recipe": str(recipe),
        "sites": len(found.changed),
        "refused": [row.message for row in found.refusals],
        "original": original.total,
        "expanded": expanded.total,
        "fused": fused.total,
        "all": folded.total,
        "differs": [change.path for change in original.compare(fused).changes],
        "params": [report.parameters for report in (original, expanded, fused, folded)],
    }


def failures(row: dict[str, Any]) -> list[str]:
    """The conditions that do not hold; empty for a good row."""
    found = []
    if "failed" in row:
        return [row["failed"]]
    if row["fused"] != row["original"] or row["differs"]:
        found.append(f"fused {row['fused']}, original {row['original']}: {', '.join(row['differs'][:3])}")
    if row["all"] > row["original"]:
        found.append(f"all folded {row['all']}, original {row['original']}")
    if row["params"][2] != row["params"][0]:
        found.append(f"parameters: fused {row['params'][2]}, original {row['params'][0]}")
    return found


def site_rows(recipes: Sequence[Recipe] = RECIPES) -> list[dict[str, Any]]:
    """A row per kind of site and recipe that changes it."""
    rows = []
    for kind, (build, shape) in SITES.items():
        integers = kind.startswith("embedding")
        x = torch.randint(0, 20, shape) if integers else torch.randn(shape)
        for recipe in recipes:
            torch.manual_seed(0)
            row = measure(kind, build().eval(), x, recipe)
            if row["sites"]:
                rows.append(row)
    return rows


def network_row(network: Network) -> dict[str, Any]:
    """A row of a whole network at its own image size, on the meta device where it can be built there."""
    size = network._own_size()
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model, x = network.build().eval(), torch.empty(1, 3, size, size)
            return {**measure(str(network), model, x, DEFAULT), "px": size, "device": device}
        except NotImplementedError as error:  # it reads the values of tensors
            reason = error
    return {"name": str(network), "failed": f"{type(reason).__name__}: {reason}"}


def summary(sites: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """Both tables, and what does not hold."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in sites:
        kinds.setdefault(row["name"], []).append(row)
    first = [
        (
            kind,
            str(len(group)),
            str(group[0]["original"]),
            f"{min(row['expanded'] for row in group)} to {max(row['expanded'] for row in group)}",
            ", ".join(sorted({str(row["fused"]) for row in group})),
        )
        for kind, group in kinds.items()
    ]
    second = [
        (
            row["name"],
            str(row["px"]),
            str(row["sites"]),
            *(short(row[key]) for key in ("original", "expanded", "fused", "all")),
            "equal" if not failures(row) else "NO",
        )
        for row in rows
        if "failed" not in row
    ]
    missed = [f"{row['name']}: {'; '.join(failures(row))}" for row in (*sites, *rows) if failures(row)]
    text = table(("site", "recipes", "original", "expanded", "fused"), first)
    head = ("network", "px", "sites", "original", "expanded", "fused", "all folded", "exact")
    text += f"\n\n{table(head, second)}"
    exact = len(sites) + len(rows) - len(missed)
    text += f"\n\nFused = original, to the last FLOP: {exact} of {len(sites) + len(rows)} rows."
    return "\n".join([text, *missed])


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if a count differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three networks, one recipe, nothing published")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/flops[-quick].json")
    options = parser.parse_args(given)
    sites = site_rows(RECIPES[:1] if options.quick else RECIPES)
    rows = []
    chosen = networks(options.quick)
    for network in chosen:
        rows.append(network_row(network))
        verdict = "; ".join(failures(rows[-1])) or "equal"
        print(f"[{len(rows)}/{len(chosen)}] {network}: {verdict}", file=sys.stderr, flush=True)
    about, text = machine(), summary(sites, rows)
    print(f"{headline(about)}\n\n{text}")
    name = "flops-quick.json" if options.quick else "flops.json"
    save(
        options.out or FOLDER / "results" / name,
        {"benchmark": "flops", "machine": about, "sites": sites, "rows": rows},
    )
    if not options.quick and options.out is None:
        publish("flops", f"{headline(about)}; {DEFAULT} for the networks.\n\n```\n{text}\n```")
    return int(any(failures(row) for row in (*sites, *rows)))


if __name__ == "__main__":
    sys.exit(main())
