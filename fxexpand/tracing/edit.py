"""Edits of fx graphs, the only ones in fxexpand, and the facts of a graph that an edit depends on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxexpand.errors import InexactError
from fxexpand.kernel.library_layers import weight_by_hooks
from fxexpand.recipes import Skip
from fxexpand.tracing.tracer import hooked

FACTOR = "fxexpand_factor"  # attribute of a module inside an expanded layer: its path in there
OF_ONE_VALUE = ("tensor_meta", "val", "example_value")  # keys of a meta that no other node may take over


# Views, each with the operator that does the same for every layout in memory.
RESHAPES: dict[Any, Any] = {
    "view": "reshape",
    "view_as": "reshape_as",
    torch.Tensor.view: torch.Tensor.reshape,
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


class ModuleUses:
    """Which calls and which names each module of a graph has: whether a replacement of it shows elsewhere.

    Attributes:
        graph_module: the graph.
        calls: the nodes that call a module, by its id.
        around: the modules that the graph calls as a whole while it also calls a part of them by itself.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.calls: dict[int, list[fx.Node]] = {}
        called: dict[nn.Module, None] = {}
        for node in graph_module.graph.find_nodes(op="call_module"):
            module = graph_module.get_submodule(node.target)
            self.calls.setdefault(id(module), []).append(node)
            called[module] = None
        self.around: set[nn.Module] = set()
        self._inside: set[nn.Module] = set()
        for module in called:
            parts = [part for part in module.modules() if part is not module and part in called]
            self._inside.update(parts)
            self.around.update([module] if parts else [])
        self._tensors: dict[int, list[str]] = {}
        for name, tensor in chain(
            graph_module.named_parameters(remove_duplicate=False),
            graph_module.named_buffers(remove_duplicate=False),
        ):
            self._tensors.setdefault(id(tensor), []).append(name)
        self._read = {node.target for node in graph_module.graph.find_nodes(op="get_attr")}

    def blocker(self, module: nn.Module) -> str | None:
        """Why replacing ``module`` changes more than the results of its calls; None where it does not."""
        if hooked(module) and not weight_by_hooks(module):
            return "it has hooks or a forward of its own, which its replacement would not have"
        if module in self._inside:
            return "it is also part of a module that the graph calls as a whole"
        for tensor in chain(module.parameters(), module.buffers()):
            held = self._tensors[id(tensor)]
            if len(held) > 1:
                return f"a tensor of it is shared: registered as {' and '.join(held)}"
            if held[0] in self._read:
                return f"{held[0]} is also read outside the module"
        return None

    def call_blocker(self, module: nn.Module) -> str | None:
        """Why calls of other modules cannot stand in for those of ``module``; None where they can."""
        calls = self.calls.get(id(module), ())
        if not calls:
            return "the graph does not call it"
        reason = self.blocker(module)
        if reason is None and any(operand(call) is None for call in calls):
            return "it is called with more than its input"
        return reason


class Read(NamedTuple):
    """A node of a graph module that reads a parameter, or that calls the module which computes one."""

    graph_module: fx.GraphModule
    node: fx.Node


def parameter_reads(model: nn.Module) -> dict[int, list[Read]]:
    """The reads in all graph modules of ``model``, by the id of the parameter or of the module."""
    found: dict[int, list[Read]] = {}
    for graph_module in [module for module in model.modules() if isinstance(module, fx.GraphModule)]:
        for node in graph_module.graph.nodes:
            if node.op == "get_attr" or (node.op == "call_module" and not node.all_input_nodes):
                path, _, name = str(node.target).rpartition(".")
                holder = graph_module.get_submodule(path)
                held = holder._parameters.get(name, holder._modules.get(name))
                found.setdefault(id(held), []).append(Read(graph_module, node))
    return found


def reread(read: Read, op: Literal["get_attr", "call_module"], target: str) -> None:
    """Have a node read a parameter as such (``get_attr``), or call the module that computes it.

    The graph module is to be compiled again afterwards.
    """
    graph, node = read.graph_module.graph, read.node
    with graph.inserting_before(node):
        new = graph.create_node(op, target)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    new.name = node.name


