"""Run a function of a test in other processes: as ranks of one group, or alone to be killed."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

__all__ = ["ProcessExitedException", "ranks", "started"]

# torch is loaded once, by the server from which all processes are forked.
PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "fxexpand.training.train",
    "pytest",
]


def ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """``work(rank, *arguments)`` in ``world`` processes with a gloo group; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        started(world, _joined, world, Path(folder) / "store", work, arguments)


def started(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """``work(number, *arguments)`` in ``count`` processes.

    Raises: ProcessExitedException: one was killed; the others are ended too.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    start_processes(  # type: ignore[no-untyped-call]
        _one_thread, args=(work, arguments), nprocs=count, start_method="forkserver"
    )


def _one_thread(number: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    work(number, *arguments)


def _joined(
    rank: int, world: int, store: Path, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        work(rank, *arguments)
        dist.barrier()  # leave together: gloo may abort a process that ends while another is at work
    finally:
        dist.destroy_process_group()
