"""Make a deep network short: of many blocks that are alike, a few tell the same."""

from __future__ import annotations

from itertools import groupby
from string import digits
from typing import Any

from torch import nn


def shorten(model: nn.Module, keep: int) -> tuple[int, int]:
    """Cut every run of equal blocks in a ``Sequential`` or ``ModuleList`` down to ``keep``, in place.

    Blocks are equal when their classes and the names and shapes of all that they hold are. Modules without
    tensors are no blocks. Returns the numbers of blocks kept and of all blocks in the runs that were cut.
    """
    kept = total = 0
    for module in list(model.modules()):
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        names = list(module._modules)
        if len({name.rstrip(digits) for name in names}) > 1:
            continue  # names that mean something; those of torchvision's blocks only count them
        blocks: list[nn.Module] = []
        for key, run in groupby(module, _key):
            equal = list(run)
            blocks += equal[:keep] if key[1] else equal
            if key[1] and len(equal) > keep:
                kept, total = kept + keep, total + len(equal)
        module._modules.clear()
        module._modules.update(zip(names, blocks, strict=False))
    return kept, total


def _key(module: nn.Module) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in module.state_dict().items())
    return tuple(type(part) for part in module.modules()), shapes
