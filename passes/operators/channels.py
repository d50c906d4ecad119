"""Rows of operators that stack values, split them, or take some of their entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxexpand.passes.affine.steps import Concat, MultiOutput, Select, Step
from fxexpand.passes.operators.layers import NORMS_OF_THREE, norm
from fxexpand.passes.operators.sizes import ONE, Shape, Size, listed, sliced
from fxexpand.passes.operators.table import Call, Values, row, rows


def from_last(dim: Any, shape: Shape | None) -> int | None:
    """How many dimensions come after ``dim``; None where that is not known."""
    if not isinstance(dim, int) or (dim >= 0 and shape is None):
        return None
    return -1 - dim if dim < 0 else len(shape or ()) - 1 - dim


def without_ellipsis(index: Any, ndim: int) -> list[Any]:
    """An index of a value of ``ndim`` dimensions, one entry for each dimension that it names."""
    cuts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in cuts:
        at = cuts.index(Ellipsis)
        cuts[at : at + 1] = [slice(None)] * (ndim - len(cuts) + 1)
    return cuts


def one_cut(index: Any, ndim: int | None) -> tuple[int, Any] | None:
    """The one dimension (from the left) that an index narrows, and how; None for any other index."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is None or isinstance(part, bool) for part in parts) or (Ellipsis in parts and ndim is None):
        return None
    parts = without_ellipsis(index, ndim or 0)
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
    whole = torch.empty(channels, device="meta")
    if call.name == "chunk":
        return [len(part) for part in whole.chunk(call["chunks"])]
    sizes = call["split_size_or_sections"]
    if isinstance(sizes, int):
        return [len(part) for part in torch.split(whole, sizes)]
    return list(sizes) if all(isinstance(size, int) for size in sizes) else None


def stacked_terms(stack: fx.Node, values: Values) -> list[fx.Node] | None:
    """The values that are stacked to be summed or averaged, and for nothing else."""
    made, user = values.call(stack), next(iter(stack.users), None)
    taken = None if user is None else values.call(user)
    if made is None or made.name != "stack" or taken is None or taken.name not in ("mean", "sum"):
        return None
    shape, at, dims = values.shape(stack), made.get("dim", 0), listed(taken.get("dim"))
    if dims is None or len(dims) != 1 or taken.get("keepdim", False) or len(stack.users) != 1:
        return None
    same = at == dims[0] or (shape is not None and at % len(shape) == dims[0] % len(shape))
    parts = list(made["tensors"])
    return parts if same and all(values.varies(part) for part in parts) else None


# Several values as one ----------------------------------------------------------------------------


def _first_shape(call: Call, values: Values) -> Shape | None:
    """The shape of the first part; an empty tensor is passed over, whatever the others are."""
    parts = call["tensors"]
    if not isinstance(parts, list | tuple):
        return values.shape(parts)
    return next((shape for shape in map(values.shape, parts) if shape != (Size(0),)), None)


def _resized(call: Call, before: Shape | None, values: Values) -> Shape | None:
    """The shape before, with another size in the dimension ``dim``."""
    dim = call.get("dim", 0)
    if before is None or not isinstance(dim, int):
        return None
    at, fresh = dim % len(before), values.fresh(call, len(before))
    return tuple(fresh[i] if i == at else size for i, size in enumerate(before))


def _cat_shape(call: Call, before: None, values: Values) -> Shape | None:
    return _resized(call, _first_shape(call, values), values)


@row(
    "cat concat concatenate",
    "tensors dim",
    shape=_cat_shape,
    shape_without_first=True,
    keeps="parts",
    fresh=True,
)
def _cat(call: Call, values: Values) -> Step | None:
    parts = call["tensors"]
    if not isinstance(parts, list | tuple) or not all(map(values.varies, parts)) or len(parts) < 2:
        return None
    rank = from_last(call.get("dim", 0), values.shape(parts[0]))
    return None if rank is None else Concat(tuple(parts), rank)


def _stack_shape(call: Call, before: None, values: Values) -> Shape | None:
    part = _first_shape(call, values)
    if part is None:
        return None
    at = call.get("dim", 0) % (len(part) + 1)
    return (*part[:at], Size(len(call["tensors"])), *part[at:])


@row("stack", "tensors dim", shape=_stack_shape, shape_without_first=True, keeps="parts", fresh=True)
def _stack(call: Call, values: Values) -> Step | None:
    return MultiOutput() if call.node is not None and stacked_terms(call.node, values) else None


rows("hstack vstack dstack column_stack row_stack", arguments="tensors", keeps="parts", fresh=True)


# One value as several -----------------------------------------------------------------------------


def _parts(call: Call, values: Values) -> Step:
    return MultiOutput()


