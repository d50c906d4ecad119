"""What do fused networks gain on a GPU? ``make bench-gpu``, or ``python -m benchmarks.gpu [--quick]``

One script for one CUDA GPU, without a network connection, in under ten minutes, into one JSON file that is
saved after every stage: latency of the original and the fused network in float32 (without TF32) and bfloat16,
channels first and last, eagerly, as CUDA graphs and by torch.compile; ONNX exported from the CUDA model and
run in onnxruntime (on CUDA where ``onnxruntime-gpu`` is installed, else on the CPU); and what training steps
cost (``benchmarks.training_cost``). What the time does not suffice for is listed, not guessed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from benchmarks.models import Network
from benchmarks.settle import settle
from fxexpand import export_onnx, fuse, measure_latency
from fxexpand.deploy.sessions import feeds, open_session
from fxexpand.errors import FxExpandError
from fxexpand.reporting.table import short, table
from fxexpand.running.inputs import resize_batch
from fxexpand.running.outputs import tensors_of, worst_error

NETWORKS = (
    Network("torchvision", "resnet18"),
    Network("torchvision", "resnet50"),
    Network("timm", "repvgg_a0"),
    Network("timm", "mobileone_s1"),
    Network("timm", "fastvit_t8"),
    Network("timm", "vit_small_patch16_224"),
)
QUICK = (Network("timm", "test_resnet"), Network("timm", "test_vit"))
PIXELS = {"fastvit_t8": 256, "test_resnet": 64, "test_vit": 160}
PRECISIONS = (
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.bfloat16, True),
)
COMPILED = PRECISIONS[-1:]  # a compilation takes half a minute, so only what one would deploy
BUDGET = 560.0  # seconds
# A stage begins only if this much is left, for itself and for what comes after it.
RESERVED = {"latency": 300.0, "compile": 260.0, "onnx": 90.0, "training": 60.0}


class Run:
    """The stages, what came of them, and the time that is left."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.budget, self.start = out, budget, time.monotonic()
        self.found: dict[str, Any] = {"latency": [], "onnx": [], "training": [], "skipped": [], "seconds": {}}
        self.about = machine() | {"cuda": torch.version.cuda, "cudnn": _cudnn()}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.budget - (time.monotonic() - self.start)

    def stage(self, kind: str, name: str, work: Callable[[], list[dict[str, Any]]]) -> None:
        """Do it if there is time, keep its rows or the reason why there are none, and save."""
        begin = time.monotonic()
        if self.left < RESERVED[kind]:
            self.found["skipped"].append(f"{kind}, {name}: not measured: out of time")
        else:
            print(f"{kind}, {name} ({self.left:.0f} s left) ...", file=sys.stderr, flush=True)
            try:
                self.found["latency" if kind == "compile" else kind] += work()
            except Exception as error:  # one network that fails must not cost the others their figures
                text = " ".join(str(error).split())[:300]
                self.found["skipped"].append(f"{kind}, {name}: not measured: {type(error).__name__}: {text}")
        self.found["seconds"][f"{kind}, {name}"] = time.monotonic() - begin
        save(self.out, {"benchmark": "gpu", "machine": self.about, **self.found})


def _cudnn() -> int | None:
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


