"""Do FLOPs and latency fall as predicted? ``python -m benchmarks.factorize [--quick]``

ResNet-18, VGG-11, ViT-S and a small BERT, factored to half of their FLOPs: what the report predicted, what
is counted, and what onnxruntime takes, in turns with the original. ResNet-18 also to a share of its latency.
The error of each weight must be that of its dropped singular values; the outputs of each layer on a probe
must be no further off than its largest dropped singular value allows.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compression.expand_then_compress import unfinished
from benchmarks.evidence import FOLDER, headline, machine, publish, save
from fxexpand import count_flops, factorize, fuse, measure_latency, report
from fxexpand.layers.rewritten import kernel_like
from fxexpand.lowrank.cuts import matrix_of
from fxexpand.lowrank.factored import Factorized
from fxexpand.lowrank.factorize_report import FactorizeReport, FactorRow
from fxexpand.reporting.table import short, table
from fxexpand.running.inputs import ExampleInputs

SHARE = 0.5  # of the FLOPs
Built = tuple[nn.Module, ExampleInputs]


class Classifier(nn.Module):
    """BERT-small (Turc et al., arXiv 1908.08962: 4 layers, 512 wide) with its pooled output alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048
        )
        self.bert = BertModel(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token numbers ``(batch, length)`` to ``(batch, 512)``."""
        output: Tensor = self.bert(input_ids=input_ids).pooler_output
        return output


def vision(name: str, size: int) -> Built:
    """A network of torchvision or timm, with random weights, and an image."""
    library, _, name = name.partition(":")
    if library == "timm":
        import timm

        model: nn.Module = timm.create_model(name)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None)
    return model.eval(), torch.randn(1, 3, size, size)


def bert() -> Built:
    """BERT-small and 128 tokens."""
    return Classifier().eval(), torch.randint(0, 30_000, (1, 128))


NETWORKS: dict[str, Callable[[], Built]] = {
    "resnet18": lambda: vision("torchvision:resnet18", 224),
    "bert_small": bert,
    "vit_small": lambda: vision("timm:vit_small_patch16_224", 224),
    "vgg11": lambda: vision("torchvision:vgg11", 224),
}
TINY: dict[str, Callable[[], Built]] = {"test_resnet": lambda: vision("timm:test_resnet", 96)}


def bounds(model: nn.Module, small: nn.Module, found: FactorizeReport, limit: int) -> dict[str, Any]:
    """Whether the errors are those that theory allows, on the ``limit`` smallest layers that were factored.

    Per layer: the squared error of the weight against the dropped singular values (an SVD of its own), and
    the outputs of the matrix on a probe against the largest dropped singular value.
    """
    rows = [row for row in found.rows if isinstance(row, FactorRow) and row.cut is not None]
    rows.sort(key=lambda row: row.params_before)
    worst, holds = 0.0, True
    for row in rows[:limit]:
        assert row.cut is not None
        name = row.site.removesuffix(".weight")  # of a shared weight or a table
        before, after = model.get_submodule(name), small.get_submodule(name)
        assert isinstance(after, Factorized)
        one, two = (
            matrix_of(kernel_like(each, each.weight.detach()), row.cut.scheme).to(torch.float64)  # type: ignore[operator]
            for each in (before, after)
        )
        values = torch.linalg.svdvals(one)
        dropped = values[..., row.cut.rank :]
        norm = float(dropped.square().sum().sqrt() / values.square().sum().sqrt())
        assert row.error is not None
        worst = max(worst, abs(row.error / norm - 1.0))
        probe = torch.randn(one.shape[0], one.shape[2], 16, dtype=torch.float64)
        gain = ((one - two) @ probe).norm(dim=1) / probe.norm(dim=1)
        holds = holds and bool((gain <= dropped[..., :1] * (1 + 1e-5)).all())
    return {"layers": len(rows[:limit]), "eckart_young": worst, "lipschitz": holds}


def measure(name: str, build: Callable[[], Built], rounds: int, limit: int, **budget: Any) -> dict[str, Any]:
    """One network: predicted, counted and timed."""
    print(f"{name} {budget} ...", file=sys.stderr, flush=True)
    torch.manual_seed(0)
    model, example = build()
    start = time.perf_counter()
    small = factorize(model, example, **budget)
    seconds = time.perf_counter() - start
    found = report(small)
    assert isinstance(found, FactorizeReport) and found.flops_before and found.flops_after
    checks = bounds(model, small, found, limit)
    again = fuse(small, example)
    flops, after = (count_flops(each, example).total for each in (model, small))
    row: dict[str, Any] = {
        "name": name,
        "budget": budget,
        "params": [found.params_before, found.params_after],
        "predicted": found.flops_after / found.flops_before,
        "measured": after / flops,
        "fused": count_flops(again, example).total / flops,
        "seconds": seconds,
        "output_error": found.output_error,
        "factored": len(found.changed),
        **checks,
    }
    backends = ["onnxruntime"] if "flops" in budget else ["eager", "onnxruntime"]
    timed = measure_latency(
        {"whole": model, "factored": small}, example, backends=backends, rounds=rounds, tolerance=float("inf")
    )
    for backend in backends:
        change = timed.difference("whole", "factored", backend)
        row[backend] = [change.ratio, change.low, change.high]
        row[f"{backend}_ms"] = [timed.measurement(each, backend).median for each in ("whole", "factored")]
    del model, small, again
    gc.collect()
    return row


def failures(row: dict[str, Any]) -> list[str]:
    """The conditions that do not hold."""
    broken = []
    if abs(row["predicted"] / row["measured"] - 1.0) > 1e-6:
        broken.append("FLOPs are not as predicted")
    share = row["budget"].get("flops")
    if share is not None and row["measured"] > share * (1 + 1e-9):
        broken.append("above the budget")
    if row["fused"] > row["measured"] * (1 + 1e-9):
        broken.append("fusing costs FLOPs")
    if row["eckart_young"] > 1e-4:
        broken.append("an error is not that of the dropped singular values")
    if not row["lipschitz"]:
        broken.append("a layer is further off than its norm allows")
    return broken


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """One line per network, as text."""
    body = [
        (
            row["name"],
            ", ".join(f"{key}={value}" for key, value in row["budget"].items()),
            f"{short(row['params'][0])} -> {short(row['params'][1])}",
            f"{row['predicted']:.4f}",
            f"{row['measured']:.4f}",
            f"{row['fused']:.4f}",
            *(_ratio(row, backend) for backend in ("onnxruntime", "eager")),
            f"{row['eckart_young']:.0e}",
            f"{row['seconds']:.0f}",
            "; ".join(failures(row)) or "all",
        )
        for row in rows
    ]
    head = ("network", "budget", "params", "FLOPs predicted", "measured", "fused", "onnxruntime", "eager",
            "bound", "s", "holds")  # fmt: skip
    return table(head, body, left=(0, 1))


def _ratio(row: dict[str, Any], backend: str) -> str:
    if backend not in row:
        return "-"
    ratio, low, high = row[backend]
    return f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if something does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny ResNet, nothing published")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=8, help="whose bounds are checked, per network")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/factorize.json")
    options = parser.parse_args(given)
    name = f"factorize{'-quick' if options.quick else ''}.json"
    out, about = options.out or FOLDER / "results" / name, machine()
    content: dict[str, Any] = {"benchmark": "factorize", "machine": about}
    content |= {"settings": {"rounds": options.rounds, "layers": options.layers}, "shares": [SHARE]}
    cases: list[tuple[str, Callable[[], Built], dict[str, Any]]]
    if options.quick:
        cases = [(name, build, {"flops": SHARE}) for name, build in TINY.items()]
    else:
        cases = [(name, NETWORKS[name], {"flops": SHARE}) for name in options.only]
        cases += [("resnet18", NETWORKS["resnet18"], {"latency": 0.7})] * ("resnet18" in options.only)
    rows = unfinished(out, content)
    for name, build, budget in cases:
        if not any(row["name"] == name and row["budget"] == budget for row in rows):
            rows.append(measure(name, build, options.rounds, options.layers, **budget))
            save(out, {**content, "runs": rows, "unfinished": True})
    text = text_of(rows)
    print(f"{headline(about)}\n\n{text}")
    save(out, {**content, "runs": rows})
    if not options.quick and options.out is None and options.only == list(NETWORKS):
        publish("factorize", f"{headline(about)}\n\n```\n{text}\n```")
    return int(any(failures(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
