"""The shapes of the values of a graph, as far as the rows of its operators tell them for every input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from fxexpand.passes.affine.constants import Constants
from fxexpand.passes.affine.writes import Writes
from fxexpand.passes.operators.sizes import Shape, Size
from fxexpand.passes.operators.table import Call, call_of

NDIM = "fxexpand_ndim"  # in a node's meta: how many dimensions its value is known to have


class GraphValues:
    """The values of a graph: which are constant, what computes them, and of which shapes they are.

    A convolution is taken to get batches. These are the ``Values`` that the rules of the operator table ask.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.writes = Writes(graph_module)
        self.constants = Constants(graph_module, self.writes)
        self._calls: dict[fx.Node, Call | None] = {}
        self._shapes: dict[fx.Node, Shape | None] = {}
        self._sizes: dict[fx.Node, Size] = {}
        for node in graph_module.graph.nodes:
            self._calls[node] = call_of(node, graph_module)
            size, shape = self._deduced(node)
            if size is not None:
                self._sizes[node] = size
            example = self._recorded(node)
            # Only an example tells a convolution without a batch.
            differs = shape is not None and example is not None and len(shape) != len(example)
            self._shapes[node] = example if shape is None or differs else shape

    def varies(self, value: object) -> bool:
        """See ``Values``."""
        return isinstance(value, fx.Node) and value not in self.constants

    def call(self, value: object) -> Call | None:
        """See ``Values``."""
        return self._calls.get(value) if isinstance(value, fx.Node) else None

    def shape(self, value: object) -> Shape | None:
        """See ``Values``."""
        if isinstance(value, int | float):
            return ()
        if isinstance(value, torch.Size | Tensor):
            return tuple(map(Size, value.shape if isinstance(value, Tensor) else value))
        return self._shapes.get(value) if isinstance(value, fx.Node) else None

    def size(self, value: object) -> Size | None:
        """See ``Values``."""
        if isinstance(value, int) and not isinstance(value, bool):
            return Size(value) if value >= 0 else None
        return self._sizes.get(value) if isinstance(value, fx.Node) else None

    def fresh(self, call: Call, ndim: int) -> Shape:
        """See ``Values``."""
        assert call.node is not None
        return _unknown(call.node, ndim)

    def recorded(self, value: fx.Node) -> tuple[int, ...] | None:
        """See ``Values``."""
        return recorded(value)

    def ndim(self, node: fx.Node) -> int | None:
        """How many dimensions a value has."""
        shape = self._shapes.get(node)
        return None if shape is None else len(shape)

    def ratio(self, node: fx.Node, source: fx.Node) -> Fraction | None:
        """How many numbers a value has for each one of another, in the example; None without one."""
        shapes = [recorded(each) for each in (node, source)]
        counts = [math.prod(shape) for shape in shapes if shape is not None]
        return Fraction(counts[0], counts[1]) if len(counts) == 2 and counts[1] else None

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

    def _deduced(self, node: fx.Node) -> tuple[Size | None, Shape | None]:
        """The size or the shape that the row of the operator gives."""
        if node.op == "get_attr":
            path, _, attribute = str(node.target).rpartition(".")
            held = getattr(self.graph_module.get_submodule(path), attribute)
            return None, self.shape(held) if isinstance(held, Tensor) else None
        call = self._calls[node]
        if call is None:
            return None, None
        rules, before = call.operator, self.shape(call.first)
        size = None if rules.size is None else rules.size(call, self)
        if size is not None or rules.shape is None or (before is None and not rules.shape_without_first):
            return size, None
        return None, rules.shape(call, before, self)

    def _recorded(self, node: fx.Node) -> Shape | None:
        """Unknown sizes, as many as an example had, by ``trace(example_inputs=...)`` or an export."""
        if isinstance(node.meta.get(NDIM), int):
            return _unknown(node, node.meta[NDIM])
        shape = noted(node, "shape")
        return None if shape is None else _unknown(node, len(shape))


def _unknown(node: fx.Node, ndim: int) -> Shape:
    return tuple(Size(1, ((node.name, i),)) for i in range(ndim))


def recorded(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a value in the example, by ``trace(example_inputs=...)`` or an export."""
    shape = noted(node, "shape")
    if shape is None:
        return None
    # A dynamic size has the one of the example as its hint.
    sizes = [size if isinstance(size, int) else size.node.hint for size in shape]
    known = tuple(size for size in sizes if isinstance(size, int))
    return known if len(known) == len(sizes) else None


def noted(node: fx.Node, fact: str) -> Any:
    """The shape or the dtype of a value, as an example or an export left it in the meta; None without one."""
    value = node.meta.get("val")
    return getattr(value if isinstance(value, Tensor) else node.meta.get("tensor_meta"), fact, None)


def shape_readers(graph_module: fx.GraphModule) -> Sequence[fx.Node]:
    """The nodes that read nothing of a value but its shape."""
    calls = [(node, call_of(node)) for node in graph_module.graph.nodes]
    return [node for node, call in calls if call is not None and call.name in ("size", "shape")]