def tensor_at(graph_module: fx.GraphModule, target: str) -> Tensor:
    """The parameter or buffer that a ``get_attr`` node reads.

    Raises: InexactError: it is no tensor.
    """
    tensor = attrgetter(target)(graph_module)
    if not isinstance(tensor, Tensor):
        raise InexactError(f"{target} is no tensor.")
    return tensor


def operand(node: fx.Node) -> fx.Node | None:
    """The only argument of a call, where it is a node."""
    given = [*node.args, *node.kwargs.values()]
    return given[0] if len(given) == 1 and isinstance(given[0], fx.Node) else None


def site_of(target: str, module: nn.Module) -> str | None:
    """The name of the expanded layer whose factor ``module`` is; None for any other module."""
    inner = vars(module).get(FACTOR)
    ending = f".{inner}"
    return target.removesuffix(ending) if inner is not None and target.endswith(ending) else None


def read_results(graph_module: fx.GraphModule, writes: Iterable[tuple[fx.Node, fx.Node]]) -> None:
    """Have nodes that follow a call such as ``x.add_(y)`` read its result, which is ``x``, and not ``x``.

    Args:
        writes: each such call with the value that it writes into.
    """
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    for node, target in list(writes):
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)


def drop_unread_items(graph_module: fx.GraphModule) -> None:
    """Erase items without readers, such as the statistics of ATen's BatchNorm in a graph of make_fx."""
    items = graph_module.graph.find_nodes(op="call_function", target=operator.getitem)
    for node in reversed(list(items)):
        if not node.users:
            graph_module.graph.erase_node(node)


def expand_calls(graph_module: fx.GraphModule, target: str, block: nn.Sequential) -> None:
    """Put ``block`` in place of the submodule ``target``, and its parts in place of every call.

    The nodes call ``target.0``, ``target.1`` and so on, in the block's order; a Skip becomes an addition.
    """
    for name, part in block.named_modules():
        if not isinstance(part, nn.Sequential):
            vars(part)[FACTOR] = name
    put(graph_module, target, block)
    for node in graph_module.graph.find_nodes(op="call_module", target=target):
        x = operand(node)
        assert x is not None
        with graph_module.graph.inserting_before(node):
            last = _emit(node, target, block, x)
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph_module.graph.erase_node(node)


def call_instead(
    graph_module: fx.GraphModule,
    node: fx.Node,
    target: str,
    source: fx.Node,
    place: fx.Node,
    before: Sequence[fx.Node] = (),
    after: Sequence[fx.Node] = (),
) -> fx.Node:
    """Replace ``node`` by a call of the module ``target`` on ``source``; returns the new value.

    Args:
        place: the node before which to call.
        before, after: views of the graph to apply again, to the source and to the output of the module.
    """
    with graph_module.graph.inserting_before(place):
        x = _viewed(graph_module.graph, source, before)
        x = _viewed(graph_module.graph, graph_module.graph.call_module(target, (x,)), after)
    x.meta = dict(node.meta)
    node.replace_all_uses_with(x)
    return x


def read_early(
    graph_module: fx.GraphModule, reader: fx.Node, source: fx.Node, views: Sequence[fx.Node]
) -> None:
    """Let a node that reads a shape read that of ``source`` in its view, so that it needs no other value."""
    with graph_module.graph.inserting_before(reader):
        value = _viewed(graph_module.graph, source, views)
    first = reader.args[0]
    assert isinstance(first, fx.Node)
    reader.replace_input_with(first, value)


def extract(
    graph_module: fx.GraphModule, source: fx.Node, nodes: Iterable[fx.Node], sizes: Mapping[fx.Node, int]
) -> fx.GraphModule:
    """The graph of ``nodes`` alone, as a function of ``source``; the modules and parameters are shared.

    Args:
        nodes: in the graph's order; all else that they read are constants and sizes.
        sizes: the number for each size.

    Raises: InexactError: they read a size that is not in ``sizes``.
    """
    graph, _, copied = _beside(source, sizes)
    graph.output([copied(node) for node in nodes][-1])
    return fx.GraphModule(graph_module, graph)


