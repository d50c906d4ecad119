"""Measure latency so that a difference can be believed.

Models take turns (``fxexpand.deploy.latency.timing``) and are compared by their ratio within a round.
"""

from __future__ import annotations

import itertools
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxexpand.deploy.latency.backends import Candidate
from fxexpand.deploy.latency.candidates import Conditions, Unavailable, device_of, dtype_of, ready
from fxexpand.deploy.latency.intervals import median_interval
from fxexpand.deploy.latency.timing import calls_per_round, peak_bytes, samples_in_turns, torch_threads
from fxexpand.deploy.options import BACKENDS, LatencyOptions
from fxexpand.errors import SelectionError
from fxexpand.reporting.rows import plain
from fxexpand.reporting.table import short, table
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, batch_size, tensors


@dataclass(frozen=True)
class Measurement:
    """The latency of one model on one backend, in milliseconds per call; ``samples`` are means of a round.

    ``peak_bytes`` is the most that torch's allocator held during a call beyond the weights and the inputs,
    None where another runtime allocates. ``error`` is how far the outputs are from the first model's.
    """

    model: str
    backend: str
    median: float
    low: float
    high: float
    calls_per_round: int
    samples: tuple[float, ...]
    batch: int | None = None
    peak_bytes: int | None = None
    error: float | None = None


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
    batch: int | None = None

    @property
    def real(self) -> bool:
        """Whether the difference is more than noise."""
        return not self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        verdict = "real" if self.real else "noise"
        where = self.backend if self.batch is None else f"{self.backend}, batch {self.batch}"
        return (
            f"{where}: {self.other} takes {self.ratio:.3f}x the time of {self.model} "
            f"[{self.low:.3f}, {self.high:.3f}]: {verdict}"
        )


@dataclass(frozen=True)
class LatencyReport:
    """Latencies of models on backends, their differences, and the conditions they were measured under.

    ``batch`` and ``shapes`` are those of the example inputs; where batch sizes were asked for, each row has
    its own.
    """

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
    channels_last: bool = False
    tf32: bool = False
    unavailable: tuple[Unavailable, ...] = ()

    def measurement(self, model: str, backend: str, batch: int | None = None) -> Measurement:
        """The row of one model on one backend; the first batch size unless one is named."""
        for row in self.measurements:
            if (row.model, row.backend) == (model, backend) and batch in (None, row.batch):
                return row
        raise SelectionError(f"{model!r} was not measured on {backend!r}.")

    def difference(self, model: str, other: str, backend: str, batch: int | None = None) -> Difference:
        """``other`` against ``model``, in the order they were given to ``measure_latency``."""
        for row in self.differences:
            found = (row.model, row.other, row.backend) == (model, other, backend)
            if found and batch in (None, row.batch):
                return row
        raise SelectionError(f"{other!r} was not compared with {model!r} on {backend!r}.")

    def __str__(self) -> str:
        several = len({row.batch for row in self.measurements}) > 1
        rows = [
            (
                m.model,
                m.backend,
                *([str(m.batch)] if several else []),
                f"{m.median:.4g}",
                f"[{m.low:.4g}, {m.high:.4g}]",
                str(m.calls_per_round),
                "-" if m.peak_bytes is None else f"{short(m.peak_bytes)}B",
            )
            for m in self.measurements
        ]
        head = ("model", "backend", *(["batch"] if several else []), "median ms")
        head = (*head, f"{self.confidence:.4g} interval", "calls", "peak")
        differences = self.differences if several else [replace(d, batch=None) for d in self.differences]
        lines = [*map(str, differences), *map(str, self.unavailable), self._conditions(several)]
        return "\n".join([table(head, rows, left=(0, 1)), *lines])

    def _conditions(self, several: bool) -> str:
        shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        sizes = dict.fromkeys(row.batch for row in self.measurements)
        batches = f"batch{'es' * several} {', '.join(map(str, sizes))}{' of' * (set(sizes) != {self.batch})}"
        precision = f"{self.dtype}{' with TF32' * self.tf32}{', channels last' * self.channels_last}"
        return (
            f"{self.device}, {self.threads} threads, {precision}, {batches} ({shapes}), "
            f"{self.rounds} interleaved rounds; {', '.join(f'{k} {v}' for k, v in self.versions.items())}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the samples included."""
        differences = [{**plain(row), "real": row.real} for row in self.differences]
        return {**plain(self), "differences": differences}


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
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    batch_sizes: Sequence[int] | None = None,
    skip_unavailable: bool = False,
) -> LatencyReport:
    """Time the forward pass of ``models``, in evaluation mode and without gradients.

    Args:
        models: by name; they must compute the same function.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; moved to the device.
        backends: any of ``"eager"``, ``"compile"`` (torch.compile), ``"onnxruntime"``, ``"aotinductor"``
            (torch.export, compiled ahead of time), ``"cudagraphs"`` and ``"tensorrt"`` (in onnxruntime).
        device: None is the device of the first model. A model on another device is copied, not moved.
        threads: of torch and onnxruntime on the CPU; None leaves torch's number, and onnxruntime follows it.
        rounds: samples per model and backend. Every round runs each of them once, in a random order.
        warmup: calls before the first timing.
        round_ms: least time of one sample; a fast model is called several times.
        confidence: of the intervals of the medians, and jointly of all differences.
        tolerance: largest relative difference of outputs; None takes 1e-3 in float32 (``TOLERANCES``).
        progress: show a bar on stderr; None shows it on a terminal.
        dtype: cast copies of the models and of the floating-point inputs. The models are compared in their
            own precision first; then each may be twice as far from that as the first model is.
        channels_last: the memory format of 4-d and 5-d weights and inputs, in copies of the models.
        batch_sizes: measure at each of these, by repeating the rows of ``example_inputs``.
        skip_unavailable: a backend that is not installed, not for this device, or that a model cannot be
            built for is a row in ``unavailable`` with the reason. By default it is an error.

    Raises:
        VerificationError: outputs differ: the speed of a wrong model is worth nothing.
        SelectionError: an unknown backend, no model, or too few rounds for the confidence.
        FxExpandError: a backend is not installed, or (with ``skip_unavailable``) none is available.
    """
    if not isinstance(models, Mapping) or not models:
        raise SelectionError("models: give them by name, as {'original': model, 'fused': small}.")
    options = LatencyOptions(
        backends, device, threads, rounds, warmup, round_ms, confidence, tolerance, progress, dtype,
        channels_last, batch_sizes, skip_unavailable,
    )  # fmt: skip
    return _measured(models, example_inputs, options)


