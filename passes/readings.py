"""How a weight is read as a kernel: by the class of the module that holds it, else by its use."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from fxexpand.kernel.algebra import FLOATING
from fxexpand.layers.parametrized import View
from fxexpand.passes.uses import Use

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "LSTMCell": 4, "GRUCell": 3, "RNNCell": 1}


def used_view(shape: torch.Size, use: Use) -> View:
    """How an operator reads a weight of this shape."""
    if use.kind == "conv" and len(shape) >= 3:
        return View(shape, kind="conv")
    if use.kind == "conv_transpose" and len(shape) >= 3:
        return View(shape, kind="flat")
    return View(shape, transposed=use.transposed)


def layer_view(module: Any, attribute: str, weight: Tensor) -> View:
    """How a Linear or convolution reads its weight."""
    if isinstance(module, _ConvTransposeNd):
        return View(weight.shape, kind="conv_transpose", groups=module.groups)
    if isinstance(module, _ConvNd):
        return View(weight.shape, kind="conv", groups=module.groups)
    return View(weight.shape)


def _embedding_view(module: Any, attribute: str, weight: Tensor) -> View | str:
    if module.sparse:
        return "sparse gradients do not pass through a product. Use sparse=False"
    if module.max_norm is not None:
        return "max_norm rewrites the rows it reads, which a product does not allow"
    padding = module.padding_idx
    if padding is not None and not weight.is_meta and bool(weight[padding].any()):
        return "the row of padding_idx is not zero; training the factors would move it"
    # A token picks a row, so the table is the weight (out, in) = (dimension, tokens), stored transposed.
    return View(weight.shape, transposed=True)


def _attention_view(module: Any, attribute: str, weight: Tensor) -> View:
    return View(weight.shape, blocks=3 if attribute == "in_proj_weight" else 1)


def _recurrent_view(module: Any, attribute: str, weight: Tensor) -> View:
    kind = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in GATES), "RNN")
    return View(weight.shape, blocks=1 if attribute.startswith("weight_hr") else GATES[kind])


def _bilinear_view(module: Any, attribute: str, weight: Tensor) -> View:
    return View(weight.shape, kind="flat")


# How modules of these classes read the parameters of these names as kernels, or why they are refused.
Reading: TypeAlias = Callable[[Any, str, Tensor], "View | str"]
READINGS: tuple[tuple[tuple[type[nn.Module], ...], str, Reading], ...] = (
    ((nn.Linear, _ConvNd), "weight", layer_view),
    ((nn.Embedding, nn.EmbeddingBag), "weight", _embedding_view),
    ((nn.MultiheadAttention,), "*proj_weight", _attention_view),
    ((nn.RNNBase, nn.RNNCellBase), "weight*", _recurrent_view),
    ((nn.Bilinear,), "weight", _bilinear_view),
)


def unfit(parameter: Tensor) -> str | None:
    """Why no parameter like this can be factored."""
    if is_lazy(parameter):
        return "not initialised yet (lazy). Run the model once first"
    if parameter.layout != torch.strided:
        return f"a sparse tensor ({parameter.layout}) has no dense factors. Call to_dense() first"
    if parameter.is_complex():
        return "complex weights are not supported"
    if parameter.dtype not in FLOATING:
        return f"{parameter.dtype} weights cannot be trained. Expand before quantising"
    if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
        return f"a {type(parameter).__name__} has its own arithmetic. Expand before wrapping or quantising"
    if 0 in parameter.shape:
        return "the weight is empty"
    return None


def view_by_class(module: nn.Module, attribute: str, weight: Tensor) -> View | str | None:
    """How the module reads the weight, or why it is refused; None where its class does not tell."""
    for classes, pattern, reading in READINGS:
        if isinstance(module, classes) and fnmatchcase(attribute, pattern):
            return reading(module, attribute, weight)
    return None
