"""Carry fusions into the tree of modules that a graph was traced from.

Where a fusion is a row of modules, the new layer takes the place of one and the others become Identity: every
class is kept. Where it is all that a module does, the layer takes that module's place. Otherwise the smallest
module that holds all of its nodes becomes a GraphModule. What cannot be traced is left, and its parts are
fused on their own.
"""

from __future__ import annotations

import copy
from bisect import bisect, bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.calls import Parts, Reading
from fxexpand.copying import keep_attributes
from fxexpand.graph import Census, works_in_place, written
from fxexpand.inputs import ExampleInputs
from fxexpand.lowrank.factored import Factorized
from fxexpand.ops import LAYERS, describe
from fxexpand.passes.affine import Walk
from fxexpand.passes.form import Form
from fxexpand.passes.fuse import Fuse, Group, grouped, new_layer, rows
from fxexpand.passes.shapes import NDIM
from fxexpand.passes.split import LayerNormAffine, shown, split_norms
from fxexpand.report import Row
from fxexpand.tracing import UntraceableError, alternatives, fixes_arguments, hooked, symbolic

NO_PLACE = "it would become part of a graph, and its module is called with different arguments"
NO_GRAPH = "it would become part of a graph, and code in its module has none"
ONE_GRAPH = "as one graph"
SHARED = "another module holds a part of it, and may call that alone"


@dataclass
class Edits:
    """What to do to a model of these modules: what to put in place of which, and the rows of the report.

    ``graphs`` counts the parts that were traced; ``untraced`` is why the whole was not.
    """

    modules: set[nn.Module]
    replaced: dict[nn.Module, nn.Module] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    graphs: int = 0
    untraced: str = ""

    @property
    def traced(self) -> str:
        """How the model was read."""
        parts = f"in {self.graphs} parts, each a graph; the whole has none: {self.untraced}"
        return parts if self.untraced else ONE_GRAPH


def plan_fusing(model: nn.Module, example_inputs: ExampleInputs | None, verify: bool) -> Edits:
    """Fuse every graph in ``model`` that can be traced; the model is not touched.

    Raises:
        UnusableWeightError: what would be folded holds NaN or Inf.
        VerificationError: a new layer computes something else than what it replaces.
    """
    edits, seen = Edits(set(model.modules())), set[nn.Module]()
    _visit("", model, Parts(model, example_inputs), verify, edits, seen)
    told = {row.site for row in edits.rows}
    for name, module in model.named_modules():
        affine = type(module) in LAYERS or isinstance(module, _BatchNorm)
        if affine and module not in seen and name not in told:
            count = sum(parameter.numel() for parameter in module.parameters())
            reason = "no graph that can be traced calls it"
            edits.rows.append(Row(name, describe(module), "refused", reason, count, count))
    return edits


