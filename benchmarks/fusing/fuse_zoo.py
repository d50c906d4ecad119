"""What does fusing leave of a network, and who gets it wrong? ``python -m benchmarks.fuse_zoo [--quick]``

Each network unfused, after ``torch.fx.experimental.optimization.fuse``, ``timm.models.reparameterize_model``
and ``fxexpand.fuse``: operators executed by one forward pass, parameters, FLOPs, errors against the unfused
network in float32 and float64 (starred: how far the unfused one itself is in float32 from float64), latency
relative to it, and seconds to fuse. The networks are one of each timm file that has a method of its own for
this, and some that have none; all with the BatchNorm statistics of trained ones. A peer that crashes or
changes the outputs is a row that says so. The traps are small networks (``benchmarks/traps.py``).
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental import optimization

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from benchmarks.fusing.fuse_verdicts import exact_enough, failures, growth_table, summary
from benchmarks.fusing.operators import operators
from benchmarks.fusing.surgery_cost import timed
from benchmarks.fusing.traps import TRAPS
from benchmarks.models import Network
from benchmarks.settle import settle
from fxexpand import count_flops, fuse, measure_latency, report
from fxexpand.running.outputs import outputs_of, worst_error

# By the file in timm: those with fuse, reparameterize or switch_to_deploy.
OWN = {
    "byobnet": ("repvgg_a0", "mobileone_s0"),
    "efficientvim": ("efficientvim_m1",),
    "efficientvit_msra": ("efficientvit_m0",),
    "fastvit": ("fastvit_t8",),
    "ghostnet": ("ghostnetv3_050",),
    "iformer": ("iformer_s",),
    "lcnetv2": ("lcnetv2_small",),
    "levit": ("levit_128s",),
    "nextvit": ("nextvit_small",),
    "repghost": ("repghostnet_050",),
    "repvit": ("repvit_m0_9",),
    "shvit": ("shvit_s1",),
    "tiny_vit": ("tiny_vit_5m_224",),
}
# Networks for which timm has nothing.
LEFT = (
    *("coatnet_0_rw_224", "cs3darknet_s", "densenet121", "dla34", "dpn48b", "edgenext_xx_small"),
    *("efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0", "efficientvit_b0", "fasternet_t0"),
    *("gernet_s", "ghostnet_050", "hgnet_tiny", "hrnet_w18_small", "inception_v3", "lcnet_050"),
    *("mobilenetv3_small_050", "mobilevit_xxs", "pit_ti_224", "regnetx_002", "res2net50_14w_8s"),
    *("resnest14d", "resnet18", "resnetv2_50", "rexnet_100", "selecsls42", "skresnet18", "starnet_s1"),
    *("swiftformer_xs", "tinynet_e", "visformer_tiny", "vovnet39a", "xception41", "xcit_nano_12_p16_224"),
)
QUICK = ("repghostnet_050", "efficientvit_m0", "mobilenetv3_small_050", "resnet18")


LIMIT32 = 1e-5
ROUNDS = 20  # of latency


def folded(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """``fxexpand.fuse`` of everything."""
    return fuse(model, x, **options)


def _torch_fx(model: nn.Module, x: Tensor) -> nn.Module:
    fused: nn.Module = optimization.fuse(model)
    return fused


def _timm(model: nn.Module, x: Tensor) -> nn.Module:
    fused: nn.Module = reparameterize_model(model)
    return fused


METHODS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "unfused": lambda model, x: model,
    "torch.fx": _torch_fx,
    "timm": _timm,
    "fxexpand": folded,
}


def networks() -> list[Network]:
    """Those that this timm has, and by file."""
    return [network for network in _all() if network.name in _known()]


def missing() -> list[str]:
    """Networks that this timm lacks."""
    return [network.name for network in _all() if network.name not in _known()]


def _all() -> list[Network]:
    return [Network("timm", name) for name in (*(n for names in OWN.values() for n in names), *LEFT)]


def _known() -> set[str]:
    import timm

    return set(timm.list_models())


def measure(name: str, model: nn.Module, x: Tensor, latency: bool = False) -> dict[str, Any]:
    """The row of one network, which holds one of each method.

    The network is in evaluation mode, with statistics that are not those of a fresh one.
    """
    wide = copy.deepcopy(model).double()
    exact, plain = outputs_of(wide, x.double()), outputs_of(model, x)
    noise = worst_error(plain, exact)
    row: dict[str, Any] = {"name": name, "shape": list(x.shape), "noise32": noise, "methods": {}}
    row["limit32"] = max(LIMIT32, 2 * noise)
    fused: dict[str, nn.Module] = {}
    for key, method in METHODS.items():
        found: dict[str, Any] = {}
        row["methods"][key] = found
        try:
            found["seconds"], fused[key] = timed(partial(method, copy.deepcopy(model), x))
            found["error32"] = worst_error(outputs_of(fused[key], x), plain)
            found |= operators(fused[key], x)
            found["params"] = sum({id(p): p.numel() for p in fused[key].parameters()}.values())
            found["flops"] = count_flops(fused[key], x).total
        except Exception as error:  # whatever a peer or a network raises is its row
            found["failed"] = _one_line(error)
            fused.pop(key, None)
            continue
        try:
            found["error64"] = worst_error(_after(method, wide, x.double()), exact)
        except Exception as error:  # a fold that makes float32 layers
            found["failed64"] = _one_line(error)
    if "fxexpand" in fused:
        row["norms_left"] = _norms_left(fused["fxexpand"])
    if latency:
        sound = {key: made for key, made in fused.items() if key != "unfused" and exact_enough(row, key)}
        for key, ratios in latency_ratios(model, sound, x).items():
            row["methods"][key] |= ratios
    row["failures"] = failures(row)
    return row


def _after(method: Callable[[nn.Module, Tensor], nn.Module], model: nn.Module, x: Tensor) -> list[Tensor]:
    return outputs_of(method(copy.deepcopy(model), x), x)


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}"


def _norms_left(model: nn.Module) -> dict[str, str]:
    """The BatchNorms that stay, and why."""
    rows = report(model).rows
    return {row.site: row.reason for row in rows if "Norm" in row.kind and row.action in ("left", "refused")}


def latency_ratios(plain: nn.Module, fused: dict[str, nn.Module], x: Tensor) -> dict[str, dict[str, Any]]:
    """By method and backend: time after fusing relative to that before, with the interval.

    All are timed in turns; where one cannot be, each alone, and the reason of one that fails is its row.
    """
    found: dict[str, dict[str, Any]] = {key: {} for key in fused}
    for backend in ("eager", "onnxruntime"):
        together = _timed_in_turns(plain, fused, x, backend)
        for key, made in fused.items():
            alone = _timed_in_turns(plain, {key: made}, x, backend) if isinstance(together, str) else together
            found[key][backend] = alone if isinstance(alone, str) else alone[key]
    return found


def _timed_in_turns(
    plain: nn.Module, fused: dict[str, nn.Module], x: Tensor, backend: str
) -> dict[str, dict[str, float]] | str:
    """The ratios by method, or why there are none."""
    models = {"unfused": plain, **fused}
    try:
        measured = measure_latency(models, x, backends=(backend,), rounds=ROUNDS, progress=False)
    except Exception as error:  # exporters raise anything; the other backend is measured all the same
        return _one_line(error)
    ratios = {key: measured.difference("unfused", key, backend) for key in fused}
    return {key: {"ratio": r.ratio, "low": r.low, "high": r.high} for key, r in ratios.items()}


def _chain(layers: int, pointwise: bool) -> nn.Sequential:
    """Convolutions of one channel count: with a norm and ReLU after each, or 1x1 ones that are one kernel."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        if pointwise:
            parts.append(nn.Conv2d(8, 8, 1))
            nn.init.orthogonal_(parts[-1].weight)  # type: ignore[arg-type]
        else:
            parts += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
            nn.init.dirac_(parts[-3].weight)  # type: ignore[arg-type]  # random ones let values vanish on the way
    return nn.Sequential(*parts).eval()


