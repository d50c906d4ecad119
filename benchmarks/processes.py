"""Rows of a table from processes of their own: a crash, a hang or a lack of memory is a row, not the end."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

Item = TypeVar("Item")
Measure: TypeAlias = Callable[[Item], dict[str, Any]]

LIFETIME = 60  # rows of one process: what a library caches must not add up
START = 120.0  # seconds that the imports of a process may take
ENDING = 10.0  # seconds for its end
DIED, LATE, FULL = "the process died (memory?)", "timeout", "out of memory"


def rows_of(
    measure: Measure[Item],
    items: Sequence[Item],
    *,
    jobs: int,
    timeout: float,
    threads: int = 1,
    memory: float | None = None,
    beside: Callable[[Item, Sequence[Item]], bool] = lambda item, running: True,
) -> Iterator[dict[str, Any]]:
    """The rows of ``items`` as they finish; one that fails has ``name``, ``failures`` and ``seconds``.

    Args:
        measure: a function of a module, which processes import.
        jobs: how many run at a time.
        timeout: seconds for one row; then its process is killed.
        threads: of each process.
        memory: GB that a process may take on top of what its imports take; None for no bound.
        beside: ``(item, running) -> bool``: whether it may start beside those that run.
    """
    waiting = deque(items)
    processes = [_Process(measure, threads, memory) for _ in range(min(jobs, len(items)))]
    try:
        while waiting or any(process.busy for process in processes):
            for process in processes:
                running = [p.item for p in processes if p.busy and p.item is not None]
                if waiting and not process.busy and (not running or beside(waiting[0], running)):
                    process.give(waiting.popleft())
            busy = [process for process in processes if process.busy]
            ready = wait([process.link for process in busy], timeout=1.0)
            for process in busy:
                if process.link in ready:
                    row = process.take()
                    if row is not None:
                        yield row
                elif process.late(timeout):
                    yield process.give_up()
    finally:
        for process in processes:
            process.stop(at_once=process.busy)


def _bound(memory: float | None) -> None:
    """Let allocations beyond ``memory`` GB fail, which is an exception where the kernel would kill."""
    if memory is None:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])  # imports reserve more than they use
    limit = pages * resource.getpagesize() + int(memory * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _worker(link: Connection, measure: Measure[Any], threads: int, memory: float | None) -> None:
    """Measure what comes down the link until it closes."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    _bound(memory)
    link.send(None)  # ready: the time for a row does not begin before
    while True:
        try:
            item = link.recv()
        except EOFError:
            return
        try:
            row = measure(item)
        except Exception as error:  # a crash is a row
            row = {"name": str(item), "failures": [_reason(error)]}
        link.send(row)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return FULL
    return f"{type(error).__name__}: {text[:300]}"


class _Process(Generic[Item]):
    """A worker process that is replaced when it dies, takes too long or grows old."""

    def __init__(self, measure: Measure[Item], threads: int, memory: float | None) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._given = measure, threads, memory
        self.item: Item | None = None
        self.busy = False
        self._start()

    def _start(self) -> None:
        self.link, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_worker, args=(theirs, *self._given), daemon=True)
        self._process.start()
        self._rows, self._ready = 0, False
        theirs.close()

    def give(self, item: Item) -> None:
        """Start on an item."""
        self.item, self.busy, self.since = item, True, time.monotonic()
        self.link.send(item)

    def take(self) -> dict[str, Any] | None:
        """The finished row; one about the death of the process if it died; None if it has only started."""
        try:
            row: dict[str, Any] | None = self.link.recv()
        except (EOFError, ConnectionResetError):
            self.busy = False
            return self._replaced(DIED)
        if row is None:
            self.since, self._ready = time.monotonic(), True
            return None
        self.busy = False
        self._rows += 1
        if self._rows >= LIFETIME or FULL in row["failures"]:
            self.stop()
            self._start()
        return {"seconds": round(time.monotonic() - self.since, 1), **row}

    def late(self, timeout: float) -> bool:
        """Whether the row takes too long; one that waits for the imports has time for them too."""
        return time.monotonic() - self.since > timeout + (0.0 if self._ready else START)

    def give_up(self) -> dict[str, Any]:
        """The row of one that took too long."""
        self.busy = False
        return self._replaced(LATE)

    def _replaced(self, reason: str) -> dict[str, Any]:
        self.stop(at_once=True)
        self._start()
        seconds = round(time.monotonic() - self.since, 1)
        return {"name": str(self.item), "failures": [reason], "seconds": seconds}

    def stop(self, *, at_once: bool = False) -> None:
        """Close its link, at which it ends by itself and tidies up; kill it if it does not."""
        self.link.close()
        if not at_once:
            self._process.join(ENDING)
        self._process.kill()
        self._process.join()