def commit_fusing(model: nn.Module, edits: Edits) -> nn.Module:
    """Carry a plan out; returns the model, which is a new one where the root itself was replaced."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in edits.replaced:
                parent._modules[name] = edits.replaced[child]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Factorized) and type(child._modules["1"]) is nn.Identity:
                parent._modules[name] = child._modules["0"]  # a pair of full rank is one layer again
    return edits.replaced.get(model, model)


def _visit(
    name: str,
    module: nn.Module,
    calls: Parts,
    verify: bool,
    edits: Edits,
    seen: set[nn.Module],
) -> None:
    """Fuse the graph of a module; where it has none, those of its children."""
    if module in seen:
        return
    seen.add(module)
    try:
        reading = calls.traced(module)
    except UntraceableError as error:
        if hooked(module) and "forward" not in vars(module):
            _visit(name, _without_hooks(module), calls, verify, edits, seen)
            return
        edits.untraced = edits.untraced if name else error.reason
        for child_name, child in module.named_children():
            inner = f"{name}.{child_name}" if name else child_name
            if type(child) in LAYERS or isinstance(child, _BatchNorm):
                count = sum(parameter.numel() for parameter in child.parameters())
                reason = f"{name or type(module).__name__} cannot be traced: {error.reason}"
                if error.within is not None and calls.given(module) is None:
                    reason += (
                        f". That is in a {type(error.within).__name__}: with example_inputs it is read around"
                    )
                edits.rows.append(Row(inner, describe(child), "refused", reason, count, count))
                seen.add(child)
            else:
                _visit(inner, child, calls, verify, edits, seen)
        return
    edits.graphs += 1
    if reading.error is not None and not name:
        edits.untraced = reading.error.reason
    graph_module = reading.graph_module
    parts, around = dict(module.named_modules()), Census(graph_module).around
    for node in graph_module.graph.find_nodes(op="call_module"):
        part = parts.get(str(node.target))
        whole = type(part).__module__.startswith("torch.nn.") and not isinstance(part, nn.Sequential)
        if part is not None and part._modules and not whole and part not in around:
            _visit(f"{name}.{node.target}" if name else str(node.target), part, calls, verify, edits, seen)
    seen.update(set(parts.values()) - {inner for part in around for inner in part.modules()})
    _fuse_graph(name, module, reading, calls, verify, edits)


def _fuse_graph(
    name: str, module: nn.Module, reading: Reading, calls: Parts, verify: bool, edits: Edits
) -> None:
    graph_module = reading.graph_module
    with split_norms(graph_module):
        walk = Walk(graph_module)
        groups = grouped(walk)
        tree = _Tree(walk, module, groups, part=bool(name), fixed=reading.leaf is not None)
        tree.apart = {group.name for group in groups if tree.shared(group, calls)}
        graphs = tree.graphs()
        conflicts = _conflicts(module, reading, tree, calls)
        no_place = NO_PLACE if reading.leaf is None else NO_GRAPH
        fusions = []
        for group in groups:
            where = tree.places[group.name]
            reason = no_place if group.name in tree.unplaced else conflicts.get(group.name)
            reason = SHARED if group.name in tree.apart else reason
            if reason is not None:
                forms = group.values.values()
                walk.notes |= {node: (True, reason) for form in forms for node in walk.kernels(form)}
            if (
                where is None
                or reason is not None
                or any(_within(path, owner) for path in where for owner in graphs)
            ):
                continue
            title = next(path for path, new in where.items() if new is None)
            fusion = new_layer(walk, replace(group, name=title), verify)
            fusions.append(fusion)
            for path, new in where.items():
                old = module.get_submodule(path)
                edits.replaced[old] = (fusion.module if new is None else new).train(old.training)
        found = [row for row in rows(walk, fusions) if not any(_within(row.site, owner) for owner in graphs)]
    if "" in graphs and module not in edits.modules:  # the copy of a module with hooks
        del graphs[""]
    for owner, graph in graphs.items():
        result = Fuse(inplace=True, verify=verify)(graph)
        old = module.get_submodule(owner)
        keep_attributes(result.graph_module, old)
        edits.replaced[old] = result.graph_module
        prefix = f"{owner}." if owner else ""
        found += [replace(row, site=f"{prefix}{row.site}") for row in result.report.rows]
    start = f"{name}." if name else ""
    edits.rows += [replace(row, site=f"{start}{row.site}") for row in found]


def _conflicts(module: nn.Module, reading: Reading, tree: _Tree, calls: Parts) -> dict[str, str]:
    """Groups that would be wrong for other arguments of the module, by their names: why."""
    placed = {name: where for name, where in tree.places.items() if where is not None}
    found: dict[str, str] = {}
    if not placed or not fixes_arguments(reading.graph_module):
        return found
    for argument, other in alternatives(module, calls.given(module), reading.leaf):
        with split_norms(other):
            walk = Walk(other)
            others = _Tree(walk, module, grouped(walk), part=True)
            same = [_outline(where) for where in others.places.values() if where is not None]
            for name, where in placed.items():
                if others.calls_any(where) and _outline(where) not in same:
                    found.setdefault(name, f"it holds for some values of the argument {argument} only")
    return found


def _outline(where: dict[str, nn.Module | None]) -> dict[str, bool]:
    return {path: new is None for path, new in where.items()}


def _without_hooks(module: nn.Module) -> nn.Module:
    """A module with the same parts. Its hooks run around what is inside, which may be rewritten."""
    bare = copy.copy(module)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(bare)[name] = OrderedDict()
    vars(bare)["_modules"] = module._modules  # a graph module copies the modules that hold others
    return bare


class _Tree:
    """Where the nodes of a graph come from in the tree of modules.

    Args:
        part: there is a model around the root.
        fixed: the root cannot become a graph, as code inside it has none.

    Attributes:
        places: by the name of a group, the modules to put in place of others by their paths, None for the new
            layer; None where that alone does not do it.
        apart: the names of the groups that are not to be carried out.
    """

    def __init__(
        self, walk: Walk, root: nn.Module, groups: Sequence[Group], part: bool, fixed: bool = False
    ) -> None:
        self._walk = walk
        self._part = part
        self._fixed = fixed
        self._root = root
        self._inside: dict[str, list[fx.Node]] = {}
        self._calls: dict[str, set[str]] = {}
        for node in walk.order:
            computes = node.op.startswith("call") and node not in walk.reader.constants
            for call, (path, _) in node.meta.get("nn_module_stack", {}).items():
                self._calls.setdefault(path, set()).add(call)
                if computes:
                    self._inside.setdefault(path, []).append(node)
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)
        self._groups = groups
        self._dead = walk.dead()
        writes = (place for node, place in walk.order.items() if works_in_place(walk.graph_module, node))
        self._writes = list(writes)
        self._written_by = set(self._writes)
        self._nodes = [next(iter(group.values.values())).nodes for group in groups]
        self._shared = Counter(node for nodes in self._nodes for node in nodes)
        self._graphs: dict[str, fx.GraphModule | None] = {}
        self.unplaced: set[str] = set()
        self.apart: set[str] = set()
        self.places = {group.name: self._whole(group) or self._row(group) for group in groups}

    def calls_any(self, paths: Iterable[str]) -> bool:
        """Whether one of these modules is called in the graph."""
        called = {str(node.target) for node in self._walk.order if node.op == "call_module"}
        return any(path in self._calls or path in called for path in paths)

    def shared(self, group: Group, calls: Parts) -> bool:
        """Whether a module that is to be replaced is held by another one as well."""
        return calls.shared(self._root, self._owner(group), self.places[group.name] or ())

    def graphs(self) -> dict[str, fx.GraphModule]:
        """The modules that become graphs, by their paths, with those graphs: none inside another.

        ``unplaced`` then holds the names of the groups that no module can take.
        """
        groups = self._undivided(
            [
                group
                for group in self._groups
                if (self.places[group.name] is not None or not self._slight(group))
                and group.name not in self.apart
            ]
        )
        placed = [group for group in groups if self.places[group.name] is not None]
        found = self._graphs_for(groups)
        if found is None:
            held = [group for group in groups if self._holder(self._owner(group)) is not None]
            groups = self._undivided([group for group in groups if group in placed or group in held])
            found = self._graphs_for(groups)
        if found is None:
            groups, found = self._undivided(placed), {}
        self.unplaced = {group.name for group in self._groups} - {group.name for group in groups}
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
            away = {node for group in self._groups if group not in kept for node in self._nodes_of(group)}
            found = [group for group in kept if not away & self._nodes_of(group)]
            if len(found) == len(kept):
                return kept
            kept = found

    def _nodes_of(self, group: Group) -> set[fx.Node]:
        return {node for form in group.values.values() for node in form.nodes}

    def _graphs_for(self, groups: Sequence[Group]) -> dict[str, fx.GraphModule] | None:
        owners = {self._owner(group) for group in groups if self.places[group.name] is None}
        while True:
            owners = {o for o in owners if not any(o != other and _within(o, other) for other in owners)}
            torn = {
                self._owner(group)
                for group in groups
                if len({any(_within(path, o) for o in owners) for path in self.places[group.name] or ()}) > 1
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
            return None if other or self._fixed else self._walk.graph_module
        try:
            graph_module = symbolic(self._root.get_submodule(owner))
        except UntraceableError:
            return None
        if fixes_arguments(graph_module):
            return None
        inside = set(self._inside[owner])
        given = {each for node in inside for each in node.all_input_nodes if each not in inside}
        given = {each for each in given if each not in self._walk.reader.constants}
        taken = graph_module.graph.find_nodes(op="placeholder")
        if len(given) == len(taken) == 1:
            taken[0].meta[NDIM] = self._walk.reader.shapes.ndim(given.pop())
        return graph_module

    def _stack(self, node: fx.Node) -> list[str]:
        """The modules whose forward makes the call, from the root on."""
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        return ["", *(stack[:-1] if node.op == "call_module" else stack)]

    def _owner(self, group: Group) -> str:
        """The smallest module whose forward makes all calls of a group."""
        stacks = zip(*(self._stack(node) for node in self._nodes_of(group)), strict=False)
        shared: list[str] = [level[0] for level in stacks if len(set(level)) == 1]
        return shared[-1]

    def _whole(self, group: Group) -> dict[str, nn.Module | None] | None:
        """The module that does nothing else."""
        path = self._owner(group)
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
        layers = [node for node in fitting if self._walk.weighs(node) and self._shared[node] == 1]
        if not layers:
            return None
        if not self._unnoticed(group, form, layers[0]):
            return None
        found[places[layers[0]]] = None
        return found

    def _unnoticed(self, group: Group, form: Form, anchor: fx.Node) -> bool:
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

    def _unit(self, node: fx.Node, calls: int, mine: set[fx.Node]) -> str | None:
        """The module that does nothing but what a node and others of ``mine`` do, at all of its calls."""
        if node.op == "call_module":
            path, made = shown(str(node.target)), self._calls_of(str(node.target))
        else:
            path = self._stack(node)[-1]
            made = len(self._calls.get(path, ()))
            if not mine.issuperset(self._inside.get(path, ())):
                return None
        return path if path and made == calls and self._named_once(path) else None

    def _calls_of(self, target: str) -> int:
        module = self._walk.graph_module.get_submodule(target)
        return len(self._walk.reader.census.calls[id(module)])

    def _named_once(self, path: str) -> bool:
        return len(self._names[self._root.get_submodule(path)]) == 1


def _within(path: str, owner: str) -> bool:
    return not owner or path == owner or path.startswith(f"{owner}.")