@cache
def networks(network: Network, device: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The original, the fused one and an image, on the device; the seed is always the same."""
    torch.manual_seed(0)
    px = PIXELS.get(network.name, 224)
    model, x = network.build().eval().requires_grad_(False), torch.randn(2, 3, px, px)
    settle(model, x)
    model, x = model.to(device), x.to(device)
    return model, fuse(model, x), x[:1]


def latency(
    network: Network,
    device: str,
    backends: Sequence[str],
    precisions: Sequence[tuple[torch.dtype, bool]],
    batches: Sequence[int],
    rounds: int,
) -> list[dict[str, Any]]:
    """A row per precision, backend and batch size."""
    model, fused, x = networks(network, device)
    rows = []
    for dtype, channels_last in precisions:
        report = measure_latency(
            {"original": model, "fused": fused},
            x,
            backends=backends,
            rounds=rounds,
            dtype=dtype,
            channels_last=channels_last,
            batch_sizes=batches,
            skip_unavailable=True,
            progress=False,
        )
        conditions = {
            "network": str(network),
            "px": x.shape[-1],
            "dtype": report.dtype,
            "channels_last": channels_last,
            "device": report.device,
            "rounds": rounds,
        }
        for each in report.differences:
            one, two = (
                report.measurement(name, each.backend, each.batch) for name in (each.model, each.other)
            )
            rows.append(
                {
                    **conditions,
                    "backend": each.backend,
                    "batch": each.batch,
                    "original_ms": [one.median, one.low, one.high],
                    "fused_ms": [two.median, two.low, two.high],
                    "ratio": [each.ratio, each.low, each.high],
                    "real": each.real,
                    "peak_bytes": [one.peak_bytes, two.peak_bytes],
                    "error": two.error,
                }
            )
        rows += [
            {**conditions, "backend": each.backend, "unavailable": f"{each.model}: {each.reason}"}
            for each in report.unavailable
        ]
    return rows


def onnx_row(network: Network, device: str) -> list[dict[str, Any]]:
    """Exported from the model on the device, as it is and fused, and run in onnxruntime."""
    model, _, x = networks(network, device)
    x = x.repeat(2, 1, 1, 1)
    row: dict[str, Any] = {"network": str(network), "px": x.shape[-1], "exported_from": device}
    with tempfile.TemporaryDirectory() as folder:
        for form in ("original", "fused"):
            path = Path(folder) / f"{form}.onnx"
            report = export_onnx(model, path, x, fuse=form == "fused", tolerance=1e-3)
            try:
                session, why = open_session(path, device), ""
            except FxExpandError as error:
                session, why = open_session(path), str(error)
            errors = []
            for size in (1, 2, 5):
                given = resize_batch(x, size)
                with torch.no_grad():
                    expected = tensors_of(model(given))
                actual = [torch.from_numpy(each) for each in session.run(None, feeds(session, given))]
                errors.append(worst_error(actual, expected))
            row[form] = {
                "provider": session.get_providers()[0],
                "provider_reason": why,
                "error": max(errors),
                "error_on_cpu": report.error,
                "operators": dict(report.operators),
                "bytes": report.size,
            }
    return [row]


def training(device: str, quick: bool, seconds: float) -> list[dict[str, Any]]:
    """The rows of ``benchmarks.training_cost``, of those configurations that end in time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "training.json"
        part = ["--quick"] if quick else ["--targets", "--rounds", "5", "--seconds", "8"]
        command = [sys.executable, "-m", "benchmarks.training_cost", "--device", device, "--out", str(out)]
        try:
            subprocess.run(
                [*command, *part],
                check=True,
                timeout=seconds,
                stdout=subprocess.DEVNULL,
                cwd=FOLDER.parent,
            )
        except subprocess.TimeoutExpired:
            journal = out.with_suffix(".jsonl")  # a line per configuration that ended
            lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
            rows = [row for line in lines for row in json.loads(line)["rows"]]
            if not rows:
                raise
            return rows
        found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
        return found


def summary(found: dict[str, Any]) -> str:
    """The tables, and what is missing."""
    missing = {
        f"{row['backend']}, {row['network']}: {row['unavailable']}"
        for row in found["latency"]
        if "unavailable" in row
    }
    notes = "\n".join([*sorted(missing), *found["skipped"]])
    measured = [row for row in found["latency"] if "unavailable" not in row]
    parts = [_latencies(measured), _files(found["onnx"]), _steps(found["training"]), notes]
    return "\n\n".join(part for part in parts if part)


def _latencies(rows: Sequence[dict[str, Any]]) -> str:
    body = [
        (
            row["network"].partition(":")[2],
            row["dtype"],
            "last" if row["channels_last"] else "first",
            row["backend"],
            str(row["batch"]),
            f"{row['original_ms'][0]:.3f}",
            f"{row['fused_ms'][0]:.3f}",
            "{:.3f} [{:.3f}, {:.3f}]".format(*row["ratio"]),
            "real" if row["real"] else "noise",
        )
        for row in rows
    ]
    head = ("latency", "dtype", "channels", "backend", "batch", "ms", "fused ms", "ratio", "")
    return table(head, body, left=(0, 1, 2, 3)) if body else "Latency: not measured."


def _files(rows: Sequence[dict[str, Any]]) -> str:
    body = [
        (
            row["network"].partition(":")[2],
            form,
            row[form]["provider"].removesuffix("ExecutionProvider"),
            f"{row[form]['error']:.0e}",
            str(sum(row[form]["operators"].values())),
            f"{short(row[form]['bytes'])}B",
        )
        for row in rows
        for form in ("original", "fused")
    ]
    head = ("ONNX", "form", "onnxruntime", "error", "operators", "size")
    return table(head, body, left=(0, 1, 2)) if body else "ONNX: not measured."


def _steps(rows: Sequence[dict[str, Any]]) -> str:
    body = [
        (
            f"{row['network'].partition(':')[2]} {row['size']} px",
            str(row["batch"]),
            f"({row['depth']}, {row['width']:g})",
            row["name"],
            row["failed"] or f"{1e3 * row['seconds']:.1f}",
            "" if row["failed"] else f"{row['ratio'][1]:.2f}",
            "" if row["failed"] else f"{short(row['peak_bytes'])}B",
        )
        for row in rows
    ]
    head = ("training", "batch", "(d, w)", "form", "ms", "x original", "peak")
    return table(head, body, left=(0, 3)) if body else "Training: not measured."


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if nothing was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two small networks; nothing published")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for everything")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu[-DEVICE-quick].json")
    options = parser.parse_args(given)
    device, quick = options.device, options.quick
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu: not measured: there is no CUDA device. A dry run: --device cpu --quick")
        return 0
    torch.backends.cudnn.allow_tf32 = False
    partly = quick or device == "cpu"
    name = f"gpu-{device}-quick.json" if partly else "gpu.json"
    run = Run(options.out or FOLDER / "results" / name, options.seconds)
    chosen, rounds = (QUICK, 10) if quick else (NETWORKS, 30)
    batches = (1, 4) if device == "cpu" else (1, 64)
    for network in chosen:
        run.stage(
            "latency",
            str(network),
            lambda network=network: latency(  # type: ignore[misc]
                network, device, ("eager", "cudagraphs"), PRECISIONS, batches, rounds
            ),
        )
    for network in chosen[:1] if quick else chosen:
        run.stage(
            "compile",
            str(network),
            lambda network=network: latency(  # type: ignore[misc]
                network, device, ("compile",), COMPILED, batches[-1:], rounds
            ),
        )
    for network in chosen:
        run.stage("onnx", str(network), lambda network=network: onnx_row(network, device))  # type: ignore[misc]
    run.stage("training", "all", lambda: training(device, quick, run.left - 20.0))
    text = summary(run.found)
    print(f"{headline(run.about)}\n\n{text}\n\n{run.out}")
    if not partly and options.out is None:
        publish("gpu", f"{headline(run.about)}; {rounds} rounds in turns.\n\n```\n{text}\n```")
    return int(not any("unavailable" not in row for row in run.found["latency"]))


if __name__ == "__main__":
    sys.exit(main())
