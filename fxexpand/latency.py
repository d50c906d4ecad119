"""Measure latency so that a difference can be believed.

Models take turns in every round, in a random order, so that drift of the machine (clocks, heat, neighbours)
falls on all of them alike; they are compared by their ratio within a round. torch.utils.benchmark times one
after another and cannot do this.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand import inputs
from fxexpand.backends import BACKENDS, Candidate, prepare
from fxexpand.errors import FxExpandError, SelectionError, VerificationError
from fxexpand.evaluating import evaluating
from fxexpand.inputs import ExampleInputs, batch_size, call, tensors
from fxexpand.intervals import Interval, median_interval
from fxexpand.outputs import tensors_of, worst_error
from fxexpand.table import table

# Largest relative difference of two models' outputs; wide enough for TF32 and for another order of addition.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Measurement:
    """The latency of one model on one backend, in milliseconds per call; ``samples`` are means of a round."""

    model: str
    backend: str
    median: float
    low: float
    high: float
    calls_per_round: int
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """``other`` against ``model`` on one backend: above 1, ``other`` takes longer.

    ``real`` says that the interval excludes 1; the intervals of a report hold jointly with its confidence.
    """

    model: str
    other: str
    backend: str
    ratio: float
    low: float
    high: float

    @property
    def real(self) -> bool:
        """Whether the difference is more than noise."""
        return Interval(self.ratio, self.low, self.high).excludes(1.0)

    def __str__(self) -> str:
        verdict = "real" if self.real else "noise"
        return (
            f"{self.backend}: {self.other} takes {self.ratio:.3f}x the time of {self.model} "
            f"[{self.low:.3f}, {self.high:.3f}]: {verdict}"
        )


@dataclass(frozen=True)
class LatencyReport:
    """Latencies of models on backends, their differences, and the conditions they were measured under."""

    measurements: tuple[Measurement, ...]
    differences: tuple[Difference, ...]
    device: str
    threads: int
    dtype: str
    batch: int | None
    shapes: tuple[tuple[int, ...], ...]
    rounds: int
    confidence: float
    versions: Mapping[str, str]

    def measurement(self, model: str, backend: str) -> Measurement:
        """The row of one model on one backend."""
        for row in self.measurements:
            if (row.model, row.backend) == (model, backend):
                return row
        raise SelectionError(f"{model!r} was not measured on {backend!r}.")

    def difference(self, model: str, other: str, backend: str) -> Difference:
        """``other`` against ``model``, in the order they were given to ``measure_latency``."""
        for row in self.differences:
            if (row.model, row.other, row.backend) == (model, other, backend):
                return row
        raise SelectionError(f"{other!r} was not compared with {model!r} on {backend!r}.")

    def __str__(self) -> str:
        level = f"{self.confidence:.4g}"
        rows = [
            (m.model, m.backend, f"{m.median:.4g}", f"[{m.low:.4g}, {m.high:.4g}]", str(m.calls_per_round))
            for m in self.measurements
        ]
        head = ("model", "backend", "median ms", f"{level} interval", "calls/round")
        shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        conditions = (
            f"{self.device}, {self.threads} threads, {self.dtype}, batch {self.batch} ({shapes}), "
            f"{self.rounds} interleaved rounds; {', '.join(f'{k} {v}' for k, v in self.versions.items())}"
        )
        return "\n".join([table(head, rows, left=(0, 1)), *map(str, self.differences), conditions])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the samples included."""
        differences = [{**asdict(row), "real": row.real} for row in self.differences]
        return {
            "measurements": [{**asdict(row), "samples": list(row.samples)} for row in self.measurements],
            "differences": differences,
            "device": self.device,
            "threads": self.threads,
            "dtype": self.dtype,
            "batch": self.batch,
            "shapes": [list(shape) for shape in self.shapes],
            "rounds": self.rounds,
            "confidence": self.confidence,
            "versions": dict(self.versions),
        }


