"""The memory that values of a graph share, and the calls that write into it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxexpand.passes.operators.table import call_of, spelling_of

# What Python's operators do in place beside the operators of the table.
AUGMENTED = frozenset(
    [
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "iconcat", "setitem", "delitem"),
    ]
)

INPUTS: frozenset[object] = frozenset(["inputs"])  # the memory of the inputs of a graph, each as all of them


def memory(graph_module: fx.GraphModule) -> dict[fx.Node, frozenset[object]]:
    """The memory that the value of each node may share: its own (the node), an input's or a parameter's.

    The row of an operator knows whether its result is ``fresh``. Any other call may share the memory of all
    of its arguments, as a view does and as an unknown operator might.
    """
    found: dict[fx.Node, frozenset[object]] = {}
    for node in graph_module.graph.nodes:
        found[node] = _memory(graph_module, node, found)
    return found


def _memory(
    graph_module: fx.GraphModule, node: fx.Node, found: Mapping[fx.Node, frozenset[object]]
) -> frozenset[object]:
    if node.op == "placeholder":
        return INPUTS
    if node.op == "get_attr":
        held = attrgetter(str(node.target))(graph_module)
        strided = isinstance(held, Tensor) and held.layout is torch.strided
        return frozenset([held.untyped_storage()._cdata if strided else id(held)])
    if works_in_place(graph_module, node):
        return shared(found, written(node))
    call = call_of(node, graph_module)
    if call is not None and call.operator.keeps == "nothing":
        return frozenset()
    fresh = call is not None and call.operator.fresh
    return (frozenset() if fresh else shared(found, node.all_input_nodes)) or frozenset([node])


def shared(memory: Mapping[fx.Node, frozenset[object]], values: Any) -> frozenset[object]:
    """The memory that all nodes in some arguments of a call may share."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(values, nodes.append)
    return frozenset().union(*(memory[node] for node in nodes))


def works_in_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call writes into its argument, as far as its spelling and its options say."""
    if node.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("out") is not None or spelling_of(node.target).inplace:
        return True
    name: str = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    augmented = getattr(node.target, "__module__", None) == "_operator" and name in AUGMENTED
    flagged = any(value is True for value in (*node.args, *node.kwargs.values()))  # F.relu(x, inplace=True)
    return name.endswith("_") or augmented or (flagged and _takes_inplace(node.target))


def written(node: fx.Node) -> object:
    """The argument that a call in place writes into."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return node.kwargs.get("out") or first


def results_of_writes(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each call such as ``x.add_(y)`` that is sure to return what it writes into, with the value before."""
    for node in graph_module.graph.nodes:
        target = node.args[0] if node.args else None
        if isinstance(target, fx.Node) and _returns_what_it_writes(node):
            yield node, target


def _takes_inplace(target: object) -> bool:
    """Whether a function has an option ``inplace``; methods have none."""
    if not callable(target):
        return False
    try:
        return "inplace" in inspect.signature(target).parameters
    except ValueError:  # written in C, where in-place functions have names that end with "_"
        return False


def _returns_what_it_writes(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__") and hasattr(torch.Tensor, name)
    if node.op != "call_function":
        return False
    if getattr(node.target, "__module__", None) == "_operator":
        return name in AUGMENTED and name not in ("setitem", "delitem")
    inplace = node.kwargs.get("inplace") is True and getattr(functional, name, None) is node.target
    return inplace or (name.endswith("_") and getattr(torch, name, None) is node.target)
