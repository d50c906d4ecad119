"""How many dimensions the values of a graph have, as far as the graph tells."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

# Modules that return as many dimensions as they get, whatever that is; exact types.
KEEP = (nn.Linear, nn.Identity, nn.BatchNorm1d, nn.LayerNorm, nn.Dropout)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.ELU)


def dimensions(graph_module: fx.GraphModule) -> dict[fx.Node, int | None]:
    """The number of dimensions of each value, from recorded shapes or what is certain; None is unknown."""
    found: dict[fx.Node, int | None] = {}
    for node in graph_module.graph.nodes:
        found[node] = _recorded(node)
        if found[node] is None:
            found[node] = _deduced(graph_module, node, found)
    return found


def _recorded(node: fx.Node) -> int | None:
    """From ``trace(example_inputs=...)``, torch's shape propagation or an export."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return value.ndim
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else len(shape)


def _deduced(graph_module: fx.GraphModule, node: fx.Node, found: dict[fx.Node, int | None]) -> int | None:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        kind = type(module)
        if isinstance(module, nn.Flatten) and kind is nn.Flatten:
            return 2 if (module.start_dim, module.end_dim) == (1, -1) else None
        if kind in (nn.BatchNorm2d, nn.BatchNorm3d):
            return 4 if kind is nn.BatchNorm2d else 5
        if kind in (*KEEP, *ACTIVATIONS) and node.args and isinstance(node.args[0], fx.Node):
            return found[node.args[0]]
    if node.target in (torch.flatten, "flatten"):
        return 2 if node.args[1:] in ((1,), (1, -1)) and not node.kwargs else None
    return None