_sizes = "input split_size_or_sections dim"
row("chunk", "input chunks dim", shape=_resized, keeps="first")(_parts)
row(
    "split split_with_sizes",
    _sizes,
    keywords={"split_sizes": "split_size_or_sections"},
    shape=_resized,
    keeps="first",
)(_parts)
rows("tensor_split select", keeps="first")


def _unbound_shape(call: Call, before: Shape, values: Values) -> Shape | None:
    """An item of it lacks the first dimension, so that one is put in front."""
    dim = call.get("dim", 0)
    return (ONE, *before[:dim], *before[dim:][1:]) if isinstance(dim, int) and dim >= 0 else None


row("unbind", "input dim", shape=_unbound_shape, keeps="first")


# Some entries -------------------------------------------------------------------------------------


def _selected(call: Call, values: Values, dim: Any, cut: Any) -> Step | None:
    rank = from_last(dim, values.shape(call["input"]))
    if cut is None or rank is None:
        return None
    return Select(call["input"], lambda channels: rows_of(cut, channels), rank)


@row("narrow", "input dim start length", shape=_resized, keeps="first")
def _narrow(call: Call, values: Values) -> Step | None:
    start, length = call["start"], call["length"]
    known = isinstance(start, int) and isinstance(length, int)
    return _selected(call, values, call.get("dim", 0), slice(start, start + length) if known else None)


@row("slice", "input dim start end step", shape=_resized, keeps="first")
def _slice(call: Call, values: Values) -> Step | None:
    cut = slice(call.get("start"), call.get("end"), call.get("step"))
    return _selected(call, values, call.get("dim", 0), cut)


@row("index_select", "input dim index", shape=_resized)
def _index_select(call: Call, values: Values) -> Step | None:
    index = call["index"]
    cut = [int(i) for i in values.constants.value(index)] if index in values.constants else None
    return _selected(call, values, call.get("dim", 0), cut)


def _read_shape(value: object, values: Values) -> Shape | None:
    """The sizes in a value that is the shape of another, or a slice of it."""
    call = values.call(value)
    if call is None or call.name not in ("size", "shape", "getitem") or call.get("dim") is not None:
        return None
    if call.name != "getitem":
        return values.shape(call.first)
    sizes = _read_shape(call.first, values) if isinstance(call["index"], slice) else None
    return None if sizes is None else sizes[call["index"]]


def _item_size(call: Call, values: Values) -> Size | None:
    """An entry of a shape."""
    sizes = _read_shape(call["input"], values) if isinstance(call["index"], int) else None
    return None if sizes is None else sizes[call["index"]]


def _looked_up(before: Shape, cuts: Sequence[Any], tables: Sequence[int], values: Values) -> Shape | None:
    """The shape of the entries that one tensor of indices picks from one dimension."""
    at, entries = tables[0], values.shape(cuts[tables[0]])
    whole = all(cut == slice(None) for i, cut in enumerate(cuts) if i != at)
    return (*before[:at], *entries, *before[at + 1 :]) if whole and entries is not None else None


def _item_shape(call: Call, before: Shape, values: Values) -> Shape | None:
    index, source = call["index"], values.call(call["input"])
    if isinstance(index, int):
        several = source is not None and source.name in ("split", "chunk", *NORMS_OF_THREE)
        return before if several else before[1:]
    cuts = without_ellipsis(index, len(before))
    tables = [i for i, cut in enumerate(cuts) if isinstance(cut, fx.Node)]
    rest = [cut for i, cut in enumerate(cuts) if i not in tables]
    if len(cuts) > len(before) or not all(isinstance(cut, slice) for cut in rest):
        return None
    if tables:
        return _looked_up(before, cuts, tables, values)
    fresh = values.fresh(call, len(before))
    cut = [sliced(before[i], part) or fresh[i] for i, part in enumerate(cuts)]
    return (*cut, *before[len(cut) :])


@row("getitem", "input index", shape=_item_shape, size=_item_size, keeps="first")
def _getitem(call: Call, values: Values) -> Step | None:
    index, source = call["index"], values.call(call["input"])
    if source is not None and source.name in ("split", "chunk") and isinstance(index, int):
        return _part(source, values, index) if values.varies(source.first) else None
    if source is not None and source.name in NORMS_OF_THREE and index == 0:
        return norm(source, values) if values.varies(source.first) else None
    shape = values.shape(call["input"])
    found = one_cut(index, None if shape is None else len(shape))
    return None if found is None else _selected(call, values, *found)


def _part(parts: Call, values: Values, index: int) -> Step | None:
    """A part of a split or a chunk."""
    rank = from_last(parts.get("dim", 0), values.shape(parts.first))
    if rank is None:
        return None

    def rows(channels: int) -> list[int] | None:
        sizes = part_sizes(parts, channels)
        if sizes is None:
            return None
        start = sum(sizes[: index % len(sizes)])
        return list(range(start, start + sizes[index % len(sizes)]))

    return Select(parts.first, rows, rank)