def growth_row(name: str) -> dict[str, Any]:
    """Seconds to fuse a ResNet of torchvision, ``norm-100`` or ``pointwise-100``: the better of two times."""
    kind, _, length = name.partition("-")
    if length:
        model: nn.Module = _chain(int(length), kind == "pointwise")
        x = torch.randn(1, 8, 8, 8)
    else:
        import torchvision

        model, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 64, 64)
    before = operators(model, x)
    seconds, fused = min((timed(partial(folded, model, x)) for _ in range(2)), key=lambda pair: pair[0])
    after = operators(fused, x)
    return {
        "name": name,
        "nodes": before["conv"] + before["linear"] + before["norm"] + before["add"],
        "left": after["conv"] + after["linear"] + after["norm"] + after["add"],
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
    }


def row_of(network: Network, latency: bool) -> dict[str, Any]:
    """The row of a network of timm; one that cannot be built or run has a row too."""
    try:
        size, built = network.smallest()
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        model = network.build(built).eval().requires_grad_(False)
        settle(model, x)
        return measure(str(network), model, x, latency)
    except Exception as error:  # whatever timm or a network raises
        return {"name": str(network), "failures": [_one_line(error)]}


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="four networks, no latency, nothing published")
    parser.add_argument("--only", default="*", help="a glob over the names of timm")
    parser.add_argument("--no-latency", action="store_true", help="leave the latencies out")
    parser.add_argument("--fresh", action="store_true", help="do not go on with an interrupted run")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/fuse_zoo[-quick].json")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if something does not hold of ``fxexpand.fuse``."""
    options = _arguments(given)
    chosen = [network for network in networks() if fnmatch.fnmatch(network.name, options.only)]
    if options.quick:
        chosen = [network for network in chosen if network.name in QUICK]
    lengths = (10, 100) if options.quick else (10, 100, 1000)
    chains = [f"{kind}-{length}" for kind in ("norm", "pointwise") for length in lengths]
    resnets = [] if options.quick else ["resnet50", "resnet101", "resnet152"]
    out = options.out or FOLDER / "results" / ("fuse_zoo-quick.json" if options.quick else "fuse_zoo.json")
    journal = out.with_suffix(".jsonl")
    if options.fresh or options.quick:
        journal.unlink(missing_ok=True)
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    done = {row["name"] for row in rows}
    journal.parent.mkdir(parents=True, exist_ok=True)
    for network in chosen:
        if str(network) in done:
            continue
        rows.append(row_of(network, latency=not (options.quick or options.no_latency)))
        with open(journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        verdict = "; ".join(rows[-1]["failures"]) or "holds"
        print(f"[{len(rows)}/{len(chosen)}] {network}: {verdict}", file=sys.stderr, flush=True)
    rows += [measure(f"trap:{name}", *build()) for name, build in TRAPS.items()]
    rows.sort(key=lambda row: row["name"])
    growth = [growth_row(name) for name in (*resnets, *chains)]
    about, text = machine(), f"{summary(rows, missing())}\n\n{growth_table(growth)}"
    print(f"{headline(about)}\n\n{text}")
    save(
        out,
        {
            "benchmark": "fuse_zoo",
            "machine": about,
            "rows": rows,
            "missing": missing(),
            "growth": growth,
        },
    )
    journal.unlink(missing_ok=True)
    if options.out is None and not options.quick and options.only == "*":
        publish("fuse_zoo", f"{headline(about)}.\n\n```\n{text}\n```")
    return int(any(row["failures"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
