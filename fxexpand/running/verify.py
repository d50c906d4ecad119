"""Measure the error of surgery: on a probe per site, and on the outputs of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fxexpand.errors import InexactError, VerificationError
from fxexpand.kernel.algebra import Kernel, apply, cast
from fxexpand.kernel.modules import LAYERS
from fxexpand.recipes import Skip
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.outputs import outputs_of, worst_error

PIECE = 2**20  # largest number of elements of a weight in float64 at a time: 8 MiB
# Largest relative error of one site that counts as rounding.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}


def tolerance(dtype: torch.dtype, sites: int = 1) -> float:
    """The largest relative error of outputs that counts as rounding.

    Below float64 it grows in proportion to the number of sites: every layer rounds, and later ones amplify
    the error. The probe of a site catches a wrong fold first.
    """
    limit = TOLERANCES.get(dtype, 1e-5)
    return limit if dtype == torch.float64 else limit * max(1, sites)


class Scratch:
    """Memory for the float64 copies of the weights of one site, used again for the next site.

    Fresh memory comes page by page from the system, which takes five times as long as the conversion itself.
    A call overwrites the copies of the previous one.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in float64, with their shapes and memory formats."""
        count = sum(tensor.numel() for tensor in tensors)
        memory, device = self._memory, tensors[0].device if tensors else None
        if memory is None or memory.numel() < count or memory.device != device:
            memory = self._memory = torch.empty(count, dtype=torch.float64, device=device)
        places = torch.split(memory[:count], [tensor.numel() for tensor in tensors])
        return [_like(place, tensor).copy_(tensor) for place, tensor in zip(places, tensors, strict=True)]


def _like(memory: Tensor, tensor: Tensor) -> Tensor:
    """Flat memory in the shape of ``tensor``, and with its strides if these leave no gaps and no overlaps."""
    strides = torch.empty_like(tensor, device="meta").stride()
    return memory.as_strided(tensor.shape, strides, memory.storage_offset())


def block_error(block: nn.Module, kernel: Kernel, scratch: Scratch | None = None) -> float:
    """Relative error in float64 between a block in evaluation mode and a kernel, on a random probe.

    Torch runs the block, without the laws that folded it, so a wrong law is caught.

    Args:
        scratch: memory for the copies in float64; it must not hold the weights of ``block`` themselves.
    """
    scratch = scratch or Scratch()
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (1, kernel.in_channels, *probe_size(kernel))
    probe = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(
        kernel.weight.device
    )
    with evaluating(block):
        # Half of the layer at most, as its factors are larger, so that small networks cost little.
        piece = min(PIECE, kernel.weight.numel() // 2)
        return worst_error([_run(block, probe, scratch, piece)], [_applied(kernel, probe, piece)])


def fold_error(before: nn.Module, after: nn.Module, kernel: Kernel, shape: Sequence[int]) -> float | None:
    """Relative error in float64 between two graphs of one input in evaluation mode, on a random probe.

    None where ``before`` itself cannot take the probe, whose size is a guess: a view between the layers may
    need another one.

    Args:
        kernel: the kernel that ``after`` applies; it gives the device.
        shape: shape of the probe.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    probe = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu").to(
        kernel.weight.device
    )
    with evaluating(before), evaluating(after), torch.no_grad():
        try:
            expected = in_float64(before, Scratch())(probe.clone())  # the graph may write into it
        except RuntimeError as error:
            if "shape" in str(error) or "size" in str(error):
                return None
            raise
        return worst_error([in_float64(after, Scratch())(probe)], [expected])


