"""Sharded models and tensors; torch.distributed is loaded only if something is sharded."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def sharded_part(model: nn.Module) -> str | None:
    """The path of the first module that ``fully_shard`` was called on; None if there is none."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not loaded: nothing is sharded
    if fsdp is None:
        return None
    for path, module in model.named_modules():
        if isinstance(module, fsdp.FSDPModule):
            return path or type(module).__name__
    return None


def is_sharded(value: object) -> bool:
    """Whether a tensor is one of ``torch.distributed.tensor``, with a part in each process."""
    return hasattr(type(value), "full_tensor")


def placed_as(value: Tensor, target: Tensor) -> Tensor:
    """``value`` with the placement of ``target``: for a sharded target, the values of process 0 in shards."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, target.placements)  # type: ignore[attr-defined]
