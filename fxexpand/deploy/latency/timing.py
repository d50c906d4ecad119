"""Time calls in turns, and measure the memory of one.

Models take turns in every round, in a random order, so that drift of the machine (clocks, heat, neighbours)
falls on all of them alike. torch.utils.benchmark times one after another and cannot do this.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any, TypeVar

import torch

from fxexpand.deploy.latency.backends import Candidate
from fxexpand.reporting.progress import bars

T = TypeVar("T")


def calls_per_round(candidate: Candidate, warmup: int, round_ms: float, device: torch.device) -> int:
    """Warm up; the number of calls with which one sample lasts ``round_ms``."""
    for _ in range(warmup):
        candidate.run()
    return max(1, min(10_000, ceil(round_ms / max(milliseconds(candidate, 1, device), 1e-4))))


def milliseconds(candidate: Candidate, calls: int, device: torch.device) -> float:
    """Milliseconds per call. Torch queues its work on CUDA, so events time it; onnxruntime waits for it."""
    if device.type == "cuda" and candidate.queued:
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


def samples_in_turns(
    candidates: Sequence[Candidate],
    calls: Sequence[int],
    rounds: int,
    device: torch.device,
    progress: bool | None,
) -> list[list[float]]:
    """``rounds`` samples of each candidate, in milliseconds per call; the garbage collector waits."""
    samples: list[list[float]] = [[] for _ in candidates]
    order = list(range(len(candidates)))
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in tracked(range(rounds), "latency", progress):
            shuffle(order)
            for i in order:
                samples[i].append(milliseconds(candidates[i], calls[i], device))
    finally:
        if collecting:
            gc.enable()
    return samples


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most that torch's allocator holds during one call, beyond what it held before it: not the weights.

    None where torch keeps no such count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _stderr_closed(),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile,
    ):
        run()
    held = peak = 0
    results: Any = profile.profiler
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's threads inside; None leaves it."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Discard stderr, that of C++ too: the profiler logs its start and its stop there."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def tracked(items: Sequence[T], title: str, progress: bool | None) -> Iterator[T]:
    """The items, with a bar on stderr: always, never, or (None) on a terminal."""
    # Redrawn between items by hand: a refreshing thread would take time from the models.
    with bars(progress, auto_refresh=False) as bar:
        yield from bar.track(items, description=title)