def _run(block: nn.Module, x: Tensor, scratch: Scratch, piece: int) -> Tensor:
    """The output of the block in float64, with ``piece`` elements of a layer at a time in that precision."""
    if not isinstance(block, nn.Sequential):
        outputs = [in_float64(part, scratch)(x) for part in _parts(block, piece)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    output = x
    for part in block:
        output = _run(part, output, scratch, piece)
    return x + output if isinstance(block, Skip) else output


def _parts(layer: nn.Module, piece: int) -> Iterator[nn.Module]:
    """Layers that each compute some output channels of ``layer``, or the layer itself if it has no parts."""
    weight = layer._parameters.get("weight")
    kind = LAYERS.get(type(layer))
    if kind is None or kind.transposed or weight is None or getattr(layer, "groups", 1) != 1:
        yield layer
        return
    for rows in _rows(weight, piece):
        part = copy.copy(layer)
        part.__dict__["_parameters"] = {
            name: tensor if tensor is None else nn.Parameter(tensor.detach()[rows], requires_grad=False)
            for name, tensor in layer._parameters.items()
        }
        yield part


def _applied(kernel: Kernel, x: Tensor, piece: int) -> Tensor:
    """The output of the kernel in float64, in parts as in ``_run``."""
    if kernel.transposed or kernel.groups != 1:
        return apply(cast(kernel, torch.float64), x)
    outputs = []
    for rows in _rows(kernel.weight, piece):
        bias = None if kernel.bias is None else kernel.bias[rows]
        outputs.append(apply(cast(replace(kernel, weight=kernel.weight[rows], bias=bias), torch.float64), x))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _rows(weight: Tensor, piece: int) -> list[slice]:
    """Slices of output channels, each of one channel or of at most ``piece`` elements of ``weight``."""
    step = max(1, len(weight) * piece // max(1, weight.numel()))
    return [slice(i, i + step) for i in range(0, len(weight), step)] or [slice(0, 0)]


def in_float64(block: nn.Module, scratch: Scratch) -> nn.Module:
    """The block itself if it is in float64, else a copy in float64 without gradients, in ``scratch``."""
    tensors = [*block.parameters(), *block.buffers()]
    narrow = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dtype != torch.float64]
    if not narrow:
        return block
    if any(parametrize.is_parametrized(module) for module in block.modules()):
        return copy.deepcopy(block).double()  # shallow copies of these are forbidden
    wide = scratch.copies([tensor.detach() for tensor in narrow])
    return _with_tensors(block, {id(old): new for old, new in zip(narrow, wide, strict=True)})


def _with_tensors(block: nn.Module, replaced: dict[int, Tensor]) -> nn.Module:
    """A copy of the modules with replaced tensors; a deep copy of all attributes would take too long."""
    new = copy.copy(block)
    old = block.__dict__
    new.__dict__ |= {
        "_parameters": {
            name: tensor
            if tensor is None
            else nn.Parameter(replaced.get(id(tensor), tensor.detach()), requires_grad=False)
            for name, tensor in old["_parameters"].items()
        },
        "_buffers": {name: replaced.get(id(tensor), tensor) for name, tensor in old["_buffers"].items()},
        "_modules": {
            name: module and _with_tensors(module, replaced) for name, module in old["_modules"].items()
        },
    }
    return new


def require_small(
    error: float, dtype: torch.dtype, site: str, unrounded: Callable[[], float | None] = lambda: None
) -> float:
    """``error``, if it is within the tolerance of one site.

    Args:
        unrounded: measures the error of the same change in float64.

    Raises:
        InexactError: the error is above the tolerance, and comes from rounding to ``dtype`` alone.
        VerificationError: the error is above the tolerance, in float64 too.
    """
    limit = tolerance(dtype)
    if error <= limit:
        return error
    exact = None if dtype == torch.float64 else unrounded()
    if exact is not None and exact <= tolerance(torch.float64):
        raise InexactError(
            f"rounding to {dtype} would change it by a relative {error:.3g}, above {limit:.3g}. Change the "
            "model in float32, then convert it"
        )
    raise VerificationError(
        f"{site}: the rewritten site differs by a relative {error:.3g}, above {limit:.3g} for {dtype}. "
        "The model was left as it was. Please report it."
    )


def probe_size(kernel: Kernel) -> list[int]:
    """The smallest input size with two outputs per dimension, to show strides, and room for reflection."""
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


def require_same_outputs(
    before: list[Tensor],
    model: nn.Module,
    example_inputs: ExampleInputs,
    sites: int,
    what: str,
    as_it_is: bool = False,
) -> float:
    """The relative error of the outputs of ``model`` against those of the model it was made from.

    Args:
        what: name of the pass, for messages.
        as_it_is: run the model in the mode that it is in, not in evaluation mode.

    Raises: VerificationError: the error is above the tolerance for that many sites.
    """
    if not before:
        return 0.0
    error = worst_error(outputs_of(model, example_inputs, as_it_is), before)
    # The weights may have a lower precision than the outputs.
    dtypes = {tensor.dtype for tensor in (*before, *model.parameters()) if tensor.is_floating_point()}
    limit = max((tolerance(dtype, sites) for dtype in dtypes), default=tolerance(before[0].dtype))
    if not error <= limit:
        limit = max([limit, *(tolerance(dtype, sites) for dtype in rounded_to(model, example_inputs))])
    if not error <= limit and any(bool(tensor.isnan().any()) for tensor in before):
        raise VerificationError(
            f"{what}: the model returned NaN for the example inputs before anything was changed, so nothing "
            "can be compared. The model was left as it was. Give other inputs, or none."
        )
    if not error <= limit:
        raise VerificationError(
            f"{what}: the outputs changed by a relative {error:.3g}, above {limit:.3g} for {sites} sites. "
            "The model was left as it was. Please report this with the model."
        )
    return error


def rounded_to(model: nn.Module, example_inputs: ExampleInputs) -> set[torch.dtype]:
    """The lower precisions that a model rounds to on the way, as autocast does, or a norm in float32.

    Rounding may turn a difference in the last bit of a wider number into one of the lower precision.
    """
    narrowing = _Narrowing()
    with narrowing:
        outputs_of(model, example_inputs)
    return narrowing.found


class _Narrowing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor) and out.dtype in TOLERANCES:
            given = [TOLERANCES.get(each.dtype, 1.0) for each in args if isinstance(each, Tensor)]
            if any(finer < TOLERANCES[out.dtype] for finer in given):
                self.found.add(out.dtype)
        return out
