"""The demo: train a small network plain and expanded on real data, fuse it, and prove the result."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxexpand.deploy import export_onnx
from fxexpand.deploy.latency import LatencyReport, measure_latency
from fxexpand.deploy.latency.timing import torch_threads
from fxexpand.deploy.sessions import feeds, onnx_installed, open_session
from fxexpand.errors import FxExpandError, VerificationError
from fxexpand.lowrank import rank_report
from fxexpand.recipes import Chain
from fxexpand.reporting.files import write_whole
from fxexpand.reporting.progress import bars
from fxexpand.running.flops import count_flops
from fxexpand.running.outputs import worst_error
from fxexpand.surgery.expand import expand
from fxexpand.surgery.fuse import fuse
from fxexpand.training.data import batches, digits
from fxexpand.training.demo import page
from fxexpand.training.demo.findings import Findings, Proof, Run
from fxexpand.training.demo.network import NETWORK, Digits
from fxexpand.training.loop import fit, logits
from fxexpand.training.options import DemoOptions, Schedule

# Largest relative error of the logits in float32: five layers, each within 1e-5 of what it replaces.
TOLERANCE = 5e-5

FILES = ("report.html", "report.json", "model.safetensors", "model.onnx")
ONNX_FILE = FILES[-1]
ONNX_MISSING = 'no ONNX file, no onnxruntime figures: run pip install "fxexpand[onnx]"'
PLOTS_MISSING = 'no plots in report.html: run pip install "fxexpand[plots]"'

Notify: TypeAlias = Callable[[str, int], None]  # a task of the progress bar, and how many steps it advances


@dataclass(frozen=True)
class Trained:
    """One seed's networks after training, and the findings on them."""

    run: Run
    plain: nn.Module
    expanded: nn.Module
    fused: nn.Module
    test: Tensor

    def on_cpu(self) -> nn.Module:
        """A copy of the fused network."""
        return copy.deepcopy(self.fused).cpu()


def run(
    folder: Path,
    *,
    seeds: int = 3,
    train_size: int = 600,
    schedule: Schedule = Schedule(),  # noqa: B008 - a frozen dataclass
    recipe: Chain = Chain(depth=3, width=2),  # noqa: B008 - a frozen dataclass
    device: torch.device | str = "cpu",
    rounds: int = 30,
    progress: bool | None = None,
) -> Findings:
    """Run the demo and write ``report.html``, ``report.json``, ``model.safetensors`` and ``model.onnx``.

    Args:
        folder: made if it does not exist; files of an earlier run in it are replaced.
        seeds: how many pairs of networks are trained, with the seeds 0, 1, 2...
        train_size: how many of the 1797 digits are trained on; the others are the test set.
        rounds: of the latency measurement.
        progress: show bars on stderr; None shows them on a terminal.

    A proof that fails does not raise: it is in the result's ``failed``. Missing extras skip their step, and
    ``skipped`` says so.

    Raises:
        FxExpandError: training diverged.
        OSError: a file cannot be written.
    """
    # One thread: a network this small gains little from a second one, and two threads that wait for each
    # other at every operator are many times slower where another program takes one of the cores.
    with torch_threads(1):
        options, place = DemoOptions(seeds, train_size, rounds), torch.device(device)
        return _run(folder, options, schedule, recipe, place, progress)


