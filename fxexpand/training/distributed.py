"""The processes that ``torchrun`` starts: their group, and a model wrapped for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxexpand.errors import SelectionError
from fxexpand.layers.expanded import Expanded


@dataclass(frozen=True)
class Processes:
    """This process among those that train together: number ``rank`` of ``world``, on ``device``."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agree(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: each has its own running statistics of a BatchNorm."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the other processes of ``torchrun``, if it started this one; alone otherwise.

    On CUDA each process takes the device of its own number on its machine, and NCCL connects them; gloo
    elsewhere. A group that exists already is used, and left as it is.

    Raises: SelectionError: a machine has fewer devices than processes.
    """
    joins = dist.is_torchelastic_launched() and not dist.is_initialized()
    if joins:
        if device.type == "cuda":
            number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if number >= count:
                raise SelectionError(f"torchrun: {number + 1} processes or more for {count} CUDA devices.")
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            with _stdout_to_stderr():
                dist.init_process_group("gloo")
    try:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), device)
        else:
            yield Processes(0, 1, device)
        if joins:
            # All leave together: gloo may abort a process that ends while another computes.
            dist.barrier()
    finally:
        if joins:
            dist.destroy_process_group()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send stdout to stderr, that of C++ too: gloo of torch 2.9 prints that it is connected."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def wrapped(model: nn.Module, group: Processes, *, shard: bool = False) -> nn.Module:
    """``model`` as it trains in ``group``: as it is, in DistributedDataParallel, or sharded (FSDP2).

    Sharding is in place: every expanded layer is gathered on its own, all else as one unit. Layers that are
    expanded in weight space belong to that unit, as any module may read their weights.
    """
    if shard:
        from torch.distributed.fsdp import fully_shard

        for module in list(model.modules()):
            if isinstance(module, Expanded):
                fully_shard(module)
        fully_shard(model)
        return model
    if group.world == 1:
        return model
    devices: Any = [group.device] if group.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def reducing(network: Any, last: bool) -> AbstractContextManager[Any]:
    """Around a backward pass of a ``wrapped`` network; the last one sums the gradients of all processes."""
    if hasattr(network, "set_requires_gradient_sync"):  # sharded
        network.set_requires_gradient_sync(last)
    elif not last and hasattr(network, "no_sync"):
        held: AbstractContextManager[Any] = network.no_sync()
        return held
    return nullcontext()
