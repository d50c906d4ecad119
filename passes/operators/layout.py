"""Rows of operators that move numbers to other positions, and of reads of sizes.

An operator that only exchanges dimensions has an ``order``; one that keeps the order of the numbers is a
reshape. Their shapes and affine steps follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import fx, nn

from fxexpand.passes.affine.steps import Layout, Step
from fxexpand.passes.operators.sizes import (
    ONE,
    Shape,
    Size,
    dim_after_reshape,
    flattened,
    listed,
    product,
)
from fxexpand.passes.operators.table import Call, OrderRule, ShapeRule, Values, row, rows


def _moved(call: Call, values: Values, place: Callable[[int], int | None], keeps_order: bool) -> Step | None:
    """The same numbers at other positions; ``place`` says where a dimension goes."""
    before, after, like = values.shape(call["input"]), values.shape(call.node), call.get("other")
    if before is None or after is None:
        return None
    ends = len(before), len(after)

    def moves(rank: int) -> int | None:
        at = None if rank >= ends[0] else place(ends[0] - 1 - rank)
        return None if at is None else ends[1] - 1 - at

    source = like if isinstance(like, fx.Node) else None
    return Layout(call["input"], moves, keeps_order=keeps_order, like=source)


def _order(call: Call, before: Shape | None) -> Sequence[int] | None:
    rule = call.operator.order
    return None if before is None or rule is None else rule(call, len(before))


def _ordered_shape(call: Call, before: Shape, values: Values) -> Shape | None:
    order = _order(call, before)
    return None if order is None else tuple(before[dim] for dim in order)


def _ordered(call: Call, values: Values) -> Step | None:
    order = _order(call, values.shape(call["input"]))
    return None if order is None else _moved(call, values, list(order).index, keeps_order=False)


def reorders(spellings: str, arguments: str = "input", *, order: OrderRule, **fields: Any) -> None:
    """Put in a row of an operator that exchanges dimensions; see ``Operator.order``."""
    row(spellings, arguments, order=order, shape=_ordered_shape, keeps="first", **fields)(_ordered)


def _reshaped(call: Call, values: Values) -> Step | None:
    before, after = values.shape(call["input"]), values.shape(call.node)
    if before is None or after is None:
        return None
    return _moved(call, values, partial(dim_after_reshape, before, after), keeps_order=True)


def reshapes(spellings: str, arguments: str = "input", *, shape: ShapeRule, **fields: Any) -> None:
    """Put in a row of an operator that keeps the order of the numbers, by the shape that it gives."""
    row(spellings, arguments, shape=shape, keeps="first", **fields)(_reshaped)


# Exchanges of dimensions --------------------------------------------------------------------------


def _permuted(call: Call, ndim: int) -> Sequence[int] | None:
    dims = listed(call["dims"])
    return None if dims is None or len(dims) != ndim else [dim % ndim for dim in dims]


def _transposed(call: Call, ndim: int) -> Sequence[int] | None:
    return exchanged(ndim, call.get("dim0"), call.get("dim1"))


def exchanged(ndim: int, one: Any, two: Any) -> Sequence[int] | None:
    """The order of dimensions after two of them changed places."""
    if not isinstance(one, int) or not isinstance(two, int) or ndim < 2:
        return None
    order = list(range(ndim))
    order[one % ndim], order[two % ndim] = order[two % ndim], order[one % ndim]
    return order


def _last_two(call: Call, ndim: int) -> Sequence[int] | None:
    return exchanged(ndim, -1, -2)


def _all(call: Call, ndim: int) -> Sequence[int]:
    return list(range(ndim))[::-1]


def _moved_dims(call: Call, ndim: int) -> Sequence[int] | None:
    """The named dimensions go to their destinations, the others fill the places left in their order."""
    source, destination = listed(call.get("source")), listed(call.get("destination"))
    if source is None or destination is None or len(source) != len(destination):
        return None
    to = {into % ndim: dim % ndim for dim, into in zip(source, destination, strict=True)}
    rest = iter([dim for dim in range(ndim) if dim not in to.values()])
    return [to[at] if at in to else next(rest) for at in range(ndim)]


_axes = {"axis0": "dim0", "axis1": "dim1"}
reorders("permute", "input dims", variadic=True, order=_permuted)
reorders("transpose swapaxes swapdims", "input dim0 dim1", keywords=_axes, order=_transposed)
reorders("movedim moveaxis", "input source destination", order=_moved_dims)
reorders("mT mH adjoint", order=_last_two)
reorders("t T H", order=_all)


# Reshapes -----------------------------------------------------------------------------------------


def _filled(wanted: Any, total: Size, call: Call, values: Values) -> Shape | None:
    """The sizes that a view asks for, of ``total`` numbers; at most one is -1, for all that is left."""
    if not isinstance(wanted, list | tuple):
        return None
    fresh = values.fresh(call, len(wanted))
    sizes = [values.size(each) or fresh[i] for i, each in enumerate(wanted)]
    if -1 in wanted:
        at = list(wanted).index(-1)
        rest = total.over(product([size for i, size in enumerate(sizes) if i != at]))
        sizes[at] = fresh[at] if rest is None else rest
    return tuple(sizes)


def _as_wanted(call: Call, before: Shape, values: Values) -> Shape | None:
    return _filled(call.get("shape"), product(before), call, values)


def _like_other(call: Call, before: Shape, values: Values) -> Shape | None:
    return values.shape(call["other"])


def _flattened(call: Call, before: Shape | None, values: Values) -> Shape | None:
    ends = (call.get("start_dim", 0), call.get("end_dim", -1))
    if before is None:
        return values.fresh(call, 2) if ends == (1, -1) else None
    return flattened(before, *ends)


def _unflattened(call: Call, before: Shape, values: Values) -> Shape | None:
    dim = call["dim"] % len(before)
    sizes = _filled(call.get("sizes"), before[dim], call, values)
    return None if sizes is None else (*before[:dim], *sizes, *before[dim + 1 :])


def _unsqueezed(call: Call, before: Shape, values: Values) -> Shape | None:
    dim = call.get("dim")
    if not isinstance(dim, int):
        return None
    dim %= len(before) + 1
    return (*before[:dim], ONE, *before[dim:])


_whole: dict[str, Any] = {"modules": (nn.Flatten,), "shape_without_first": True}
reshapes(
    "reshape view _unsafe_view", "input shape", keywords={"size": "shape"}, variadic=True, shape=_as_wanted
)
reshapes("reshape_as view_as", "input other", shape=_like_other)
reshapes("flatten", "input start_dim end_dim", shape=_flattened, **_whole)
_parts = {nn.Unflatten: lambda module: {"dim": module.dim, "sizes": module.unflattened_size}}
reshapes("unflatten", "input dim sizes", shape=_unflattened, modules=_parts)
reshapes("unsqueeze", "input dim", shape=_unsqueezed)
rows("squeeze expand expand_as repeat repeat_interleave tile einops.rearrange einops.repeat", keeps="first")


# Reads of sizes, which do not use the values ------------------------------------------------------


def _size(call: Call, values: Values) -> Size | None:
    shape, dim = values.shape(call["input"]), call.get("dim")
    return shape[dim] if shape is not None and isinstance(dim, int) else None


row("size sym_size", "input dim", size=_size, keeps="nothing")
rows(
    "shape dim ndim ndimension numel nelement stride len dtype device layout is_contiguous is_floating_point "
    "is_cuda is_meta requires_grad grad",
    keeps="nothing",
)
