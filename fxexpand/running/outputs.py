"""The outputs of a model, in any structure, and their error against those of another model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxexpand.errors import VerificationError
from fxexpand.running.evaluation import evaluating, undisturbed
from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs

ROUNDINGS = 1000  # units in the last place between two runs of the same operations in the same order
SEED = 0  # of the numbers that a model draws in evaluation mode


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in an output, in order, through tuples, lists, dicts, registered classes, dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                found.extend(tensors_of(getattr(leaf, field.name)))
    return found


def outputs_of(model: nn.Module, example_inputs: ExampleInputs, as_it_is: bool = False) -> list[Tensor]:
    """The tensors that ``model`` returns in evaluation mode; the model is as before afterwards.

    Args:
        as_it_is: keep the mode that the model is in.

    The model draws the same random numbers in each call, and the random state of the caller is kept.
    """
    modes = [
        (module, module.training) for module in model.modules() if as_it_is and hasattr(module, "training")
    ]
    with undisturbed(model), evaluating(model):
        for module, training in modes:
            module.training = training
        seed(model)
        return [tensor.detach().clone() for tensor in tensors_of(call(model, copy_inputs(example_inputs)))]


def seed(model: nn.Module) -> None:
    """Set the random state of ``outputs_of`` for ``model``; ``evaluating`` restores the caller's state."""
    cuda = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    # Not torch.manual_seed, which would reset the generators of all GPUs too.
    for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)):
        generator.manual_seed(SEED)


def agree(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two runs of the same operations returned the same values up to rounding."""
    if all(tensor.is_meta for tensor in expected):
        return True
    eps = max((torch.finfo(t.dtype).eps for t in expected if t.is_floating_point()), default=0.0)
    try:
        return worst_error(actual, expected, undefined=0.0) <= min(ROUNDINGS * eps, 0.1)
    except VerificationError:  # the shapes differ
        return False


def worst_error(actual: list[Tensor], expected: list[Tensor], undefined: float = float("inf")) -> float:
    """The largest ``max|a - b| / max|b|`` over pairs of tensors, in float64.

    A NaN or Inf of ``expected`` (a masked score) must be in the same place of ``actual``, and the other
    values are compared; a new or a missing one gives inf, and NaN everywhere, in both, ``undefined``. A
    difference below the smallest normal number of the precision of the computation counts as zero.

    Raises: VerificationError when the number of tensors or a shape differs, or there is nothing to compare.
    """
    if not expected or len(actual) != len(expected):
        raise VerificationError(f"outputs hold {len(actual)} and {len(expected)} tensors: cannot compare.")
    return max(_relative_error(a, b, undefined) for a, b in zip(actual, expected, strict=True))


def _relative_error(actual: Tensor, expected: Tensor, undefined: float) -> float:
    if actual.shape != expected.shape:
        raise VerificationError(f"output shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}.")
    if expected.is_meta:  # nothing but shapes to compare
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = (tensor.detach().cpu().to(wide) for tensor in (actual, expected))
    finite = torch.isfinite(b)
    if not bool(finite.all()):
        kept = (a == b) | (a.isnan() & b.isnan())
        if not bool(kept[~finite].all()):
            return float("inf")
        if bool(b.isnan().any()) and not bool(finite.any()):
            return undefined
        a, b = a[finite], b[finite]
    if torch.equal(a, b):
        return 0.0
    scale, difference = float(b.abs().max()), float((a - b).abs().max())
    # Below the smallest normal number kernels may round to zero; half precision is computed in float32.
    double = expected.dtype in (torch.float64, torch.complex128)
    if difference < torch.finfo(torch.float64 if double else torch.float32).tiny:
        return 0.0
    return difference / scale if scale and bool(torch.isfinite(a).all()) else float("inf")
