"""Norms with an affine part, as two nodes each while a graph is rewritten.

The norm+act modules of timm are a BatchNorm, then the rest. A LayerNorm or RMSNorm before Linear layers is a
division by the standard deviation or root mean square, then a scale and a shift of the last dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import fx, nn

from fxexpand.kernel.library_layers import is_layer_norm, norm_and_rest
from fxexpand.passes.affine.shapes import shape_readers
from fxexpand.passes.operators.table import call_of
from fxexpand.recipes.structure import LastDimBatchNorm
from fxexpand.tracing.edit import operand, put, remove
from fxexpand.tracing.tracer import hooked

NORM = "__norm"  # the end of the name of the affine part


class LayerNormAffine(LastDimBatchNorm):
    """The scale and shift of a LayerNorm: a BatchNorm of mean 0 and variance 1."""


class _Split:
    """The calls of one module as two nodes each; ``rest`` keeps the module's name."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        target: str,
        module: nn.Module,
        affine: nn.Module,
        rest: nn.Module,
        affine_first: bool,
        nodes: Sequence[fx.Node],
    ) -> None:
        self._graph_module = graph_module
        self._target = target
        self._module, self._affine, self._rest = module, affine, rest
        self._calls: list[tuple[fx.Node, fx.Node]] = []
        put(graph_module, target, rest)
        put(graph_module, target + NORM, affine)
        # The node itself stays the last of the two: its readers and its name are those of the value.
        first, last = (target + NORM, target) if affine_first else (target, target + NORM)
        for node in nodes:
            with graph_module.graph.inserting_before(node):
                new = graph_module.graph.call_module(first, (operand(node),))
            new.meta = dict(node.meta)
            node.target, node.args, node.kwargs = last, (new,), {}
            self._calls.append((new, node))

    def rejoin(self) -> None:
        """Make a call one node again where both parts are still called, one after the other."""
        target, nodes = self._target, set(self._graph_module.graph.nodes)
        whole = [(one, two) for one, two in self._calls if {one, two} <= nodes and set(one.users) == {two}]
        apart = [node for call in self._calls if call not in whole for node in call if node in nodes]
        remove(self._graph_module, target + NORM)
        if whole:
            put(self._graph_module, target, self._module)
        for first, last in whole:
            last.target, last.args = target, first.args
            self._graph_module.graph.erase_node(first)
        for node in apart:
            if node.target != target:
                node.target = f"{target}_affine"
                put(self._graph_module, node.target, self._affine)
            elif whole:
                node.target = f"{target}_rest"
                put(self._graph_module, node.target, self._rest)


@contextmanager
def split_norms(graph_module: fx.GraphModule) -> Iterator[None]:
    """Inside the context each norm with an affine part is two nodes.

    Afterwards, if the affine part is gone from the graph, the rest stays under the module's name; if both are
    called, they are one module again.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        calls.setdefault(str(node.target), []).append(node)
    around = {target.rpartition(".")[0] for target in calls}
    sizes = set(shape_readers(graph_module))
    splits = []
    for target, nodes in calls.items():
        module = graph_module.get_submodule(target)
        if hooked(module) or target in around or any(operand(node) is None for node in nodes):
            continue
        parts, affine_first = norm_and_rest(module), True
        if parts is None:
            readers = {user for node in nodes for user in node.users if user not in sizes}
            parts, affine_first = _layer_norm(graph_module, module, readers), False
        if parts is not None:
            splits.append(_Split(graph_module, target, module, *parts, affine_first, nodes))
    try:
        yield
    finally:
        for split in splits:
            split.rejoin()
        graph_module.recompile()


def _layer_norm(
    graph_module: fx.GraphModule, module: nn.Module, readers: Collection[fx.Node]
) -> tuple[nn.Module, nn.Module] | None:
    """The scale and shift, and the norm without them, where only Linear layers read the value.

    A shift asks that these have a bias: a new one would cost more than the shift inside the norm does.
    """
    if not is_layer_norm(module):
        return None
    held = vars(module)
    weight, bias = (held["_parameters"].get(name) for name in ("weight", "bias"))
    if weight is None or weight.ndim != 1 or not readers:
        return None
    if not all(_is_linear(graph_module, reader, bias is not None) for reader in readers):
        return None
    affine = LayerNormAffine(len(weight), eps=0.0, device=weight.device, dtype=weight.dtype).eval()
    vars(affine)["_parameters"] = {"weight": weight, "bias": bias}
    rest = copy.copy(module)
    vars(rest).update(_parameters=dict.fromkeys(held["_parameters"]), elementwise_affine=False)
    return affine, rest


def _is_linear(graph_module: fx.GraphModule, node: fx.Node, shifted: bool) -> bool:
    """Whether a node is a Linear, with a bias if its input is ``shifted``."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return isinstance(module, nn.Linear) and (
            not shifted or vars(module)["_parameters"].get("bias") is not None
        )
    call = call_of(node)
    return call is not None and call.name == "linear" and (call.get("bias") is not None or not shifted)


def owner_name(name: str) -> str:
    """The name of the norm that a part belongs to; any other name as it is."""
    return name.removesuffix(NORM)
