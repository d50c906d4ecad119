"""Count the operators of one forward pass by kind, in the same way whoever wrote the model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs

# Operators of ATen by kind: what a fold removes.
KINDS = {
    "conv": (
        *("convolution", "conv1d", "conv2d", "conv3d"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    ),
    "linear": ("linear", "addmm", "mm", "addmv", "mv"),
    "norm": ("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"),
    "add": ("add", "add_", "sub", "sub_", "rsub"),
    "mul": ("mul", "mul_", "div", "div_", "neg", "neg_"),
    "pool": ("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    "pad": ("pad", "constant_pad_nd"),
    "cat": ("cat", "concat", "stack"),
}
_KIND = {name: kind for kind, names in KINDS.items() for name in names}


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators; those that are made of others and of no kind by what they are made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = _KIND.get(func.overloadpacket.__name__)
        if kind is not None:
            self.counts[kind] += 1
        else:
            with self:
                made_of = func.decompose(*args, **kwargs or {})
            if made_of is not NotImplemented:
                return made_of
        return func(*args, **kwargs or {})


def operators(model: nn.Module, inputs: ExampleInputs) -> dict[str, int]:
    """The number of operators of each kind that a forward pass executes, for any model.

    In inference mode, where ATen hands composite operators over whole: a Linear is one operator, on an input
    of any rank and layout, with a bias or without.
    """
    with torch.inference_mode(), _Counting() as counting:
        call(model, copy_inputs(inputs))
    return {kind: counting.counts[kind] for kind in KINDS}