def _run(
    folder: Path,
    options: DemoOptions,
    schedule: Schedule,
    recipe: Chain,
    device: torch.device,
    progress: bool | None,
) -> Findings:
    begin, cuda = time.monotonic(), device.type == "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    onnx, plots = onnx_installed(), importlib.util.find_spec("matplotlib")
    skipped = [*([] if onnx else [ONNX_MISSING]), *([] if plots else [PLOTS_MISSING])]
    seeds, steps = options.seeds, schedule.epochs * -(-options.train_size // schedule.batch_size)

    with _bars({"training": 2 * seeds * steps, "proofs": 1 + onnx}, progress) as notify:
        pairs = [_pair(seed, options.train_size, schedule, recipe, device, notify) for seed in range(seeds)]
        first = pairs[0]
        proofs = [*first.run.proofs, _write_weights(first, folder / "model.safetensors")]
        notify("proofs", 1)
        (folder / ONNX_FILE).unlink(missing_ok=True)  # if none is written, none of an earlier run stays
        if onnx:
            proofs += _write_onnx(first, folder / ONNX_FILE)
            notify("proofs", 1)
    latency, problem = _latency(first, onnx, options.rounds, device, progress, skipped)
    runs = (replace(first.run, proofs=(*proofs, *problem)), *(pair.run for pair in pairs[1:]))
    example, batch = first.test[:1].to(device), first.test[: schedule.batch_size].to(device)
    networks = {"plain": first.plain, "expanded": first.expanded, "fused": first.fused}
    single = {name: count_flops(model, example) for name, model in networks.items()}
    findings = Findings(
        data="scikit-learn digits",
        sizes=(options.train_size, len(first.test)),
        network=NETWORK,
        recipe=repr(recipe),
        schedule=schedule,
        full_ranks={row.name.removesuffix(".weight"): row.full_rank for row in rank_report(first.plain).rows},
        runs=runs,
        spectra=_spectra(first.plain, first.expanded, list(runs[0].plain.ranks)),
        parameters={name: found.parameters for name, found in single.items()},
        flops={name: found.total for name, found in single.items()},
        batch_flops={name: count_flops(model, batch).total for name, model in networks.items()},
        latency=latency,
        skipped=tuple(skipped),
        files=tuple(name for name in FILES if name != ONNX_FILE or (folder / name).exists()),
        versions={"python": sys.version.split()[0], "torch": str(torch.__version__)},
        device=f"{device} ({torch.cuda.get_device_name(device)})" if cuda else f"{device}, one thread",
        seconds=time.monotonic() - begin,
    )
    write_whole(folder / "report.json", json.dumps(findings.to_dict(), indent=1, allow_nan=False) + "\n")
    write_whole(folder / "report.html", page.html(findings))
    return findings


def _pair(
    seed: int, train_size: int, schedule: Schedule, recipe: Chain, device: torch.device, notify: Notify
) -> Trained:
    """Train one seed plain and expanded, from the same function and on the same batches, and fuse."""
    data = digits(seed, train_size)
    test = batches(data.test, 500)
    torch.manual_seed(seed)
    plain = Digits().to(device)
    expanded = expand(plain, recipe, generator=torch.Generator().manual_seed(seed), progress=False)
    at_start = _same_outputs("expanded = plain, start", logits(expanded, test), logits(plain, test))

    histories = []
    for model in (plain, expanded):
        train = batches(data.train, schedule.batch_size, seed=seed)
        histories.append(fit(model, train, test, schedule, on_step=lambda: notify("training", 1)))
    fused = fuse(expanded.eval(), scope="expanded", progress=False)
    before, after = logits(expanded, test), logits(fused, test)
    images = torch.cat([images for images, _ in test])
    work, wanted = (count_flops(model, images[:1].to(device)).total for model in (fused, plain.eval()))
    proofs = (
        at_start,
        _same_outputs("fused = expanded", after, before),
        _same_classes("same class, all images", after, before),
        Proof("FLOPs = plain's", abs(work - wanted), 0, total=wanted),
        _same_structure(fused, plain),
    )
    return Trained(Run(seed, histories[0], histories[1], proofs), plain, expanded, fused, images)


def _same_outputs(claim: str, actual: Tensor, expected: Tensor) -> Proof:
    absolute = float((actual.double() - expected.double()).abs().max())
    return Proof(claim, worst_error([actual], [expected]), TOLERANCE, absolute=absolute)


def _same_classes(claim: str, actual: Tensor, expected: Tensor) -> Proof:
    differ = int((actual.argmax(-1) != expected.argmax(-1)).sum())
    return Proof(claim, differ, 0, total=len(expected))


def _same_structure(fused: nn.Module, plain: nn.Module) -> Proof:
    """The same names in the same order, with the same shapes and dtypes."""
    kinds = [
        [(name, tuple(value.shape), value.dtype) for name, value in model.state_dict().items()]
        for model in (fused, plain)
    ]
    unlike = len(set(kinds[0]) ^ set(kinds[1])) or int(kinds[0] != kinds[1])
    return Proof("names, shapes = plain's", unlike, 0, total=len(kinds[1]))


def _write_weights(trained: Trained, path: Path) -> Proof:
    """Write the fused weights, and load the file strictly into a fresh plain network."""
    from safetensors.torch import load_file, save

    state = {name: value.detach().cpu().contiguous() for name, value in trained.fused.state_dict().items()}
    write_whole(path, save(state))
    claim, fresh = "plain from file = fused", Digits().eval()
    try:
        fresh.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        return Proof(claim, math.nan, TOLERANCE, problem=" ".join(str(error).split()))
    with torch.no_grad():
        return _same_outputs(claim, fresh(trained.test), trained.on_cpu()(trained.test))


def _write_onnx(trained: Trained, path: Path) -> list[Proof]:
    """Export the fused network, and compare onnxruntime with torch on every test image."""
    fused, claims = trained.on_cpu(), ("ONNX = fused", "same class in ONNX")
    try:
        report = export_onnx(fused, path, trained.test[:8])
    except VerificationError as error:
        return [Proof(claims[0], math.nan, TOLERANCE, problem=str(error))]
    session = open_session(path)
    actual = torch.from_numpy(session.run(None, feeds(session, trained.test))[0])
    with torch.no_grad():
        expected = fused(trained.test)
    logit = _same_outputs(claims[0], actual, expected)
    limit = logit.limit if report.tolerance is None else report.tolerance
    return [replace(logit, limit=limit), _same_classes(claims[1], actual, expected)]


def _latency(
    trained: Trained,
    onnx: bool,
    rounds: int,
    device: torch.device,
    progress: bool | None,
    skipped: list[str],
) -> tuple[LatencyReport | None, list[Proof]]:
    """Latency of one image; a proof that fails where the three networks differ.

    The plain network has the fused weights: only the same function is compared.
    """
    plain = Digits().to(device).eval()
    plain.load_state_dict(trained.fused.state_dict())
    models = {"plain": plain, "expanded": trained.expanded, "fused": trained.fused}
    image = trained.test[:1].to(device)
    every = ("eager", "onnxruntime") if onnx else ("eager",)
    for backends in dict.fromkeys((every, ("eager",))):
        try:
            return measure_latency(models, image, backends=backends, rounds=rounds, progress=progress), []
        except VerificationError as error:
            return None, [Proof("same outputs when timed", math.nan, TOLERANCE, problem=str(error))]
        except FxExpandError as error:
            skipped.append(f"latency on {' and '.join(backends)}: {error}")
    return None, []


def _spectra(
    plain: nn.Module, expanded: nn.Module, layers: list[str]
) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Singular values by layer, each divided by the largest."""

    def values(model: nn.Module, layer: str) -> tuple[float, ...]:
        weight: Tensor = model.get_submodule(layer).weight  # type: ignore[assignment]
        spectrum = torch.linalg.svdvals(weight.detach().flatten(1).double())
        return tuple((spectrum / spectrum[0]).tolist())

    return {layer: (values(plain, layer), values(expanded, layer)) for layer in layers}


@contextmanager
def _bars(totals: dict[str, int], progress: bool | None) -> Iterator[Notify]:
    """One bar per task on stderr while the body runs; nothing where stderr is not a terminal."""
    from rich.progress import BarColumn, TimeRemainingColumn

    columns = ("{task.description:9}", BarColumn(), "{task.completed}/{task.total}", TimeRemainingColumn())
    with bars(progress, *columns) as bar:
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items()}
        yield lambda task, steps: bar.advance(tasks[task], steps)
