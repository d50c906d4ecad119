"""Example inputs: their forms, and how a model is called with them.

Everywhere in fxexpand ``example_inputs`` is a tensor (the only argument), a tuple (the positional arguments)
or a mapping (the keyword arguments). Arguments may be nested; only tensors are moved or copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxexpand.errors import SelectionError

ExampleInputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]


def as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` for ``model(*args, **kwargs)``.

    Raises: SelectionError for anything but a tensor, a tuple or a mapping with string keys.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        if not all(isinstance(key, str) for key in example_inputs):
            raise SelectionError(
                "example_inputs: the keys of a mapping are keywords, so they must be strings."
            )
        return (), dict(example_inputs)
    raise SelectionError(
        f"example_inputs: got {type(example_inputs).__name__}; give a tensor, a tuple of positional "
        "arguments or a dict of keyword arguments. A model whose one argument is a list takes ([...],)."
    )


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """The output of ``model`` for ``example_inputs``."""
    args, kwargs = as_call(example_inputs)
    return model(*args, **kwargs)


def tensors(example_inputs: ExampleInputs) -> list[Tensor]:
    """The tensors among the arguments, in the order of the arguments."""
    return [leaf for leaf in tree_leaves(as_call(example_inputs)) if isinstance(leaf, Tensor)]


def batch_size(example_inputs: ExampleInputs) -> int | None:
    """The length of the first tensor argument's first dimension; None when no argument has one."""
    return next((int(tensor.shape[0]) for tensor in tensors(example_inputs) if tensor.ndim > 0), None)


def move(
    example_inputs: ExampleInputs,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ExampleInputs:
    """The same arguments on ``device``; ``dtype`` applies to floating-point tensors only."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    return mapped(moved, example_inputs)


def copy(example_inputs: ExampleInputs) -> ExampleInputs:
    """The same arguments with every tensor cloned, for a model that may write to its inputs."""
    return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example_inputs)


def resize_batch(example_inputs: ExampleInputs, size: int) -> ExampleInputs:
    """The same arguments with ``size`` rows: rows repeat, each repetition of floating-point rows scaled anew.

    A tensor is batched if its first dimension has the length of the first tensor's. Scaling (by 0.9, 0.8,
    ...) makes the rows differ, so that a model which confuses rows is caught.

    Raises: SelectionError: no tensor has a batch dimension.
    """
    batch = batch_size(example_inputs)
    if batch is None or batch == 0:
        raise SelectionError("example_inputs: no tensor with a batch dimension. Use dynamic_batch=False.")

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != batch:
            return leaf
        repeats = -(-size // batch)
        floating = leaf.is_floating_point()
        copies = [leaf * (1.0 - 0.1 * (i % 5)) if floating and i else leaf for i in range(repeats)]
        return torch.cat(copies)[:size]

    return mapped(resized, example_inputs)


def mapped(function: Any, example_inputs: ExampleInputs) -> ExampleInputs:
    """The same arguments with ``function`` applied to every leaf."""
    as_call(example_inputs)  # the same errors wherever inputs are taken
    if isinstance(example_inputs, Mapping):
        return {key: tree_map(function, value) for key, value in example_inputs.items()}
    if isinstance(example_inputs, tuple):  # a NamedTuple of arguments becomes a plain tuple
        return tuple(tree_map(function, value) for value in example_inputs)
    result: Tensor = function(example_inputs)
    return result