def _measured(
    models: Mapping[str, nn.Module], example_inputs: ExampleInputs, options: LatencyOptions
) -> LatencyReport:
    batch_sizes: Sequence[int | None] = [None] if options.batch_sizes is None else options.batch_sizes
    sizes, rounds = list(dict.fromkeys(batch_sizes)), options.rounds
    pairs = len(list(itertools.combinations(models, 2))) * len(set(options.backends)) * len(sizes)
    joint = 1.0 - (1.0 - options.confidence) / max(pairs, 1)  # Bonferroni
    median_interval([0.0] * rounds, joint)  # too few rounds are an error now, not after minutes of timing

    first = next(iter(models.values()))
    place = device_of(first) if options.device is None else torch.device(options.device)
    conditions = Conditions(place, options.dtype, options.channels_last, options.tolerance)
    with ExitStack() as stack:
        stack.enter_context(evaluating(*models.values()))
        stack.enter_context(torch_threads(options.threads))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fxexpand-latency-")))
        candidates, unavailable = ready(
            models, example_inputs, options.backends, sizes, conditions, folder,
            options.skip_unavailable, options.progress,
        )  # fmt: skip
        peaks = [peak_bytes(c.run, place) if c.on_torch_memory else None for c in candidates]
        calls = [calls_per_round(c, options.warmup, options.round_ms, place) for c in candidates]
        samples = samples_in_turns(candidates, calls, rounds, place, options.progress)
        used_threads = torch.get_num_threads()
    measurements = []
    for c, taken, count, peak in zip(candidates, samples, calls, peaks, strict=True):
        interval = vars(median_interval(taken, options.confidence))
        each: Any = {"calls_per_round": count, "samples": tuple(taken), "peak_bytes": peak, "error": c.error}
        measurements.append(Measurement(c.model, c.backend, **interval, batch=c.batch, **each))
    used = options.dtype or dtype_of(first, example_inputs)
    return LatencyReport(
        measurements=tuple(measurements),
        differences=_differences(candidates, samples, joint),
        device=_device_name(place),
        threads=used_threads,
        dtype=str(used).removeprefix("torch."),
        batch=batch_size(example_inputs),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors(example_inputs)),
        rounds=rounds,
        confidence=options.confidence,
        versions=_versions({candidate.backend for candidate in candidates}),
        channels_last=options.channels_last,
        tf32=place.type == "cuda" and used == torch.float32 and _tf32_allowed(),
        unavailable=tuple(unavailable),
    )


def _differences(
    candidates: Sequence[Candidate], samples: Sequence[Sequence[float]], confidence: float
) -> tuple[Difference, ...]:
    found = []
    for (a, before), (b, after) in itertools.combinations(zip(candidates, samples, strict=True), 2):
        if (a.backend, a.batch) == (b.backend, b.batch):
            ratio = median_interval([y / x for x, y in zip(before, after, strict=True)], confidence)
            bounds = (ratio.median, ratio.low, ratio.high)
            found.append(Difference(a.model, b.model, a.backend, *bounds, a.batch))
    return tuple(found)


def _tf32_allowed() -> bool:
    """Whether products or convolutions in float32 may be rounded to TF32; convolutions are, by default."""
    try:
        return torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
    except RuntimeError:  # it was set by the newer interface, and the older one refuses to be read then
        backends: Any = torch.backends
        return "tf32" in (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"


def _versions(backends: Set[str]) -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    if {"onnxruntime", "tensorrt"} & backends:
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
    return versions
