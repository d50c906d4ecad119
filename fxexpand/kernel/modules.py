"""The kernel that a module of torch computes, by its exact type, read from the module itself.

A subclass is not read, as it may have a forward of its own. A weight that a parametrisation or a hook
computes is not the stored one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.geometry import Padding
from fxexpand.kernel.library_layers import frozen_norm
from fxexpand.kernel.taps import exchanged


@dataclass(frozen=True)
class Layer:
    """The part of a kernel that the type of a layer settles: spatial dimensions, and the transposed form."""

    rank: int
    transposed: bool = False


UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)

LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(0),
    nn.Conv1d: Layer(1),
    nn.Conv2d: Layer(2),
    nn.Conv3d: Layer(3),
    nn.ConvTranspose1d: Layer(1, transposed=True),
    nn.ConvTranspose2d: Layer(2, transposed=True),
    nn.ConvTranspose3d: Layer(3, transposed=True),
}

NORMS: dict[type[nn.Module], Layer] = {
    nn.BatchNorm1d: Layer(1),
    nn.BatchNorm2d: Layer(2),
    nn.BatchNorm3d: Layer(3),
    nn.SyncBatchNorm: Layer(2),
}


def kernel_of(module: nn.Module, *, rank: int | None = None, dtype: torch.dtype | None = None) -> Kernel:
    """The kernel that ``module`` computes, differentiable with respect to the module's own tensors.

    Args:
        module: a Linear, ConvNd, ConvTransposeNd, or a BatchNormNd in evaluation mode.
        rank: spatial dimensions of a BatchNorm's kernel where the type does not settle it: a BatchNorm1d on
            (batch, channels), after a Linear, is of rank 0.
        dtype: of the kernel, float64 for folds. A BatchNorm's ``γ / sqrt(σ² + ε)`` is computed in this dtype,
            and in float32 at least.

    Raises: InexactError with the reason where the module is not one fixed affine map.
    """
    kind, layer = type(module), _layer_of(module)
    if kind not in LAYERS:
        return _norm(module, layer.rank if rank is None else rank, dtype)
    if rank not in (None, layer.rank):
        raise InexactError(f"a {kind.__name__} has {layer.rank} spatial dimensions, not {rank}.")
    for name in ("weight", "bias"):
        if name not in module._parameters:
            raise InexactError(
                f"its {name} is computed by a hook (weight_norm, spectral_norm, prune). "
                "Remove the hook, or use torch.nn.utils.parametrizations."
            )
    weight, bias = (_usable(name, module._parameters[name], dtype) for name in ("weight", "bias"))
    if weight is None:
        raise InexactError("its weight is None.")
    if isinstance(module, nn.Linear):
        return Kernel(weight, bias)
    assert isinstance(module, nn.modules.conv._ConvNd)
    return Kernel(
        exchanged(weight, module.groups) if layer.transposed else weight,
        bias,
        stride=tuple(module.stride),
        padding=_padding(module, layer),
        dilation=tuple(module.dilation),
        groups=module.groups,
        transposed=layer.transposed,
        padding_mode=module.padding_mode,
    )


def _layer_of(module: nn.Module) -> Layer:
    """The row of the module's type; raises InexactError for a module that may compute something else."""
    kind = type(module)
    layer = LAYERS.get(kind) or NORMS.get(kind) or (Layer(2) if frozen_norm(module) else None)
    stored = (*module._parameters.values(), *module._buffers.values())
    if any(type(tensor) in UNINITIALIZED for tensor in stored):  # not isinstance: torch 2.9 cannot compile it
        raise InexactError("its parameters are not initialised yet. Run the model once first.")
    if layer is None:
        raise InexactError(_type_reason(module))
    if "forward" in module.__dict__:
        raise InexactError(f"this {kind.__name__} has a forward of its own, set on the instance.")
    return layer


def stock_layer(kind: type[nn.Module], module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """A layer of a stock type with the attributes of ``module``, and ``tensors`` as its only parameters."""
    layer: nn.Module = kind.__new__(kind)
    vars(layer).update(vars(module))
    vars(layer).update(_parameters=tensors, _modules={})
    return layer


def describe(module: nn.Module) -> str:
    """A module in a few words, for messages: "Conv2d 64->64 k3 p1", "Conv2d 3->8 k3x1 s2 p1x0 g4"."""
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features}->{module.out_features}"
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return f"{name} {module.num_features}"
    if isinstance(module, nn.Embedding):
        return f"{name} {module.num_embeddings}x{module.embedding_dim}"
    if not isinstance(module, nn.modules.conv._ConvNd):
        return name
    words = [name, f"{module.in_channels}->{module.out_channels}", f"k{_sizes(module.kernel_size)}"]
    words += [f"s{_sizes(module.stride)}"] if any(s != 1 for s in module.stride) else []
    if isinstance(module.padding, str):
        words.append(f"p={module.padding}")
    elif any(module.padding):
        words.append(f"p{_sizes(module.padding)}")
    words += [f"op{_sizes(module.output_padding)}"] if any(module.output_padding) else []
    words += [f"g{module.groups}"] if module.groups != 1 else []
    words += [f"d{_sizes(module.dilation)}"] if any(d != 1 for d in module.dilation) else []
    words += [module.padding_mode] if module.padding_mode != "zeros" else []
    return " ".join(words)


