"""Measure that surgery kept the function: a probe per site, and the outputs of the whole model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.errors import UnusableWeightError, VerificationError
from fxexpand.evaluating import evaluating
from fxexpand.inputs import ExampleInputs, call
from fxexpand.inputs import copy as copy_inputs
from fxexpand.kernel import Kernel, apply, cast
from fxexpand.outputs import tensors_of, worst_error
from fxexpand.recipes import Skip

# Largest relative error of one site that counts as rounding.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}


def tolerance(dtype: torch.dtype, sites: int = 1) -> float:
    """The largest relative error of outputs that counts as rounding.

    Below float64 in proportion to the sites: every layer rounds, and later ones amplify it. A wrong site is
    caught by its own probe first.
    """
    limit = TOLERANCES.get(dtype, 1e-5)
    return limit if dtype == torch.float64 else limit * max(1, sites)


def block_error(block: nn.Module, kernel: Kernel) -> float:
    """Relative error between a block, run in eval mode, and a kernel, on a random probe.

    In float64. The block runs as torch runs it, not by the laws that folded it, so a wrong law is caught.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (1, kernel.in_channels, *_probe_size(kernel))
    probe = torch.randn(shape, generator=generator, dtype=torch.float64).to(kernel.weight.device)
    with evaluating(block):
        return worst_error([_run(block, probe)], [apply(cast(kernel, torch.float64), probe)])


def _run(block: nn.Module, x: Tensor) -> Tensor:
    """What the block computes, in float64; only one layer at a time is held in that precision."""
    if not isinstance(block, nn.Sequential):
        output: Tensor = in_dtype(block, torch.float64)(x)
        return output
    output = x
    for part in block:
        output = _run(part, output)
    return x + output if isinstance(block, Skip) else output


def in_dtype(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The block in another precision: itself where it has it already, else a copy without gradients."""
    tensors = [*block.parameters(), *block.buffers()]
    if all(tensor.dtype == dtype or not tensor.is_floating_point() for tensor in tensors):
        return block
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
        for tensor in block.parameters()
    }
    return copy.deepcopy(block, memo).to(dtype)


def require_finite(weight: Tensor, name: str, kind: str) -> None:
    """Raises: UnusableWeightError: NaN or Inf, of which there are no factors; meta tensors pass."""
    if not weight.is_meta and not bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all()):
        raise UnusableWeightError(
            f"{name} ({kind}): holds NaN or Inf, so it has no factors. "
            "Load a sound checkpoint, or leave it out by select."
        )


def require_small(error: float, dtype: torch.dtype, site: str) -> float:
    """The error itself.

    Raises: VerificationError: above the tolerance of one site.
    """
    limit = tolerance(dtype)
    if not error <= limit:
        raise VerificationError(
            f"{site}: the rewritten site differs by a relative {error:.3g}, above {limit:.3g} for {dtype}. "
            "The model was left as it was. Leave the site out by select, and please report it."
        )
    return error


def _probe_size(kernel: Kernel) -> list[int]:
    """The smallest with two outputs per dimension, so that strides show, and room to pad by reflection."""
    size = []
    for k, d, step, padding in zip(
        kernel.kernel_size, kernel.dilation, kernel.stride, kernel.padding, strict=True
    ):
        span = d * (k - 1) + 1
        if kernel.transposed:
            size.append(2 + max(0, sum(padding) - span) // step)
        else:
            size.append(max(step + span - sum(padding), max(padding) + 1))
    return size


def outputs_of(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """The tensors ``model`` returns in evaluation mode; it is as before afterwards."""
    with evaluating(model):
        return [tensor.detach().clone() for tensor in tensors_of(call(model, copy_inputs(example_inputs)))]


def require_same_outputs(before: list[Tensor], after: list[Tensor], sites: int, what: str) -> float:
    """The relative error of outputs.

    Raises: VerificationError: above the tolerance for that many sites.
    """
    if not before:
        return 0.0
    error = worst_error(after, before)
    limit = max(tolerance(tensor.dtype, sites) for tensor in before)
    if not error <= limit:
        raise VerificationError(
            f"{what}: the outputs changed by a relative {error:.3g}, above {limit:.3g} for {sites} sites. "
            "The model was left as it was. Please report this with the model."
        )
    return error
