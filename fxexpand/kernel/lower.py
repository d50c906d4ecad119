"""The stock module that computes a kernel, and the memory format of its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel, native_weight, regroup
from fxexpand.kernel.geometry import output_padding
from fxexpand.kernel.modules import LAYERS, Layer, same_padding

_TYPES: dict[Layer, type[nn.Module]] = {layer: kind for kind, layer in LAYERS.items()}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def to_module(kernel: Kernel, *, copy: bool = True) -> nn.Module:
    """The nn.Linear, ConvNd or ConvTransposeNd with the kernel's numbers.

    The parameters are outside any graph, with the kernel's dtype, device (meta too), memory format and
    ``requires_grad``; no random number is drawn. A Linear has no groups, so zeros are filled in.

    Args:
        copy: give the module memory of its own; False gives it the tensors of a kernel without another owner.

    Raises: InexactError with the reason where no stock layer has the kernel's padding.
    """
    if kernel.rank == 0:
        kernel = regroup(kernel, 1)
    kind = _TYPES.get(Layer(kernel.rank, kernel.transposed))
    if kind is None:
        raise InexactError(f"torch has no layer of {kernel.rank} spatial dimensions.")
    options: dict[str, object] = {
        "bias": kernel.bias is not None,
        "device": "meta",
        "dtype": kernel.weight.dtype,
    }
    if kernel.rank:
        options |= {name: getattr(kernel, name) for name in ("kernel_size", "stride", "dilation", "groups")}
        options |= _crop(kernel) if kernel.transposed else _padding(kernel)
    module = kind(kernel.in_channels, kernel.out_channels, **options)
    module.weight = _parameter(native_weight(kernel), kernel.weight.requires_grad, copy)
    if kernel.bias is not None:
        module.bias = _parameter(kernel.bias, kernel.bias.requires_grad, copy)
    return module


def laid_out_as(weight: Tensor, like: Tensor) -> Tensor:
    """``weight`` in the memory format of ``like``: channels-last if ``like`` is, else contiguous.

    The strides decide, as they do for torch's convolutions: a weight of one tap or of one channel per group,
    which is contiguous in both formats, keeps its format too.
    """
    if weight.ndim == like.ndim and weight.ndim in _CHANNELS_LAST:
        last = is_channels_last(like)
        if is_channels_last(weight) == last and (last or weight.is_contiguous()):
            return weight
        # contiguous() alone would leave the strides of a dimension of length one.
        return weight.contiguous().to(
            memory_format=_CHANNELS_LAST[weight.ndim] if last else torch.contiguous_format
        )
    return weight.contiguous()


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the dimension of the channels, the second, is the innermost in memory."""
    if tensor.ndim < 3 or tensor.stride(1) != 1:
        return False
    shape, strides = tensor.shape, tensor.stride()
    step = shape[1]
    for dim in (*range(tensor.ndim - 1, 1, -1), 0):
        if strides[dim] != step and shape[dim] != 1:
            return False
        step *= shape[dim]
    # A tensor of one channel or one position is contiguous in both formats: its strides tell which is meant.
    return not tensor.is_contiguous() or (strides[-1] == shape[1] and step > shape[0])


def _padding(kernel: Kernel) -> dict[str, object]:
    """The padding arguments of a plain convolution."""
    padding, mode = kernel.padding, kernel.geometry.mode or "zeros"
    if any(side < 0 for pair in padding for side in pair):
        raise InexactError(f"its padding {padding} crops the input, which no stock convolution does.")
    if all(before == after for before, after in padding):
        return {"padding": tuple(before for before, _ in padding), "padding_mode": mode}
    if padding == same_padding(kernel.kernel_size, kernel.dilation) and all(s == 1 for s in kernel.stride):
        return {"padding": "same", "padding_mode": mode}
    raise InexactError(
        f"its padding {padding} differs before and after the input, and no stock convolution pads so "
        '(padding="same" needs stride 1 and the split of torch).'
    )


def _crop(kernel: Kernel) -> dict[str, object]:
    """The padding arguments of a transposed convolution."""
    extra = output_padding(kernel.geometry)
    if extra is None:
        raise InexactError(
            f"it crops {kernel.padding} rows before and after, which no padding and output_padding of a "
            "stock transposed convolution do."
        )
    return {"padding": tuple(before for before, _ in kernel.padding), "output_padding": extra}


def _parameter(tensor: Tensor, requires_grad: bool, copy: bool) -> nn.Parameter:
    laid_out = laid_out_as(tensor.detach(), tensor)
    if copy and laid_out.data_ptr() == tensor.data_ptr():
        laid_out = laid_out.clone()
    return nn.Parameter(laid_out, requires_grad=requires_grad)
