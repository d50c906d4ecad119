"""Where the nodes of a graph come from in the tree of modules, and what could take their place there."""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from fxexpand.passes.affine.aliasing import works_in_place, written
from fxexpand.passes.affine.candidates import Candidate
from fxexpand.passes.affine.extraction import Extraction
from fxexpand.passes.affine.shapes import NDIM
from fxexpand.passes.fusions import Group
from fxexpand.passes.norms import LayerNormAffine, owner_name
from fxexpand.tracing.graphs import attempt_symbolic, fixes_arguments
from fxexpand.tracing.recording import Failed
from fxexpand.tracing.submodules import Parts
from fxexpand.tracing.tracer import TraceOptions

KNOWN = ("torch.nn.", "fxexpand.")  # where modules come from that do not write into their inputs


class Tree:
    """Where the nodes of a graph come from in the tree of modules.

    Args:
        multi_argument_calls: see ``Traced``.
        part: there is a model around the root.
        one_path: the root stays as it is, with all of its paths; modules inside it may be replaced.

    Attributes:
        places: by the name of a group, the modules to put in place of others by their paths, None for the new
            layer; None where that alone does not do it.
        groups: what is to be fused.
        apart: the names of the groups that are not to be carried out.
    """

    def __init__(
        self,
        walk: Extraction,
        root: nn.Module,
        groups: Sequence[Group],
        multi_argument_calls: Collection[str],
        part: bool,
        one_path: bool = False,
    ) -> None:
        self._walk = walk
        self._part = part
        self.one_path = one_path
        self._root = root
        self._inside: dict[str, list[fx.Node]] = {}
        self._calls: dict[str, set[str]] = {}
        for node in walk.order:
            computes = node.op.startswith("call") and node not in walk.reader.constants
            for call, (path, _) in node.meta.get("nn_module_stack", {}).items():
                self._calls.setdefault(path, set()).add(call)
                if computes:
                    self._inside.setdefault(path, []).append(node)
        self._kept = {*multi_argument_calls}  # modules for which no layer of one argument can stand in
        for node in walk.graph_module.graph.find_nodes(op="get_attr"):
            self._kept.update(self._read_by_others(node))
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)
        self.groups = groups
        self._dead = walk.dead()
        self._writes = [place for node, place in walk.order.items() if self._may_write(node)]
        self._written_by = set(self._writes)
        self._nodes = [next(iter(group.values.values())).nodes for group in groups]
        self._shared = Counter(node for nodes in self._nodes for node in nodes)
        self._graphs: dict[str, fx.GraphModule | None] = {}
        self.unplaced: set[str] = set()
        self.apart: set[str] = set()
        self.places = {group.name: self._whole(group) or self._row(group) for group in groups}

    def uses(self, paths: Iterable[str]) -> list[fx.Node]:
        """Where one of the modules, or one around it, is called in the graph, or a tensor of it is read."""
        touching, calls = self._by_module
        found: dict[fx.Node, None] = {}
        for path in paths:
            found |= dict.fromkeys(touching.get(path, ()))
            for around in _prefixes(path):
                found |= dict.fromkeys(calls.get(around, ()))
        return list(found)

    @cached_property
    def _by_module(self) -> tuple[dict[str, list[fx.Node]], dict[str, list[fx.Node]]]:
        """The nodes that touch a module or what is inside of it, and those that call it, by its path."""
        touching: dict[str, list[fx.Node]] = {}
        calls: dict[str, list[fx.Node]] = {}
        for node in self._walk.order:
            target = owner_name(str(node.target)) if node.op in ("call_module", "get_attr") else ""
            for path in {*_prefixes(target), *_modules_around(node)}:
                touching.setdefault(path, []).append(node)
            if node.op == "call_module":
                calls.setdefault(target, []).append(node)
        return touching, calls

    def inside(self, node: fx.Node, paths: Iterable[str]) -> bool:
        """Whether a call of one of the modules makes it, or is it."""
        around = set(_modules_around(node))
        return any(path in around for path in paths)

    @cached_property
    def outlines(self) -> dict[str, object]:
        """By the names of groups: the same where the same modules are replaced by the same layer."""
        return {group.name: self._outline(group) for group in self.groups}

    def _outline(self, group: Group) -> object:
        where = self.places[group.name]
        if where is None:
            return None
        form = next(iter(group.values.values()))
        places = {node: i for i, node in enumerate(self._walk.in_order(form))}

        def told(node: fx.Node) -> Any:
            if node in places:
                return places[node]
            if node not in self._walk.reader.constants:
                return node is form.source
            return node.op, node.target, self._arguments(node, told)

        made = [(node.op, node.target, self._arguments(node, told)) for node in places]
        return [*((path, new is None) for path, new in where.items()), *made]

    def _arguments(self, node: fx.Node, told: Callable[[fx.Node], Any]) -> object:
        return map_arg(node.args, told), map_arg(node.kwargs, told)

    def _may_write(self, node: fx.Node) -> bool:
        """Whether a call may write into its argument; code without a graph may do so."""
        known = node.op != "call_module" or type(self._walk.module(node)).__module__.startswith(KNOWN)
        return works_in_place(self._walk.graph_module, node) or (self.one_path and not known)

    def shared(self, group: Group, calls: Parts) -> bool:
        """Whether a module that is to be replaced is held by another one as well."""
        return calls.shared(self._root, self.owner(group), self.places[group.name] or ())

    def graphs(self) -> dict[str, fx.GraphModule]:
        """The modules that become graphs, by their paths, with those graphs: none inside another.

        ``unplaced`` then holds the names of the groups that no module can take.
        """
        groups = self._undivided(
            [
                group
                for group in self.groups
                if (self.places[group.name] is not None or not self._slight(group))
                and group.name not in self.apart
            ]
        )
        placed = [group for group in groups if self.places[group.name] is not None]
        found = self._graphs_for(groups)
        if found is None:
            held = [group for group in groups if self._holder(self.owner(group)) is not None]
            groups = self._undivided([group for group in groups if group in placed or group in held])
            found = self._graphs_for(groups)
        if found is None:
            groups, found = self._undivided(placed), {}
        self.unplaced = {group.name for group in self.groups} - {group.name for group in groups}
        return found

    def _slight(self, group: Group) -> bool:
        """Whether all it saves is the scale of a LayerNorm: not worth a graph in place of a class."""
        kernels = self._walk.kernels(next(iter(group.values.values())))
        others = [node for node in kernels if node.op != "call_module"
                  or not isinstance(self._walk.module(node), LayerNormAffine)]  # fmt: skip
        return len(others) == 1 < len(kernels)

    def _undivided(self, groups: Sequence[Group]) -> list[Group]:
        """Those that share no node with a group that stays away: one value goes for all or for none."""
        kept = list(groups)
        while True:
            away = {node for group in self.groups if group not in kept for node in self._nodes_of(group)}
            found = [group for group in kept if not away & self._nodes_of(group)]
            if len(found) == len(kept):
                return kept
            kept = found

    def _nodes_of(self, group: Group) -> set[fx.Node]:
        return {node for form in group.values.values() for node in form.nodes}

    def _graphs_for(self, groups: Sequence[Group]) -> dict[str, fx.GraphModule] | None:
        owners = {self.owner(group) for group in groups if self.places[group.name] is None}
        while True:
            owners = set(outermost(owners))
            torn = {
                self.owner(group)
                for group in groups
                if len({within_any(path, owners) for path in self.places[group.name] or ()}) > 1
            }
            holders = [self._holder(owner) for owner in (*owners, *torn)]
            if None in holders:
                return None
            graphs = {holder: self._graph(holder) for holder in holders if holder is not None}
            if graphs.keys() == owners:
                return {owner: graph for owner, graph in sorted(graphs.items()) if graph is not None}
            owners = set(graphs)

    def _holder(self, owner: str) -> str | None:
        """The smallest module around an owner that has a graph; None where not even the root has."""
        while self._graph(owner) is None:
            if not owner:
                return None
            owner = owner.rpartition(".")[0]
        return owner

    def _graph(self, owner: str) -> fx.GraphModule | None:
        if owner not in self._graphs:
            self._graphs[owner] = self._traced(owner)
        return self._graphs[owner]

    def _traced(self, owner: str) -> fx.GraphModule | None:
        """The graph of a module by itself; None where it has none that holds for each of its calls."""
        if not owner:
            other = self._part and fixes_arguments(self._walk.graph_module)
            return None if other or self.one_path else self._walk.graph_module
        outcome = attempt_symbolic(self._root.get_submodule(owner), TraceOptions())
        if isinstance(outcome, Failed) or fixes_arguments(outcome.graph_module):
            return None
        graph_module = outcome.graph_module
        inside = set(self._inside[owner])
        given = {each for node in inside for each in node.all_input_nodes if each not in inside}
        given = {each for each in given if each not in self._walk.reader.constants}
        taken = graph_module.graph.find_nodes(op="placeholder")
        if len(given) == len(taken) == 1:
            taken[0].meta[NDIM] = self._walk.reader.values.ndim(given.pop())
        return graph_module

    def _stack(self, node: fx.Node) -> list[str]:
        """The modules whose forward makes the call, from the root on."""
        stack = _modules_around(node)
        return ["", *(stack[:-1] if node.op == "call_module" else stack)]

    def owner(self, group: Group) -> str:
        """The smallest module whose forward makes all calls of a group."""
        stacks = zip(*(self._stack(node) for node in self._nodes_of(group)), strict=False)
        shared: list[str] = [level[0] for level in stacks if len(set(level)) == 1]
        return shared[-1]

    def _whole(self, group: Group) -> dict[str, nn.Module | None] | None:
        """The module that does nothing else."""
        if self.one_path:
            return None
        path = self.owner(group)
        if path in self._kept:
            return None
        nodes = self._nodes_of(group)
        viewed = any(form.before or form.after for form in group.values.values())
        if viewed or not path or not set(self._inside[path]) <= nodes or not self._named_once(path):
            return None
        return {path: None} if len(self._calls[path]) == len(group.values) else None

    def _row(self, group: Group) -> dict[str, nn.Module | None] | None:
        """A row of modules: one for the new layer, and the others do nothing any more."""
        form = next(iter(group.values.values()))
        kernels = self._walk.kernels(form)
        places: dict[fx.Node, str] = {}
        found: dict[str, nn.Module | None] = {}
        read = {*form.nodes, form.source}
        mine = {node for each in group.values.values() for node in self._walk.kernels(each)}
        for node in kernels:
            path = self._unit(node, len(group.values), mine)
            alone = sum(each in read for each in node.all_input_nodes) == 1
            again = path in found and node.op == "call_module"
            if path is None or again or not alone or not (node in group.values or node in self._dead):
                return None
            split = node.op == "call_module" and path != node.target
            places[node] = path
            found[path] = self._walk.graph_module.get_submodule(path) if split else nn.Identity()
        order = self._walk.order
        low = max((order[view] for view in form.before), default=-1)
        high = min((order[view] for view in form.after), default=len(order))
        fitting = [node for node in kernels if low < order[node] < high]
        layers = [node for node in fitting if self._walk.has_macs(node) and self._shared[node] == 1]
        if not layers:
            return None
        if not self._unnoticed(group, form, layers[0]):
            return None
        found[places[layers[0]]] = None
        return found

    def _unnoticed(self, group: Group, form: Candidate, anchor: fx.Node) -> bool:
        """Whether no code that stays reads a value that is another one now, or writes into it.

        What stays runs, whether its result is read or not; before the new layer it finds the source.
        """
        order = self._walk.order
        between = slice(bisect(self._writes, form.start), bisect_left(self._writes, order[anchor]))
        if self._writes[between]:
            return False  # Identity passes the source on, into which something is written before the layer
        for node in form.nodes:
            for user in node.users if node not in group.values else ():
                if order[user] in self._written_by and written(user) is node:
                    return False
                if user in form.nodes or (user in self._walk.shape_readers and order[node] < order[anchor]):
                    continue
                if not any(node in nodes and user in nodes for nodes in self._nodes):
                    return False
        return True

    def _read_by_others(self, node: fx.Node) -> Iterator[str]:
        """The modules that hold the tensor ``node`` reads, where code outside of them uses it."""
        for path in _prefixes(str(node.target).rpartition(".")[0]):
            if any(path not in self._stack(user) for user in node.users):
                yield path

    def _unit(self, node: fx.Node, calls: int, mine: set[fx.Node]) -> str | None:
        """The module that does nothing but what a node and others of ``mine`` do, at all of its calls."""
        if node.op == "call_module":
            path, made = owner_name(str(node.target)), self._calls_of(str(node.target))
        else:
            path = self._stack(node)[-1]
            made = len(self._calls.get(path, ()))
            if path in self._kept or not mine.issuperset(self._inside.get(path, ())):
                return None
        return path if path and made == calls and self._named_once(path) else None

    def _calls_of(self, target: str) -> int:
        module = self._walk.graph_module.get_submodule(target)
        return len(self._walk.reader.uses.calls[id(module)])

    def _named_once(self, path: str) -> bool:
        return len(self._names[self._root.get_submodule(path)]) == 1


def _prefixes(path: str) -> list[str]:
    """The path and those of the modules around it, but the root."""
    names = path.split(".") if path else []
    return [".".join(names[: i + 1]) for i in range(len(names))]


def _modules_around(node: fx.Node) -> list[str]:
    """The paths of the modules whose calls make the node, from the outermost; that which it calls, too."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def within(path: str, owner: str) -> bool:
    """Whether the module at ``path`` is that at ``owner``, or inside it."""
    return not owner or path == owner or path.startswith(f"{owner}.")


def within_any(path: str, owners: Iterable[str]) -> bool:
    """Whether the module at ``path`` is one of these, or inside of one."""
    return any(within(path, owner) for owner in owners)


def outermost(paths: Collection[str]) -> list[str]:
    """Those that are inside no other of them."""
    return [
        path for path in sorted(paths) if not any(path != other and within(path, other) for other in paths)
    ]
