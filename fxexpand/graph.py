"""Edits of fx graphs, the only ones in fxexpand, and what must be known of a graph before an edit."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain

from torch import fx, nn

from fxexpand.recipes import Skip
from fxexpand.tracing import hooked

FACTOR = "fxexpand_factor"  # attribute of a module inside an expanded layer: its path in there
OF_ONE_VALUE = (
    "tensor_meta",
    "val",
    "example_value",
)  # keys of a node's meta that no other node may take over


class Census:
    """What a graph module holds under which names: what can be replaced without anyone noticing."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.calls: dict[int, list[fx.Node]] = {}
        for node in graph_module.graph.find_nodes(op="call_module"):
            self.calls.setdefault(id(graph_module.get_submodule(node.target)), []).append(node)
        self._tensors: dict[int, list[str]] = {}
        for name, tensor in chain(
            graph_module.named_parameters(remove_duplicate=False),
            graph_module.named_buffers(remove_duplicate=False),
        ):
            self._tensors.setdefault(id(tensor), []).append(name)
        self._read = {node.target for node in graph_module.graph.find_nodes(op="get_attr")}

    def obstacle(self, module: nn.Module) -> str | None:
        """Why replacing ``module`` would change more than its calls; None where it would not."""
        if hooked(module):
            return "it has hooks or a forward of its own, which its replacement would not have"
        for tensor in chain(module.parameters(), module.buffers()):
            held = self._tensors[id(tensor)]
            if len(held) > 1:
                return f"a tensor of it is shared: registered as {' and '.join(held)}"
            if held[0] in self._read:
                return f"{held[0]} is also read outside the module"
        return None


def operand(node: fx.Node) -> fx.Node | None:
    """The only argument of a call, where that is a value of the graph."""
    given = [*node.args, *node.kwargs.values()]
    return given[0] if len(given) == 1 and isinstance(given[0], fx.Node) else None


def site_of(target: str, module: nn.Module) -> str | None:
    """The name of the expanded layer that ``module`` is a factor of; None for any other module."""
    inner = vars(module).get(FACTOR)
    ending = f".{inner}"
    return target.removesuffix(ending) if inner is not None and target.endswith(ending) else None


def works_in_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call writes into its argument, as far as its name and its options say."""
    if node.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name: str = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    package = getattr(node.target, "__module__", None)
    augmented = package == "_operator" and (name.startswith("i") or name == "setitem")
    flagged = any(value is True for value in (*node.args, *node.kwargs.values()))  # F.relu(x, inplace=True)
    return name.endswith("_") or augmented or flagged


def expand_calls(graph_module: fx.GraphModule, target: str, block: nn.Sequential) -> None:
    """Put ``block`` in place of the submodule ``target``, and its parts in place of every call.

    The nodes call ``target.0``, ``target.1`` and so on, in the block's order; a Skip becomes an addition.
    """
    for name, part in block.named_modules():
        if not isinstance(part, nn.Sequential):
            vars(part)[FACTOR] = name
    _set_submodule(graph_module, target, block)
    for node in graph_module.graph.find_nodes(op="call_module", target=target):
        x = operand(node)
        assert x is not None
        with graph_module.graph.inserting_before(node):
            last = _emit(node, target, block, x)
        _take_over(node, last)


def fuse_calls(
    graph_module: fx.GraphModule, target: str, module: nn.Module, runs: Iterable[Sequence[fx.Node]]
) -> None:
    """Put ``module`` under the name ``target``, and one call of it in place of each run of nodes.

    Args:
        runs: nodes in the graph's order; the first reads the source, and only the last is read by others.
    """
    _set_submodule(graph_module, target, module)
    for run in runs:
        first, last = run[0], run[-1]
        with graph_module.graph.inserting_before(first):
            node = graph_module.graph.call_module(target, (operand(first),))
        _take_over(last, node)
        for inner in reversed(run[:-1]):
            graph_module.graph.erase_node(inner)


def extract(graph_module: fx.GraphModule, run: Sequence[fx.Node]) -> fx.GraphModule:
    """A run of nodes, whose first reads the source, as a graph of its own; the modules are shared."""
    graph = fx.Graph()
    source = operand(run[0])
    assert source is not None
    copies = {source: graph.placeholder("x")}
    for node in run:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[run[-1]])
    return fx.GraphModule(graph_module, graph)


def finish(graph_module: fx.GraphModule, replaced: Iterable[str] = ()) -> None:
    """Remove the submodules among ``replaced`` that nothing calls any more; check and compile the graph."""
    used: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts = str(node.target).split(".")
            used.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    for target in replaced:
        if target not in used:
            _remove(graph_module, target)
    graph_module.graph.lint()
    graph_module.recompile()


def _emit(origin: fx.Node, target: str, part: nn.Module, x: fx.Node) -> fx.Node:
    """The nodes that run ``part``, found under ``target``, on ``x``; returns the last."""
    if type(part) not in (nn.Sequential, Skip):
        node = origin.graph.call_module(target, (x,))
    else:
        node = x
        for name, inner in part._modules.items():
            assert inner is not None
            node = _emit(origin, f"{target}.{name}", inner, node)
        if type(part) is Skip:
            node = origin.graph.call_function(operator.add, (x, node))
    if node is not x:
        node.meta = {key: value for key, value in origin.meta.items() if key not in OF_ONE_VALUE}
    return node


def _take_over(node: fx.Node, successor: fx.Node) -> None:
    """Have ``successor`` read wherever ``node`` was, with its meta."""
    successor.meta = dict(node.meta)
    node.replace_all_uses_with(successor)
    node.graph.erase_node(node)


def _set_submodule(graph_module: fx.GraphModule, target: str, module: nn.Module) -> None:
    path, _, name = target.rpartition(".")
    graph_module.get_submodule(path)._modules[name] = module  # keeps its place among the others


def _remove(graph_module: fx.GraphModule, target: str) -> None:
    """Delete a submodule, and what holds it if that is then empty."""
    path, _, name = target.rpartition(".")
    try:
        parent = graph_module.get_submodule(path)
    except AttributeError:
        return  # went with its parent
    parent._modules.pop(name, None)
    if path and not (parent._modules or parent._parameters or parent._buffers):
        _remove(graph_module, path)
