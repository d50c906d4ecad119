"""What does fusing leave of an ONNX file, and is it right? ``python -m benchmarks.onnx_export [--quick]``

Each network exported as it is and fused first, with a free batch: operators by kind, relative errors in
onnxruntime over batch sizes 1 to 3, and the size of the file. The networks have the statistics of trained
ones. Then int8, with onnxruntime's static quantisation: weights before and after fusing, and outputs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from benchmarks.models import Network
from benchmarks.settle import settle
from fxexpand import export_onnx, fuse
from fxexpand.deploy.quantization import check_int8, weight_ranges
from fxexpand.errors import FxExpandError
from fxexpand.reporting.table import short, table

NETWORKS = (
    Network("torchvision", "resnet18"),
    Network("torchvision", "densenet121"),
    Network("torchvision", "mobilenet_v3_small"),
    Network("timm", "efficientvit_m0"),
    Network("timm", "fastvit_t8"),
    Network("timm", "levit_128s"),
    Network("timm", "mobileone_s0"),
    Network("timm", "repghostnet_050"),
    Network("timm", "repvgg_a0"),
    Network("timm", "vit_tiny_patch16_224"),
)
QUICK = (Network("timm", "test_resnet"),)
INT8 = ("torchvision:resnet18", "timm:repvgg_a0", "timm:test_resnet")

KINDS = {
    "Conv": ("Conv", "ConvTranspose"),
    "MatMul": ("Gemm", "MatMul"),
    "norm": ("BatchNormalization", "LayerNormalization", "InstanceNormalization"),
    "Add": ("Add", "Sub", "Sum"),
    "Mul": ("Mul", "Div"),
}
LIMIT = 1e-4


def measure(network: Network) -> dict[str, Any]:
    """The row of a network: its file before and after fusing, and int8 where that is asked of it."""
    size, built = network.smallest()
    torch.manual_seed(0)
    model, x = network.build(built).eval().requires_grad_(False), torch.randn(2, 3, size, size)
    settle(model, x)
    row: dict[str, Any] = {"name": str(network), "px": size, "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        for form in ("original", "fused"):
            try:
                found = export_onnx(
                    model, Path(folder) / "model.onnx", x, fuse=form == "fused", tolerance=1.0
                )
            except FxExpandError as error:
                row["files"][form] = {"failed": str(error)}
                continue
            row["files"][form] = {
                "operators": dict(found.operators),
                "error": found.error,
                "batch_sizes": list(found.batch_sizes),
                "bytes": found.size,
                "opset": found.opset,
            }
    if str(network) in INT8:
        row["int8"] = int8(model, x)
    return row


def int8(model: torch.nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Weight ranges, and outputs, of a network before and after fusing."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(x.shape, generator=generator) for _ in range(12)]
    fused = fuse(model, x)
    ranges = weight_ranges(model, fused)
    models = {"original": model, "fused": fused}
    return {
        "ranges": ranges.to_dict(),
        **{
            scales: check_int8(
                models, batches[:4], samples=batches[4:], per_channel=scales == "channel"
            ).to_dict()
            for scales in ("tensor", "channel")
        },
    }


def failures(row: dict[str, Any]) -> list[str]:
    """The conditions that do not hold; empty for a good row."""
    found = [f"{form}: {file['failed']}" for form, file in row["files"].items() if "failed" in file]
    if found:
        return found
    before, after = row["files"]["original"], row["files"]["fused"]
    limit = max(
        LIMIT, 4 * before["error"]
    )  # where the original itself is far from torch, so is the fused one
    if not after["error"] <= limit:
        found.append(f"relative error {after['error']:.1e}")
    if sum(after["operators"].values()) > sum(before["operators"].values()):
        found.append("more operators than the original")
    return found


def kinds(operators: Mapping[str, int]) -> dict[str, int]:
    """Counts by kind; "all" is the total."""
    counts = Counter({kind: sum(operators.get(name, 0) for name in names) for kind, names in KINDS.items()})
    return {**counts, "all": sum(operators.values())}


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The tables, and what does not hold."""
    body = []
    for row in rows:
        if any("failed" in file for file in row["files"].values()):
            continue
        before, after = row["files"]["original"], row["files"]["fused"]
        one, two = kinds(before["operators"]), kinds(after["operators"])
        body.append(
            (
                row["name"],
                str(row["px"]),
                *(f"{one[kind]} {two[kind]}" for kind in one),
                f"{before['error']:.0e} {after['error']:.0e}",
                f"{before['bytes'] / 1e6:.1f} {after['bytes'] / 1e6:.1f}",
            )
        )
    head = ("network", "px", *KINDS, "all", "error", "MB")
    text = f"Before and after fusing:\n\n{table(head, body)}"
    quantised = [row for row in rows if "int8" in row]
    if quantised:
        text += f"\n\n{int8_table(quantised)}"
    missed = [f"{row['name']}: {'; '.join(failures(row))}" for row in rows if failures(row)]
    return "\n".join([text, "", *(missed or ["All hold."])])


def int8_table(rows: Sequence[dict[str, Any]]) -> str:
    """A row per network, form and number of scales."""
    body = []
    for row in rows:
        layers = row["int8"]["ranges"]["layers"].values()
        for form, side in (("original", "before"), ("fused", "after")):
            spreads = [layer[side]["spread"] for layer in layers if layer[side]]
            for scales in ("tensor", "channel"):
                found = next(each for each in row["int8"][scales]["results"] if each["model"] == form)
                body.append(
                    (
                        row["name"],
                        form,
                        scales,
                        f"{max(spreads):.3g}",
                        f"{found['error']:.1%}",
                        f"{found['agreement']:.0%}",
                        f"{short(found['size'])}B",
                    )
                )
    return table(("int8", "form", "scale per", "spread", "error", "same class", "size"), body, left=(0, 1, 2))


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if a file is wrong or holds more than before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small network, nothing published")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/onnx_export[-quick].json")
    options = parser.parse_args(given)
    chosen, rows = QUICK if options.quick else NETWORKS, []
    for network in chosen:
        rows.append(measure(network))
        verdict = "; ".join(failures(rows[-1])) or "holds"
        print(f"[{len(rows)}/{len(chosen)}] {network}: {verdict}", file=sys.stderr, flush=True)
    about = machine()
    for library in ("onnx", "onnxscript", "onnxruntime"):
        about[library] = __import__(library).__version__
    text = summary(rows)
    print(f"{headline(about)}\n\n{text}")
    name = "onnx_export-quick.json" if options.quick else "onnx_export.json"
    save(
        options.out or FOLDER / "results" / name, {"benchmark": "onnx_export", "machine": about, "rows": rows}
    )
    if not options.quick and options.out is None:
        versions = ", ".join(f"{name} {about[name]}" for name in ("onnx", "onnxscript", "onnxruntime"))
        publish("onnx_export", f"{headline(about)}, {versions}.\n\n```\n{text}\n```")
    return int(any(failures(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
