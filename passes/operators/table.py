"""The table from the nodes of a graph to affine operators: modules, functions, methods and ATen overloads.

Names are compared, not objects: ``x + y``, ``x += y``, ``torch.add``, ``x.add_(y)`` and ``aten.add.Tensor``
are all "add", with the arguments of that name in ``ARGUMENTS``. What is not here, or has other arguments
(``rounding_mode`` of a division, ``beta``, ``out``), is no affine operator: its value is a new source.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

# The parameters of the operators that have a map, in order; in-place forms have the same.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "add": ("input", "other", "alpha"),
    "sub": ("input", "other", "alpha"),
    "mul": ("input", "other"),
    "div": ("input", "other"),
    "neg": ("input",),
    "linear": ("input", "weight", "bias"),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv3d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose1d": (
        *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
    "conv_transpose2d": (
        *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
    "conv_transpose3d": (
        *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
    "matmul": ("input", "other"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    # torch.batch_norm, and with it ATen, has another order than torch.nn.functional.batch_norm.
    "torch.batch_norm": (
        *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
        "cudnn_enabled",
    ),
    "_native_batch_norm_legit_no_training": (
        *("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps"),
    ),
    "native_batch_norm": (
        *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    ),
    "addmm": ("bias", "input", "other"),
    "t": ("input",),
    "convolution": (
        *(
            "input",
            "weight",
            "bias",
            "stride",
            "padding",
            "dilation",
            "transposed",
            "output_padding",
            "groups",
        ),
    ),
    "avg_pool1d": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "avg_pool2d": (
        *("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    "avg_pool3d": (
        *("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    "adaptive_avg_pool1d": ("input", "output_size"),
    "adaptive_avg_pool2d": ("input", "output_size"),
    "adaptive_avg_pool3d": ("input", "output_size"),
    "pad": ("input", "pad", "mode", "value"),
    "constant_pad_nd": ("input", "pad", "value"),
    "dropout": ("input", "p", "training", "inplace"),
    "dropout1d": ("input", "p", "training", "inplace"),
    "dropout2d": ("input", "p", "training", "inplace"),
    "dropout3d": ("input", "p", "training", "inplace"),
    "alpha_dropout": ("input", "p", "training", "inplace"),
    "feature_alpha_dropout": ("input", "p", "training", "inplace"),
    "feature_dropout": ("input", "p", "training", "inplace"),
    "detach": ("input",),
    "contiguous": ("input", "memory_format"),
    "clone": ("input", "memory_format"),
    "alias": ("input",),
    "flatten": ("input", "start_dim", "end_dim"),
    "reshape_as": ("input", "other"),
    "reshape": ("input", "shape"),
    "permute": ("input", "dims"),
    "transpose": ("input", "dim0", "dim1"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "sum": ("input", "dim", "keepdim", "dtype"),
    "stack": ("tensors", "dim"),
    "cat": ("tensors", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "split": ("input", "split_size_or_sections", "dim"),
    "narrow": ("input", "dim", "start", "length"),
    "index_select": ("input", "dim", "index"),
    "slice": ("input", "dim", "start", "end", "step"),
    "getitem": ("input", "index"),
}
# ATen's BatchNorm gives the result and two tensors of statistics, empty in evaluation mode.
NORMS_OF_THREE = ("_native_batch_norm_legit_no_training", "native_batch_norm")
SYNONYMS = {
    **{"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div"},
    **{"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "negative": "neg"},
    **{"concat": "cat", "concatenate": "cat", "view": "reshape", "view_as": "reshape_as"},
    **{"swapaxes": "transpose", "split_with_sizes": "split", "_unsafe_view": "reshape", "mm": "matmul"},
}
PARAMETERS = {
    **{"self": "input", "x": "input", "axis": "dim", "mat2": "other"},
    "split_size": "split_size_or_sections",
}
HOMES = (torch, F, operator, torch.Tensor, torch._C._nn)


@dataclass(frozen=True)
class Call:
    """A call of an operator of the table: its name, and its arguments by the names of ``ARGUMENTS``."""

    name: str
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or the default where it is not given."""
        return self.arguments.get(name, default)

    def given(self, *names: str) -> bool:
        """Whether nothing else was given."""
        return self.arguments.keys() <= set(names)