def measure_latency(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    *,
    backends: Sequence[str] = BACKENDS,
    device: torch.device | str | None = None,
    threads: int | None = None,
    rounds: int = 30,
    warmup: int = 3,
    round_ms: float = 10.0,
    confidence: float = 0.95,
    tolerance: float | None = None,
    progress: bool | None = None,
) -> LatencyReport:
    """Time the forward pass of ``models``, in evaluation mode and without gradients.

    Args:
        models: by name; they must compute the same function.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; moved to the device.
        backends: any of ``"eager"``, ``"compile"`` (torch.compile) and ``"onnxruntime"``.
        device: None is the device of the first model. A model on another device is copied, not moved.
        threads: of torch and onnxruntime on the CPU; None leaves torch's number, and onnxruntime follows it.
        rounds: samples per model and backend. Every round runs each of them once, in a random order.
        warmup: calls before the first timing.
        round_ms: least time of one sample; a fast model is called several times.
        confidence: of the intervals of the medians, and jointly of all differences.
        tolerance: largest relative difference of outputs; None takes 1e-3 in float32 (``TOLERANCES``).
        progress: show a bar on stderr; None shows it on a terminal.

    Raises:
        VerificationError: outputs differ: the speed of a wrong model is worth nothing.
        SelectionError: an unknown backend, no model, or too few rounds for the confidence.
        FxExpandError: a backend is not installed.
    """
    if not models:
        raise SelectionError("models: none given.")
    if not backends or not set(backends) <= set(BACKENDS):
        raise SelectionError(f"backends {list(backends)}: choose from {', '.join(BACKENDS)}.")
    if warmup < 1:
        raise SelectionError(f"warmup={warmup}: at least one call, or the first sample holds the start-up.")
    pairs = len(list(itertools.combinations(models, 2))) * len(set(backends))
    joint = 1.0 - (1.0 - confidence) / max(pairs, 1)  # Bonferroni
    median_interval([0.0] * rounds, joint)  # too few rounds are an error now, not after minutes of timing

    place = torch.device(device) if device is not None else _device(next(iter(models.values())))
    placed = {
        name: model if _device(model) == place else copy.deepcopy(model).to(place)
        for name, model in models.items()
    }
    given = inputs.move(example_inputs, place)
    dtype = _dtype(next(iter(placed.values())), given)
    with ExitStack() as stack:
        stack.enter_context(evaluating(*placed.values()))
        stack.enter_context(_threads(threads))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fxexpand-latency-")))
        candidates = [
            prepare(name, model, backend, given, place, folder / str(i))
            for i, (backend, (name, model)) in enumerate(
                itertools.product(dict.fromkeys(backends), placed.items())
            )
        ]
        reference = tensors_of(call(next(iter(placed.values())), inputs.copy(given)))
        limit = TOLERANCES.get(dtype, 1e-3) if tolerance is None else tolerance
        for candidate in candidates:
            _require_same(candidate, reference, next(iter(placed)), limit)
        calls = [_calls_per_round(candidate, warmup, round_ms, place) for candidate in candidates]
        samples = _sample(candidates, calls, rounds, place, progress)
        used_threads = torch.get_num_threads()
    return LatencyReport(
        measurements=tuple(
            Measurement(c.model, c.backend, *_fields(median_interval(taken, confidence)), n, tuple(taken))
            for c, n, taken in zip(candidates, calls, samples, strict=True)
        ),
        differences=_differences(candidates, samples, joint),
        device=_device_name(place),
        threads=used_threads,
        dtype=str(dtype).removeprefix("torch."),
        batch=batch_size(given),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors(given)),
        rounds=rounds,
        confidence=confidence,
        versions=_versions(backends),
    )


def _require_same(candidate: Candidate, reference: list[Tensor], name: str, tolerance: float) -> None:
    where = f"{candidate.model} on {candidate.backend}"
    try:
        error = worst_error(candidate.outputs(), reference)
    except VerificationError as problem:
        raise VerificationError(f"{where} is not {name}: {problem}") from None
    if not error <= tolerance:
        raise VerificationError(
            f"{where}: outputs differ from {name} on eager by a relative {error:.3g}, above {tolerance:.3g}. "
            "Compare models that compute the same function."
        )


def _calls_per_round(candidate: Candidate, warmup: int, round_ms: float, device: torch.device) -> int:
    for _ in range(warmup):
        candidate.run()
    return max(1, min(10_000, ceil(round_ms / max(_time(candidate, 1, device), 1e-4))))


def _time(candidate: Candidate, calls: int, device: torch.device) -> float:
    """Milliseconds per call. Torch queues its work on CUDA, so events time it; onnxruntime waits for it."""
    if device.type == "cuda" and candidate.backend != "onnxruntime":
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                candidate.run()
            end.record()
            torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / calls
    _synchronize(device)
    begin = time.perf_counter_ns()
    for _ in range(calls):
        candidate.run()
    _synchronize(device)
    return (time.perf_counter_ns() - begin) / 1e6 / calls


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _sample(
    candidates: Sequence[Candidate],
    calls: Sequence[int],
    rounds: int,
    device: torch.device,
    progress: bool | None,
) -> list[list[float]]:
    samples: list[list[float]] = [[] for _ in candidates]
    order = list(range(len(candidates)))
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in _rounds(rounds, progress):
            shuffle(order)
            for i in order:
                samples[i].append(_time(candidates[i], calls[i], device))
    finally:
        if collecting:
            gc.enable()
    return samples


def _rounds(rounds: int, progress: bool | None) -> Iterator[int]:
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from range(rounds)
        return
    from rich.console import Console
    from rich.progress import Progress

    # Redrawn between rounds by hand: a refreshing thread would take time from the models.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("latency", total=rounds)
        for i in range(rounds):
            yield i
            bar.advance(task)
            bar.refresh()


def _differences(
    candidates: Sequence[Candidate], samples: Sequence[Sequence[float]], confidence: float
) -> tuple[Difference, ...]:
    found = []
    for (a, before), (b, after) in itertools.combinations(zip(candidates, samples, strict=True), 2):
        if a.backend == b.backend:
            ratios = [y / x for x, y in zip(before, after, strict=True)]
            fields = _fields(median_interval(ratios, confidence))
            found.append(Difference(a.model, b.model, a.backend, *fields))
    return tuple(found)


def _fields(interval: Interval) -> tuple[float, float, float]:
    return interval.median, interval.low, interval.high


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def _device(model: nn.Module) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    if device.type == "meta":
        raise FxExpandError("latency: a model on the meta device cannot run. Materialise it first.")
    return device


def _dtype(model: nn.Module, given: ExampleInputs) -> torch.dtype:
    tensor = next((t for t in (*model.parameters(), *tensors(given)) if t.is_floating_point()), None)
    return torch.get_default_dtype() if tensor is None else tensor.dtype


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"


def _versions(backends: Sequence[str]) -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    if "onnxruntime" in backends:
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
    return versions
