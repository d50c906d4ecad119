"""Which values have memory of their own, and of what dtype they are."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.kernel.modules import LAYERS
from fxexpand.passes.affine.shapes import noted
from fxexpand.passes.operators.layers import POOLS
from fxexpand.passes.operators.table import call_of
from fxexpand.tracing.edit import works_in_place, written


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a value in the example, by ``trace(example_inputs=...)`` or an export."""
    dtype = noted(node, "dtype")
    return dtype if isinstance(dtype, torch.dtype) else None


def fresh(graph_module: fx.GraphModule, node: object) -> bool:
    """Whether the value of a node has memory of its own, that no other value of the graph shares."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return type(module) in LAYERS or isinstance(module, _BatchNorm) or type(module) in POOLS
    call = call_of(node)
    if call is None:
        return False
    if works_in_place(graph_module, node):
        return fresh(graph_module, written(node))
    has_macs = call.name.startswith(("conv", "linear", "matmul", "avg_pool", "batch_norm"))
    return has_macs or call.name in ("add", "sub", "mul", "div", "neg", "cat", "clone", "stack")