def call_of(node: fx.Node) -> Call | None:
    """What a node calls, where that is in the table; None for modules and anything unknown."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        found = _name(node.target)
        if found is None:
            return None
        name = found
    else:
        return None
    name = name.removesuffix("_")
    name = SYNONYMS.get(name, name)
    names = ARGUMENTS.get(name)
    if names is None:
        return None
    given: Sequence[Any] = node.args
    if name in ("permute", "reshape") and not (len(given) == 2 and isinstance(given[1], list | tuple)):
        given = (given[0], tuple(given[1:]))
    if len(given) > len(names):
        return None
    arguments = dict(zip(names, given, strict=False))
    for key, value in node.kwargs.items():
        arguments[PARAMETERS.get(key, key)] = value
    if any(key not in names and value is not None for key, value in arguments.items()):
        return None
    if name == "convolution":
        name = _specific_convolution(arguments)
    name = name.removeprefix("torch.")
    return Call(name, arguments) if names[0] in arguments else None


def _specific_convolution(arguments: dict[str, Any]) -> str:
    """aten.convolution under the name of the function that it is."""
    sides = arguments.get("stride")
    rank = len(sides) if isinstance(sides, list | tuple) else 0
    return f"conv_transpose{rank}d" if arguments.get("transposed") else f"conv{rank}d"


def _name(target: object) -> str | None:
    if isinstance(target, torch._ops.OpOverload):
        name = target.overloadpacket.__name__ if target.namespace == "aten" else None
        return "torch.batch_norm" if name == "batch_norm" else name
    if target is torch.batch_norm:
        return "torch.batch_norm"
    name = getattr(target, "__name__", None)
    if not isinstance(name, str):
        return None
    return name if any(getattr(home, name, None) is target for home in HOMES) else None


def tuple_of(value: Any, rank: int) -> tuple[int, ...] | None:
    """An argument that is one integer for all dimensions or one for each; None for anything else."""
    if isinstance(value, int):
        return (value,) * rank
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, int) for v in value):
        values = tuple(value)
        return values * rank if len(values) == 1 else values if len(values) == rank else None
    return None


def picked(index: Any, ndim: int | None) -> tuple[int, Any] | None:
    """The one dimension (from the left) that an index narrows, and how; None for any other index."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is None or isinstance(part, bool) for part in parts):
        return None
    if Ellipsis in parts:
        if ndim is None:
            return None
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (ndim - len(parts) + 1)
    cuts = [(i, part) for i, part in enumerate(parts) if part != slice(None)]
    if len(cuts) != 1 or not isinstance(cuts[0][1], slice | list):
        return None
    return cuts[0]


def rows_of(cut: Any, channels: int) -> list[int] | None:
    """The channels that a slice or a list of integers takes."""
    if isinstance(cut, slice):
        ends = (cut.start, cut.stop, cut.step)
        if not all(end is None or isinstance(end, int) for end in ends):
            return None
        return list(range(channels))[cut]
    if all(isinstance(each, int) and not isinstance(each, bool) for each in cut):
        return [each % channels for each in cut]
    return None


def part_sizes(call: Call, channels: int) -> list[int] | None:
    """The sizes of the parts that a split or a chunk makes of ``channels``."""
    if call.name == "chunk":
        count = call["chunks"]
        return [len(part) for part in torch.empty(channels, device="meta").chunk(count)]
    sizes = call["split_size_or_sections"]
    if isinstance(sizes, int):
        return [len(part) for part in torch.split(torch.empty(channels, device="meta"), sizes)]
    return list(sizes) if all(isinstance(size, int) for size in sizes) else None
