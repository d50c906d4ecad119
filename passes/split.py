"""Modules that are a BatchNorm and an activation in one, as two nodes while a graph is rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

from fxexpand.graph import operand, put, remove
from fxexpand.ops import norm_and_rest
from fxexpand.tracing import hooked

NORM = "__norm"  # what the name of the BatchNorm ends with


@contextmanager
def split_norms(graph_module: fx.GraphModule) -> Iterator[None]:
    """Each norm+act module is a BatchNorm and the rest inside the context.

    Afterwards, where the BatchNorm is gone from the graph, the rest stays under the module's name; where it
    is not, the module is one again.
    """
    whole: dict[str, nn.Module] = {}
    for node in list(graph_module.graph.find_nodes(op="call_module")):
        target = str(node.target)
        module = whole.get(target) or graph_module.get_submodule(target)
        found = None if hooked(module) else norm_and_rest(module)
        source = operand(node)
        if found is None or source is None:
            continue
        if target not in whole:
            whole[target] = module
            put(graph_module, target, found[1])
            put(graph_module, target + NORM, found[0])
        with graph_module.graph.inserting_before(node):
            norm = graph_module.graph.call_module(target + NORM, (source,))
        norm.meta = dict(node.meta)
        node.args, node.kwargs = (norm,), {}
    try:
        yield
    finally:
        called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
        for target, module in whole.items():
            if target + NORM in called:
                put(graph_module, target, module)
            remove(graph_module, target + NORM)
        for node in list(graph_module.graph.find_nodes(op="call_module")):
            name = str(node.target)
            if name.endswith(NORM) and name.removesuffix(NORM) in whole:
                source = operand(node)
                assert source is not None
                node.replace_all_uses_with(source)
                graph_module.graph.erase_node(node)
        graph_module.recompile()


def shown(name: str) -> str:
    """The name of the module that a part belongs to."""
    return name.removesuffix(NORM)