def same_padding(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> Padding:
    """``padding="same"`` as torch splits it: an odd total has its larger part after the input."""
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def _padding(module: nn.modules.conv._ConvNd, layer: Layer) -> Padding:
    if layer.transposed:
        assert not isinstance(module.padding, str)
        return tuple((p, p - extra) for p, extra in zip(module.padding, module.output_padding, strict=True))
    if isinstance(module.padding, str):
        same = module.padding == "same"
        return same_padding(module.kernel_size, module.dilation) if same else ((0, 0),) * layer.rank
    return tuple((p, p) for p in module.padding)


def _norm(module: nn.Module, rank: int, dtype: torch.dtype | None) -> Kernel:
    norm: Any = module
    mean, variance, gamma, beta = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if mean is None or variance is None:
        raise InexactError(
            "a BatchNorm without running statistics uses those of the batch, in evaluation mode too."
        )
    if module.training and not frozen_norm(module):
        raise InexactError(
            "a BatchNorm in training mode uses the statistics of the batch. Call eval() first."
        )
    given = [tensor.dtype for tensor in (mean, variance, gamma, beta) if tensor is not None]
    result = given[0] if dtype is None else dtype
    for other in given[1:] if dtype is None else ():
        result = torch.promote_types(result, other)
    return norm_kernel(mean, variance, gamma, beta, norm.eps, rank, result)


def norm_kernel(
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rank: int,
    dtype: torch.dtype,
) -> Kernel:
    """BatchNorm with running statistics: ``γ / sqrt(σ² + ε)`` and ``β − μ γ / sqrt(σ² + ε)``, per channel."""
    wide = torch.promote_types(dtype, torch.float32)
    factor = (variance.to(wide) + eps).rsqrt()
    if gamma is not None:
        factor = factor * gamma.to(wide)
    shift = -mean.to(wide) * factor
    if beta is not None:
        shift = shift + beta.to(wide)
    weight = factor.to(dtype).reshape(-1, 1, *(1,) * rank)
    return Kernel(weight, shift.to(dtype), groups=mean.shape[0])


def convolution(name: str, weight: Tensor, bias: Tensor | None, options: Mapping[str, Any]) -> Kernel:
    """The kernel of a call of ``torch.nn.functional.conv2d``, or of another convolution by its ``name``.

    Raises: InexactError: an argument is not known before the graph runs.
    """
    rank, transposed = int(name[-2]), "transpose" in name

    def sizes(key: str, default: int) -> tuple[int, ...]:
        value = options.get(key, default)
        if isinstance(value, int):
            return (value,) * rank
        if not (isinstance(value, list | tuple) and all(isinstance(each, int) for each in value)):
            raise InexactError(f"its {key} is computed by the graph.")
        return tuple(value) * (rank if len(value) == 1 else 1)

    groups, stride, dilation = options.get("groups", 1), sizes("stride", 1), sizes("dilation", 1)
    if not isinstance(groups, int):
        raise InexactError("its groups are computed by the graph.")
    padding: Padding
    if transposed:
        extra = sizes("output_padding", 0)
        padding = tuple((p, p - e) for p, e in zip(sizes("padding", 0), extra, strict=True))
        weight = exchanged(weight, groups)
    elif isinstance(options.get("padding"), str):
        same = same_padding(tuple(weight.shape[2:]), dilation)
        padding = same if options["padding"] == "same" else ((0, 0),) * rank
    else:
        padding = tuple((p, p) for p in sizes("padding", 0))
    return Kernel(weight, bias, stride, padding, dilation, groups, transposed)


def _usable(name: str, tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        form = "sparse" if tensor.layout != torch.strided else str(tensor.dtype).removeprefix("torch.")
        raise InexactError(f"its {name} is {form}; kernels are dense and floating-point.")
    return tensor if dtype is None else tensor.to(dtype)


def _type_reason(module: nn.Module) -> str:
    name = type(module).__name__
    if nn.utils.parametrize.is_parametrized(module):
        return (
            f"its parameters are computed by torch.nn.utils.parametrize ({name}). "
            "Remove the parametrisation to fold it."
        )
    for parent in (*LAYERS, *NORMS):
        if isinstance(module, parent):
            return f"{name} is a subclass of {parent.__name__} and may have a forward of its own."
    return f"{name} is not a known affine map."


def _sizes(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
