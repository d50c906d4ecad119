"""Which dimensions of the inputs an exported program leaves free, and larger inputs to prove it with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxexpand.errors import SelectionError
from fxexpand.running.inputs import ExampleInputs, as_call, batch_size, mapped, tensors

# Names of the dimensions after batch and channels, by the number of all dimensions.
SPATIAL = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
# By how much an input grows to prove that its size is free: most networks ask for multiples of 32.
STEP = 32


def free_sizes(
    model: nn.Module, example_inputs: ExampleInputs, *, batch: bool, spatial: bool
) -> tuple[dict[str, Any] | None, list[dict[int, str]]]:
    """For each parameter of ``forward`` its free dimensions, as ``torch.export`` takes them; None where no
    dimension is left free. And their names by axis, for each tensor of the inputs in their order: torch.onnx
    gives names by itself, but only where all arguments are tensors.

    Dimension 0 is "batch" in each tensor where it is as long as in the first; the spatial ones are those from
    2 on of floating-point tensors with 3 to 5 dimensions. Dimensions of one name and one length are one.

    Raises: SelectionError: no tensor has a dimension of the kind.
    """
    if not batch and not spatial:
        return None, []
    rows = batch_size(example_inputs)
    if batch and not rows:
        raise SelectionError("example_inputs: no tensor with a batch dimension. Use dynamic_batch=False.")
    known: dict[tuple[str, int], Any] = {}
    names: dict[int, dict[int, str]] = {}  # by the id of the tensor

    def dimension(name: str, length: int) -> Any:
        alike = sum(other == name for other, _ in known)
        return known.setdefault(
            (name, length), torch.export.Dim(f"{name}_{alike + 1}" if alike else name, min=1)
        )

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return None
        free = {0: dimension("batch", leaf.shape[0])} if batch and leaf.shape[0] == rows else {}
        if spatial:
            for i, name in _spatial(leaf):
                free[i] = dimension(name, leaf.shape[i])
        names[id(leaf)] = {i: each.__name__ for i, each in free.items()}
        return free or None

    args, kwargs = as_call(example_inputs)
    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = {name: tree_map(shape, value) for name, value in arguments.items()}
    if spatial and not any(name != "batch" for name, _ in known):
        raise SelectionError("example_inputs: no tensor with spatial dimensions. Use dynamic_spatial=False.")
    return shapes, [names.get(id(tensor), {}) for tensor in tensors(example_inputs)]


def larger(example_inputs: ExampleInputs) -> ExampleInputs:
    """The same inputs, ``STEP`` longer in every spatial dimension: their values are repeated."""

    def grown(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            for i, _ in _spatial(leaf):
                length = leaf.shape[i]
                leaf = leaf.index_select(i, torch.arange(length + STEP, device=leaf.device) % length)
        return leaf

    return mapped(grown, example_inputs)


def _spatial(tensor: Tensor) -> list[tuple[int, str]]:
    names = SPATIAL.get(tensor.ndim, ()) if tensor.is_floating_point() else ()
    return list(enumerate(names, start=2))
