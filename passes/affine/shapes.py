"""What the graph itself tells of shapes: products of numbers and of unknown sizes, the same at every input.

``x.flatten(2)`` of (B, C, H, W) is (B, C, H·W), and ``.view(B, C, H, W)`` of that is the shape before. A size
that is not known is a symbol of its own; only equal symbols are taken to be equal, never equal numbers that
an example happened to have.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from fxexpand.kernel.modules import LAYERS
from fxexpand.passes.operators.table import NORMS_OF_THREE, Call, call_of, tuple_of


@dataclass(frozen=True)
class Size:
    """A number times unknown sizes, each (node, place)."""

    number: int = 1
    unknown: tuple[tuple[str, int], ...] = ()

    def __mul__(self, other: Size) -> Size:
        return Size(self.number * other.number, tuple(sorted((*self.unknown, *other.unknown))))

    def at(self, known: Mapping[tuple[str, int], int]) -> int | None:
        """The number, for known sizes; None where not all are known."""
        values = [known.get(atom) for atom in self.unknown]
        return (
            None
            if None in values
            else self.number * math.prod(value for value in values if value is not None)
        )

    def over(self, other: Size) -> Size | None:
        """The quotient; None where it is not sure to be whole."""
        mine, theirs = Counter(self.unknown), Counter(other.unknown)
        if theirs - mine or not other.number or self.number % other.number:
            return None
        return Size(self.number // other.number, tuple(sorted((mine - theirs).elements())))


NDIM = "fxexpand_ndim"  # in a node's meta: how many dimensions its value is known to have
Shape: TypeAlias = tuple[Size, ...]
ONE = Size()

# Modules, functions and methods that return the shape of their first argument.
KEEPING = (
    nn.Identity,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,
)
ACTIVATIONS = "torch.nn.modules.activation"
ELEMENTWISE = frozenset(
    [
        *(
            "relu",
            "relu6",
            "gelu",
            "silu",
            "sigmoid",
            "tanh",
            "hardswish",
            "hardsigmoid",
            "leaky_relu",
            "elu",
        ),
        *(
            "softmax",
            "log_softmax",
            "layer_norm",
            "group_norm",
            "to",
            "float",
            "softplus",
            "mish",
            "exp",
            "roll",
        ),
        *(
            "normalize",
            "neg",
            "dropout",
            "alpha_dropout",
            "detach",
            "contiguous",
            "clone",
            "batch_norm",
            "alias",
        ),
        *(
            "dropout1d",
            "dropout2d",
            "dropout3d",
            "feature_alpha_dropout",
            "hardtanh",
            "clamp",
            "sqrt",
            "rsqrt",
        ),
    ]
)
WINDOWS = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd)


class Shapes:
    """The shapes of the values of a graph; see ``of``. A convolution is taken to get batches."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self._shapes: dict[fx.Node, Shape | None] = {}
        self._sizes: dict[fx.Node, Size] = {}
        for node in graph_module.graph.nodes:
            shape, example = self._deduced(node), self._recorded(node)
            # A convolution without a batch is told by the example alone.
            differs = shape is not None and example is not None and len(shape) != len(example)
            self._shapes[node] = example if shape is None or differs else shape

    def of(self, node: fx.Node) -> Shape | None:
        """The shape of a tensor, or of each part that a split makes; None where the rank is not known."""
        return self._shapes.get(node)

    def ndim(self, node: fx.Node) -> int | None:
        """How many dimensions it has."""
        shape = self._shapes.get(node)
        return None if shape is None else len(shape)

    def ratio(self, node: fx.Node, source: fx.Node) -> Fraction | None:
        """How many numbers a value has for each one of another, in the example; None without one."""
        counts = []
        for each in (node, source):
            shape = recorded(each)
            if shape is None:
                return None
            counts.append(math.prod(shape))
        return Fraction(counts[0], counts[1]) if counts[1] else None

    def probe(self, node: fx.Node, wanted: Sequence[int]) -> tuple[list[int], dict[fx.Node, int]]:
        """A shape for a value, and the sizes that the graph would read in a run with it.

        Args:
            wanted: the shape to take where it is free.
        """
        shape, known = self._shapes.get(node), dict[tuple[str, int], int]()
        if shape is None or len(shape) != len(wanted):
            return list(wanted), {}
        for size, goal in zip(shape, wanted, strict=True):
            for i, atom in enumerate(size.unknown):
                known.setdefault(atom, max(1, goal // size.number) if i == 0 else 1)
        sizes = {reader: size.at(known) for reader, size in self._sizes.items()}
        return [size.at(known) or 1 for size in shape], {k: v for k, v in sizes.items() if v is not None}

    def _recorded(self, node: fx.Node) -> Shape | None:
        """Unknown sizes, as many as an example had, by ``trace(example_inputs=...)`` or an export."""
        if isinstance(node.meta.get(NDIM), int):
            return self._fresh(node, node.meta[NDIM])
        shape = noted(node, "shape")
        return None if shape is None else self._fresh(node, len(shape))

    def _fresh(self, node: fx.Node, ndim: int) -> Shape:
        return tuple(Size(1, ((node.name, i),)) for i in range(ndim))

    def _deduced(self, node: fx.Node) -> Shape | None:
        if node.op == "get_attr":
            path, _, attribute = str(node.target).rpartition(".")
            held = getattr(self.graph_module.get_submodule(path), attribute)
            return tuple(Size(size) for size in held.shape) if isinstance(held, Tensor) else None
        if node.op == "call_module":
            first = node.args[0] if node.args else None
            before = self._shapes.get(first) if isinstance(first, fx.Node) else None
            return self._of_module(node, self.graph_module.get_submodule(str(node.target)), before)
        if node.op not in ("call_function", "call_method"):
            return None
        call = call_of(node)
        if call is not None:
            return self._of_call(node, call)
        return self._of_other(node)

    def _of_module(self, node: fx.Node, module: nn.Module, before: Shape | None) -> Shape | None:
        kind = type(module)
        if isinstance(module, nn.Linear):
            return None if before is None else (*before[:-1], Size(module.out_features))
        if kind in LAYERS:
            held: Any = module
            if before is not None and len(before) == LAYERS[kind].rank + 1:  # without a batch
                return (Size(held.out_channels), *self._fresh(node, len(before))[1:])
            batch, *size = before or self._fresh(node, LAYERS[kind].rank + 2)
            kept = kind.__name__.startswith("Conv") and not LAYERS[kind].transposed and _keeps_size(held)
            sizes = size[1:] if kept else self._fresh(node, LAYERS[kind].rank + 2)[2:]
            return (batch, Size(held.out_channels), *sizes)
        if (
            isinstance(module, nn.Flatten)
            and (module.start_dim, module.end_dim) == (1, -1)
            and before is None
        ):
            return self._fresh(node, 2)
        if before is None:
            return self._fresh(node, 4) if isinstance(module, nn.BatchNorm2d) else None
        if isinstance(module, nn.modules.pooling._AdaptiveAvgPoolNd):
            wanted = tuple_of(module.output_size, len(before) - 2)
            fresh = self._fresh(node, len(before))[2:]
            return (*before[:2], *(fresh if wanted is None else map(Size, wanted)))
        if isinstance(module, WINDOWS):
            return (*before[:2], *self._fresh(node, len(before))[2:])
        if isinstance(module, nn.Flatten):
            return _flattened(before, module.start_dim, module.end_dim)
        passes = isinstance(module, KEEPING) or kind.__module__ == ACTIVATIONS or kind.__name__ in (
            *("DropPath", "StochasticDepth", "FrozenBatchNorm2d"),
        )  # fmt: skip
        return before if passes and not isinstance(module, nn.MultiheadAttention) else None

    def _of_call(self, node: fx.Node, call: Call) -> Shape | None:
        first: Any = call.arguments.get("input", call.arguments.get("tensors"))
        if isinstance(first, list | tuple):
            # An empty tensor is passed over in a concatenation, whatever the others are.
            first = next((each for each in first if self._shapes.get(each) != (Size(0),)), None)
        before = self._shapes.get(first) if isinstance(first, fx.Node) else None
        if call.name in ("add", "sub", "mul", "div"):
            return self._broadcast(node, call)
        if call.name == "getitem":
            return self._item(node, call, before)
        if call.name.startswith("conv"):
            rank, weight = int(call.name[-2]), self._shapes.get(call.get("weight"))
            if before is not None and len(before) == rank + 1:
                return self._fresh(node, rank + 1)
            batch = (before or self._fresh(node, rank + 2))[0]
            place = 1 if "transpose" in call.name else 0
            out = weight[place] if weight is not None and call.get("groups", 1) == 1 else None
            out = weight[0] if weight is not None and place == 0 else out
            fresh = self._fresh(node, rank + 2)
            return (batch, out or fresh[1], *fresh[2:])
        if before is None:
            flat = call.name == "flatten" and (call.get("start_dim", 0), call.get("end_dim", -1)) == (1, -1)
            return self._fresh(node, 2) if flat else None
        if call.name == "linear":
            weight = self._shapes.get(call.get("weight"))
            return None if weight is None else (*before[:-1], weight[0])
        if call.name in ("matmul", "addmm"):
            other = self._shapes.get(call["other"]) if isinstance(call["other"], fx.Node) else None
            return None if other is None or min(len(before), len(other)) < 2 else (*before[:-1], other[-1])
        if call.name in ELEMENTWISE:
            return before
        return self._moved(node, call, before)

    def _moved(self, node: fx.Node, call: Call, before: Shape) -> Shape | None:
        ndim, fresh = len(before), self._fresh(node, len(before))
        if call.name == "transpose":
            order = list(range(ndim))
            one, two = call["dim0"], call["dim1"]
            order[one], order[two] = order[two], order[one]
            return tuple(before[i] for i in order)
        if call.name == "permute":
            return tuple(before[i] for i in call["dims"])
        if call.name == "flatten":
            return _flattened(before, call.get("start_dim", 0), call.get("end_dim", -1))
        if call.name == "reshape_as":
            return self._shapes.get(call["other"])
        if call.name == "reshape":
            return self._reshaped(node, call["shape"], before)
        if call.name.startswith("adaptive_avg_pool"):
            wanted = tuple_of(call["output_size"], ndim - 2)
            return (*before[:2], *(fresh[2:] if wanted is None else map(Size, wanted)))
        if call.name.startswith(("avg_pool", "max_pool")):
            return (*before[:2], *fresh[2:])
        if call.name in ("mean", "sum"):
            dims = call.get("dim")
            listed = [dims] if isinstance(dims, int) else dims
            if not isinstance(listed, list | tuple):
                return None
            gone = {dim % ndim for dim in listed}
            if call.get("keepdim", False):
                return tuple(ONE if i in gone else size for i, size in enumerate(before))
            return tuple(size for i, size in enumerate(before) if i not in gone)
        if call.name == "stack":
            place = call.get("dim", 0) % (ndim + 1)
            return (*before[:place], Size(len(call["tensors"])), *before[place:])
        if call.name in ("cat", "split", "chunk", "narrow", "slice", "index_select") and isinstance(
            call.get("dim", 0), int
        ):
            place = call.get("dim", 0) % ndim
            return tuple(fresh[i] if i == place else size for i, size in enumerate(before))
        return fresh if call.name in ("pad", "constant_pad_nd") else None

    def _broadcast(self, node: fx.Node, call: Call) -> Shape | None:
        parts = [
            self._shapes.get(each) if isinstance(each, fx.Node) else ()
            for each in (call["input"], call.get("other", 0))
        ]
        ints = [self._size(each) for each in (call["input"], call.get("other"))]
        if call.name == "mul" and ints[0] is not None and ints[1] is not None:
            self._sizes[node] = ints[0] * ints[1]
            return None
        if any(part is None for part in parts):
            return None
        one, two = sorted((part or () for part in parts), key=len, reverse=True)
        padded = (*[ONE] * (len(one) - len(two)), *two)
        return tuple(b if a == ONE else a for a, b in zip(one, padded, strict=True))

    def _item(self, node: fx.Node, call: Call, before: Shape | None) -> Shape | None:
        index, first = call["index"], call["input"]
        source = first.args[0] if isinstance(first, fx.Node) and first.args else None
        if isinstance(index, int) and isinstance(first, fx.Node) and _reads_shape(first):
            shape = self._shapes.get(source) if isinstance(source, fx.Node) else None
            if shape is not None:
                self._sizes[node] = shape[index]
            return None
        if before is None:
            return None
        if isinstance(index, int):
            parts = call_of(first)
            whole = parts is not None and parts.name in ("split", "chunk", *NORMS_OF_THREE)
            return before if whole else before[1:]
        cuts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in cuts:
            at = cuts.index(Ellipsis)
            cuts = (*cuts[:at], *[slice(None)] * (len(before) - len(cuts) + 1), *cuts[at + 1 :])
        if len(cuts) > len(before):
            return None
        listed = [i for i, cut in enumerate(cuts) if isinstance(cut, fx.Node)]
        if len(listed) == 1 and all(cut == slice(None) for i, cut in enumerate(cuts) if i not in listed):
            entries = self._shapes.get(cuts[listed[0]])
            return None if entries is None else (*before[: listed[0]], *entries, *before[listed[0] + 1 :])
        if not all(isinstance(cut, slice) for cut in cuts):
            return None
        fresh = self._fresh(node, len(before))
        cut = [_cut(before[i], part) or fresh[i] for i, part in enumerate(cuts)]
        return (*cut, *before[len(cut) :])

    def _of_other(self, node: fx.Node) -> Shape | None:
        first = node.args[0] if node.args else None
        before = self._shapes.get(first) if isinstance(first, fx.Node) else None
        target = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        place = node.args[1] if len(node.args) == 2 else None
        if name in ("size", "sym_size") and isinstance(place, int) and before is not None:
            self._sizes[node] = before[place]
            return None
        if node.target is operator.floordiv:
            one, two = (self._size(each) for each in node.args)
            found = one.over(two) if one is not None and two is not None else None
            if found is not None:
                self._sizes[node] = found
            return None
        if name == "scaled_dot_product_attention" and before is not None and len(node.args) > 2:
            value = self._shapes.get(node.args[2]) if isinstance(node.args[2], fx.Node) else None
            return None if value is None else (*before[:-1], value[-1])
        if name == "unbind" and before is not None:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            # What an item of it takes off is the first dimension, so that one is put in front.
            return (ONE, *before[:dim], *before[dim:][1:]) if isinstance(dim, int) and dim >= 0 else None
        if name == "unsqueeze" and before is not None and isinstance(place, int):
            place %= len(before) + 1
            return (*before[:place], ONE, *before[place:])
        return before if name.removesuffix("_") in ELEMENTWISE else None

    def _reshaped(self, node: fx.Node, wanted: Any, before: Shape) -> Shape | None:
        if not isinstance(wanted, list | tuple):
            return None
        total = math.prod(before, start=ONE)
        fresh = self._fresh(node, len(wanted))
        sizes = [self._size(each) or fresh[i] for i, each in enumerate(wanted)]
        if -1 not in wanted:
            return tuple(sizes)
        at = list(wanted).index(-1)
        rest = total.over(math.prod((size for i, size in enumerate(sizes) if i != at), start=ONE))
        sizes[at] = fresh[at] if rest is None else rest
        return tuple(sizes)

    def _size(self, value: object) -> Size | None:
        """A size that is a number, or read from a shape."""
        if isinstance(value, int) and not isinstance(value, bool):
            return Size(value) if value >= 0 else None
        return self._sizes.get(value) if isinstance(value, fx.Node) else None


def recorded(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a value in the example, by ``trace(example_inputs=...)`` or an export."""
    shape = noted(node, "shape")
    if shape is None:
        return None
    # Of a dynamic size the one in the example.
    sizes = [size if isinstance(size, int) else size.node.hint for size in shape]
    known = tuple(size for size in sizes if isinstance(size, int))
    return known if len(known) == len(sizes) else None


def noted(node: fx.Node, fact: str) -> Any:
    """The shape or the dtype of a value, as an example or an export left it in the meta; None without one."""
    value = node.meta.get("val")
    return getattr(value if isinstance(value, Tensor) else node.meta.get("tensor_meta"), fact, None)


def place_after(before: Shape, after: Shape, dim: int) -> int | None:
    """Where a reshape, which keeps the order of the numbers, puts a dimension; None where it breaks it."""
    ahead = math.prod(before[:dim], start=ONE)
    for place, size in enumerate(after):
        if size == before[dim] and size != ONE and math.prod(after[:place], start=ONE) == ahead:
            return place
    return None


def _cut(size: Size, part: slice) -> Size | None:
    """How long a slice of a dimension is; None where that depends on what is not known."""
    ends = part.start, part.stop, part.step
    if part == slice(None):
        return size
    if any(isinstance(end, fx.Node) for end in ends):
        return None
    if not size.unknown:
        return Size(len(range(size.number)[part]))
    return ONE if ends[2] in (None, 1) and ends[:2] in ((None, 1), (0, 1), (-1, None)) else None


def _flattened(before: Shape, start: int, end: int) -> Shape:
    start, end = start % len(before), end % len(before)
    return (*before[:start], math.prod(before[start : end + 1], start=ONE), *before[end + 1 :])


def _keeps_size(module: Any) -> bool:
    if isinstance(module.padding, str):
        return bool(module.padding == "same")
    sides = zip(module.padding, module.dilation, module.kernel_size, strict=True)
    return all(step == 1 for step in module.stride) and all(2 * p == d * (k - 1) for p, d, k in sides)


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node is the shape of a value."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1
    return node.op == "call_function" and node.target is getattr and "shape" in node.args[1:]


def shape_readers(graph_module: fx.GraphModule) -> Sequence[fx.Node]:
    """The nodes that read nothing of a value but its shape."""
    nodes = graph_module.graph.nodes
    return [
        node for node in nodes if _reads_shape(node) or (node.op == "call_method" and node.target == "size")
    ]
