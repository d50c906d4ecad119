"""Rows of layers: linear maps with a weight, norms, pools and borders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.modules import convolution, norm_kernel
from fxexpand.passes.affine.maps import Map, Place
from fxexpand.passes.affine.steps import Affine, MultiOutput, Step
from fxexpand.passes.operators.sizes import Shape, Size, one_per_dimension
from fxexpand.passes.operators.table import Call, Values, Weight, row

WEIGHT = (Weight("weight", always=True),)


# Products with a weight ---------------------------------------------------------------------------


def _constant(values: Values, *given: Any) -> bool:
    return all(each is None or each in values.constants for each in given)


def _layer(call: Call, values: Values, matrix: bool, transposed: bool = False) -> Step | None:
    """``y = W x + b`` for a constant weight.

    Args:
        matrix: the weight is one of two dimensions.
        transposed: it is stored as ``(in, out)``.
    """
    x, weight, bias = call["input"], call.get("other" if transposed else "weight"), call.get("bias")
    constants = values.constants
    if weight is None or not _constant(values, weight, bias) or not constants.dtype(weight).is_floating_point:
        return None
    given = [each for each in (weight, bias) if each is not None]
    shapes = [constants.shape(each) for each in given]
    if (matrix and len(shapes[0]) != 2) or any(size != 1 for shape in shapes[1:] for size in shape[:-1]):
        return None  # a stack of matrices, or another bias for each row
    if not all(map(constants.wide, given)):
        raise InexactError("its weight is cast to another dtype on the way, and float64 would not show.")

    def build(numbers: Tensor, offset: Tensor | None = None) -> Kernel:
        if not matrix:
            return convolution(call.name, numbers, offset, call.arguments)
        numbers = numbers.t() if transposed else numbers
        return Kernel(numbers, None if offset is None else offset.reshape(-1).expand(len(numbers)))

    shape = build(*(torch.empty(each, dtype=torch.float64, device="meta") for each in shapes))

    def leaf(place: Place) -> Kernel:
        if place.device.type == "meta":
            return shape
        return build(*(constants.value(each).to(place.device) for each in given))

    computed = weight.op != "get_attr"
    return Affine(x, Map(shape.rank, shape.in_channels, shape.out_channels, leaf), True, computed)


def _linear_shape(call: Call, before: Shape, values: Values) -> Shape | None:
    weight = values.shape(call.get("weight"))
    return (*before[:-1], weight[0]) if weight else None


_sizes_of_linear = {
    nn.Linear: lambda module: {"weight": torch.Size((module.out_features, module.in_features))}
}
row(
    "linear",
    "input weight bias",
    modules=_sizes_of_linear,
    shape=_linear_shape,
    kind="linear",
    weights=WEIGHT,
    fresh=True,
)(partial(_layer, matrix=True))


def _product_shape(call: Call, before: Shape, values: Values) -> Shape | None:
    other = values.shape(call.get("other"))
    return None if other is None or min(len(before), len(other)) < 2 else (*before[:-1], other[-1])


FACTORS = (Weight("input"), Weight("other", transposed=True))
ADDED = {
    "input": "bias",
    "self": "bias",
    "mat1": "input",
    "batch1": "input",
    "batch2": "other",
    "mat": "input",
}
_product = partial(_layer, matrix=True, transposed=True)
row("matmul mm", "input other", shape=_product_shape, kind="matmul", weights=FACTORS, fresh=True)(_product)
row(
    "addmm",
    "bias input other",
    keywords=ADDED,
    shape=_product_shape,
    kind="matmul",
    weights=FACTORS,
    fresh=True,
)(_product)


def _convolution_shape(call: Call, before: Shape | None, values: Values) -> Shape:
    rank, transposed = int(call.name[-2]), "transpose" in call.name
    weight, groups = values.shape(call.get("weight")), call.get("groups", 1)
    channels = weight[1] * Size(groups) if weight and transposed and isinstance(groups, int) else None
    channels = weight[0] if weight and not transposed else channels
    if before is not None and len(before) == rank + 1:  # without a batch
        fresh = values.fresh(call, rank + 1)
        return (channels or fresh[0], *fresh[1:])
    fresh = values.fresh(call, rank + 2)
    batch, *sizes = before or fresh
    kept = not transposed and _keeps_size(call, weight, rank)
    return (batch, channels or fresh[1], *(sizes[1:] if kept else fresh[2:]))


def _keeps_size(call: Call, weight: Shape | None, rank: int) -> bool:
    """Whether a convolution gives as many positions as it gets, for every size."""
    stride, dilation, padding = (
        one_per_dimension(call.get(name, default), rank)
        for name, default in (("stride", 1), ("dilation", 1), ("padding", 0))
    )
    if stride is None or any(step != 1 for step in stride):
        return False
    if isinstance(call.get("padding"), str):
        return bool(call["padding"] == "same")
    if padding is None or dilation is None or weight is None or any(size.unknown for size in weight[2:]):
        return False
    sides = zip(padding, dilation, weight[2:], strict=True)
    return all(2 * p == d * (k.number - 1) for p, d, k in sides)


def _of_convolution(module: _ConvNd) -> dict[str, Any]:
    channels = (module.out_channels, module.in_channels // module.groups)
    if module.transposed:
        channels = (module.in_channels, module.out_channels // module.groups)
    names = ("stride", "padding", "dilation", "groups")
    weight = torch.Size((*channels, *module.kernel_size))
    return {"weight": weight, **{name: getattr(module, name) for name in names}}


for _kind, _options, _modules in (
    ("conv", "stride padding dilation groups", (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    (
        "conv_transpose",
        "stride padding output_padding groups dilation",
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ),
):
    for _rank, _module in enumerate(_modules, start=1):
        row(
            f"{_kind}{_rank}d",
            f"input weight bias {_options}",
            modules={_module: _of_convolution},
            shape=_convolution_shape,
            shape_without_first=True,
            kind=_kind,
            weights=WEIGHT,
            fresh=True,
        )(partial(_layer, matrix=False))


def _specific(arguments: Mapping[str, Any]) -> str:
    """aten.convolution by the name of the function that it is."""
    sides = arguments.get("stride")
    rank = len(sides) if isinstance(sides, list | tuple) else 2
    return f"conv_transpose{rank}d" if arguments.get("transposed") else f"conv{rank}d"


row(
    "convolution",
    "input weight bias stride padding dilation transposed output_padding groups",
    becomes=_specific,
)

# Linear maps that are read for their weights alone.
_products: dict[str, Any] = {"open": True, "kind": "matmul", "weights": FACTORS}
row("bmm", "input other", **_products)
row("grouped_mm _grouped_mm", "input other", keywords={"mat_a": "input", "mat_b": "other"}, **_products)
row("transformers.grouped_mm_fallback", "input other", **_products)
row("baddbmm", "bias input other", keywords=ADDED, **_products)
row("addbmm", "bias input other", keywords=ADDED, **_products)
row("inner", "input other", kind="matmul", weights=(Weight("input"), Weight("other")))
row("mv", "input vec", kind="matmul", weights=(Weight("input"),))
row("addmv", "bias input vec", keywords=ADDED, kind="matmul", weights=(Weight("input"),))
row(
    "tensordot",
    "input other",
    keywords={"a": "input", "b": "other"},
    open=True,
    kind="tensordot",
    weights=FACTORS,
)
row("bilinear", "input1 input2 weight bias", kind="bilinear", weights=WEIGHT)
TABLE = (Weight("weight", transposed=True, always=True),)
for _name in ("embedding", "embedding_bag"):
    row(_name, "input weight", open=True, kind="embedding", weights=TABLE)
    row(f"aten.{_name}", "weight input", open=True, kind="embedding", weights=TABLE)
_projections = ("in_proj_weight", "out_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
row(
    "multi_head_attention_forward",
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn "
    "dropout_p out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask "
    "use_separate_proj_weight q_proj_weight k_proj_weight v_proj_weight",
    open=True,
    kind="attention",
    weights=tuple(Weight(name, always=True) for name in _projections),
)
for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _weights = (Weight("w_ih", always=True), Weight("w_hh", always=True))
    row(f"{_name}_cell", "input hx w_ih w_hh", open=True, kind="recurrent", weights=_weights)
    # The list of weights comes third, or fourth where the sequences are packed.
    _weights = (Weight("params", always=True), Weight("packed", always=True))
    row(_name, "input hx params packed", open=True, kind="recurrent", weights=_weights)
row("einsum", "pattern", open=True, kind="einsum")
row("einops.einsum", "pattern", open=True, kind="einsum")


def _attention_shape(call: Call, before: Shape, values: Values) -> Shape | None:
    value = values.shape(call.get("value"))
    return (*before[:-1], value[-1]) if value else None


row(
    "scaled_dot_product_attention",
    "input key value",
    keywords={"query": "input"},
    open=True,
    shape=_attention_shape,
    fresh=True,
)


# Norms --------------------------------------------------------------------------------------------


def norm(call: Call, values: Values) -> Step | None:
    """BatchNorm with running statistics: one scale and shift per channel.

    Raises: InexactError: it uses the statistics of the batch.
    """
    if call.get("training", False) is not False:
        raise InexactError(
            "a BatchNorm in training mode uses the statistics of the batch. Call eval() first."
        )
    x, shape = call["input"], values.shape(call["input"])
    names = [call.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    if shape is None or None in names[:2] or not _constant(values, *names):
        return None
    constants, eps, rank = values.constants, call.get("eps", 1e-5), len(shape) - 2
    channels = constants.shape(names[0])[0]

    def leaf(place: Place) -> Kernel:
        if place.device.type == "meta":
            ones = torch.empty(channels, dtype=torch.float64, device="meta")
            return norm_kernel(ones, ones, None, None, eps, rank, torch.float64)
        mean, variance, gamma, beta = (
            None if name is None else constants.value(name).to(place.device) for name in names
        )
        assert mean is not None and variance is not None
        return norm_kernel(mean, variance, gamma, beta, eps, rank, torch.float64)

    return Affine(x, Map(rank, channels, channels, leaf))


def _norm_shape(call: Call, before: Shape | None, values: Values) -> Shape | None:
    return values.fresh(call, call["ndim"]) if before is None and "ndim" in call.arguments else before


def _several(call: Call, values: Values) -> Step:
    return MultiOutput()


_ranks = {nn.BatchNorm2d: lambda module: {"ndim": 4}}
_kinds: tuple[Any, ...] = (nn.modules.batchnorm._NormBase, "FrozenBatchNorm2d")
_rest: dict[str, Any] = {"shape": _norm_shape, "shape_without_first": True, "keeps": "first", "fresh": True}
row(
    "batch_norm",
    "input running_mean running_var weight bias training momentum eps",
    modules={**_ranks, **dict.fromkeys(_kinds, lambda module: {})},
    subclasses=True,
    **_rest,
)(norm)
# torch.batch_norm, and with it ATen, has another order than torch.nn.functional.batch_norm.
_order = "input weight bias running_mean running_var"
row("aten.batch_norm", f"{_order} training momentum eps cudnn_enabled", **_rest)(norm)
# ATen's BatchNorm gives the result and two tensors of statistics, empty in evaluation mode.
NORMS_OF_THREE = ("_native_batch_norm_legit_no_training", "native_batch_norm")
row(NORMS_OF_THREE[0], f"{_order} momentum eps", shape=_norm_shape, fresh=True)(_several)
row(NORMS_OF_THREE[1], f"{_order} training momentum eps", shape=_norm_shape, fresh=True)(_several)