def call_alone(
    graph_module: fx.GraphModule,
    module: nn.Module,
    source: fx.Node,
    before: Sequence[fx.Node],
    after: Sequence[fx.Node],
    sizes: Mapping[fx.Node, int],
) -> fx.GraphModule:
    """A graph that applies views, a module, and views again; see ``call_instead`` and ``extract``."""
    graph, x, copied = _beside(source, sizes)
    name = "fused"
    while hasattr(graph_module, name):
        name += "_"
    graph.output(_viewed(graph, graph.call_module(name, (_viewed(graph, x, before, copied),)), after, copied))
    root = {
        str(node.target): attrgetter(str(node.target))(graph_module)
        for node in graph.nodes
        if node.op in ("call_module", "get_attr") and node.target != name
    }
    return fx.GraphModule({**root, name: module}, graph)


def _beside(
    source: fx.Node, sizes: Mapping[fx.Node, int]
) -> tuple[fx.Graph, fx.Node, Callable[[fx.Node], Any]]:
    """A new graph, its input, which stands for ``source``, and a function that copies nodes into it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    copies: dict[fx.Node, Any] = {**sizes, source: x}

    def copied(node: fx.Node) -> Any:
        if node.op == "placeholder" and node not in copies:
            raise InexactError("it reads a size that is not known.")
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    return graph, x, copied


def put(graph_module: fx.GraphModule, target: str, module: nn.Module) -> None:
    """Replace the submodule ``target`` by ``module``; the order of the submodules stays."""
    path, _, name = target.rpartition(".")
    graph_module.get_submodule(path)._modules[name] = module


def finish(
    graph_module: fx.GraphModule, replaced: Iterable[str] = (), removable: Container[fx.Node] = ()
) -> None:
    """Erase the ``removable`` nodes without readers; check and compile the graph.

    Args:
        replaced: submodules, parameters and buffers to delete where no node calls or reads them any more.
    """
    for node in reversed(graph_module.graph.nodes):
        if not node.users and node in removable:
            graph_module.graph.erase_node(node)
    used: set[str] = set()
    called: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts = str(node.target).split(".")
            used.update(".".join(parts[: i + 1]) for i in range(len(parts)))
            called.update([str(node.target)] if node.op == "call_module" else [])
    for target in replaced:
        parts = target.split(".")
        if target not in used and not any(".".join(parts[:i]) in called for i in range(1, len(parts))):
            remove(graph_module, target)
    graph_module.graph.lint()
    graph_module.recompile()


def _viewed(
    graph: fx.Graph, x: fx.Node, views: Sequence[fx.Node], other: Callable[[fx.Node], Any] = lambda node: node
) -> fx.Node:
    """``x`` through views; ``other`` gives the sizes that they read.

    The memory of ``x`` may have another layout than that of the value they were for, so a view becomes a
    reshape.
    """
    for view in views:
        first, target = view.all_input_nodes[0], RESHAPES.get(view.target, view.target)
        swapped = {each: x if each is first else other(each) for each in view.all_input_nodes}
        args, kwargs = (fx.map_arg(view.args, swapped.get), fx.map_arg(view.kwargs, swapped.get))
        x = graph.create_node(view.op, target, args, kwargs, name=view.name, type_expr=view.type)
        x.meta = dict(view.meta)
    return x


def _emit(origin: fx.Node, target: str, part: nn.Module, x: fx.Node) -> fx.Node:
    """Add the nodes that run ``part``, which is at ``target``, on ``x``; returns the last."""
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


def remove(graph_module: fx.GraphModule, target: str) -> None:
    """Delete a submodule or a tensor, if it is there, and the modules around it that are empty then."""
    path, _, name = target.rpartition(".")
    try:
        parent = graph_module.get_submodule(path)
    except AttributeError:
        return  # deleted with its parent
    for held in (parent._modules, parent._parameters, parent._buffers):
        held.pop(name, None)
    if path and not (parent._modules or parent._parameters or parent._buffers):
        remove(graph_module, path)
