"""Where a fused layer goes in a tree of modules whose classes are kept.

A layer that computes all that a module does takes the place of that module. A layer that computes several
modules in a row takes the place of one, and the others become Identity.
"""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from fxexpand.passes.affine.aliasing import written
from fxexpand.passes.affine.candidates import Candidate
from fxexpand.passes.affine.extraction import Extraction
from fxexpand.passes.fusions import Group
from fxexpand.passes.norms import owner_name
from fxexpand.surgery.module_tree import ModuleTree

OUT_OF_PLACE = ("torch.nn.", "fxexpand.")  # packages whose modules do not write into their inputs


@dataclass(frozen=True)
class Placement:
    """The modules that one layer replaces.

    Attributes:
        layer: the path at which the new layer is put.
        others: what is put at the other paths.
    """

    layer: str
    others: Mapping[str, nn.Module]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all modules that are replaced."""
        return (self.layer, *self.others)


class Placements:
    """The placements of the groups of one graph, by their names; None where only a graph can hold the layer.

    Args:
        one_path: the graph is one of several paths through the code of the root, which stays as it is.

    Attributes:
        groups: the values to fuse.
        owners: by the names of groups, the smallest module whose forward makes all of their nodes.
    """

    def __init__(
        self, extraction: Extraction, groups: Sequence[Group], tree: ModuleTree, one_path: bool
    ) -> None:
        self._extraction = extraction
        self._tree = tree
        self._one_path = one_path
        self.groups = groups
        self.owners = {group.name: tree.owner(group.nodes) for group in groups}
        self._dead = extraction.dead()
        self._writes = [place for node, place in extraction.order.items() if self._may_write(node)]
        self._written_by = set(self._writes)
        self._nodes = [group.first.nodes for group in groups]
        self._shared = Counter(node for nodes in self._nodes for node in nodes)
        self._placements = {group.name: self._whole(group) or self._row(group) for group in groups}

    def of(self, group: Group) -> Placement | None:
        """The placement of a group."""
        return self._placements[group.name]

    def paths(self, group: Group) -> tuple[str, ...]:
        """The paths of the modules that the layer of a group replaces; none if only a graph can hold it."""
        placement = self.of(group)
        return placement.paths if placement is not None else ()

    @cached_property
    def outlines(self) -> dict[str, object]:
        """By the names of groups: the same where the same modules are replaced by the same layer."""
        return {group.name: self._outline(group) for group in self.groups}

    def _outline(self, group: Group) -> object:
        candidate, constants = group.first, self._extraction.reader.constants
        places = {node: i for i, node in enumerate(self._extraction.in_order(candidate))}

        def operand(node: fx.Node) -> Any:
            if node in places:
                return places[node]
            if node not in constants:
                return node is candidate.source
            return node.op, node.target, _arguments(node, operand)

        calls = [(node.op, node.target, _arguments(node, operand)) for node in places]
        return [*self.paths(group), *calls] if self.of(group) is not None else None

    def _may_write(self, node: fx.Node) -> bool:
        """Whether a call may write into its argument; code without a graph may do so."""
        if node in self._extraction.writes.nodes:
            return True
        without_graph = self._one_path and node.op == "call_module"
        return without_graph and not type(self._extraction.module(node)).__module__.startswith(OUT_OF_PLACE)

    def _whole(self, group: Group) -> Placement | None:
        """In place of the module that does nothing else."""
        laid_out = any(candidate.before or candidate.after for candidate in group.values.values())
        if self._one_path or laid_out:
            return None
        path = self.owners[group.name]
        return Placement(path, {}) if self._tree.computes_only(path, group.nodes, len(group.values)) else None

    def _row(self, group: Group) -> Placement | None:
        """In place of one module in a row of modules."""
        kernels = self._extraction.kernels(group.first)
        units = self._units(group, kernels)
        layer = self._layer(group.first, kernels) if units is not None else None
        if units is None or layer is None or not self._unobserved(group, layer):
            return None
        others: dict[str, nn.Module] = {}
        for node, path in units.items():
            split_norm = node.op == "call_module" and path != node.target
            rest = self._extraction.graph_module.get_submodule(path) if split_norm else nn.Identity()
            others[path] = rest
        del others[units[layer]]
        return Placement(units[layer], others)

    def _units(self, group: Group, kernels: Sequence[fx.Node]) -> dict[fx.Node, str] | None:
        """For each node the module that computes nothing else; None where they are no row of modules."""
        values = group.values
        read = {*group.first.nodes, group.first.source}
        mine = {node for each in values.values() for node in self._extraction.kernels(each)}
        units: dict[fx.Node, str] = {}
        called: set[str] = set()
        for node in kernels:
            path = self._unit(node, len(values), mine)
            one_operand = sum(each in read for each in node.all_input_nodes) == 1
            again = node.op == "call_module" and path in called
            if path is None or again or not one_operand or not (node in values or node in self._dead):
                return None
            units[node] = path
            called.add(path)
        return units

    def _unit(self, node: fx.Node, calls: int, mine: Set[fx.Node]) -> str | None:
        """The module that computes nothing but a node and others of ``mine`` at all of its calls."""
        if node.op != "call_module":
            path = self._tree.stack(node)[-1]
            return path if self._tree.computes_only(path, mine, calls) else None
        path, made = owner_name(str(node.target)), self._extraction.reader.uses.calls
        once = len(made[id(self._extraction.module(node))]) == calls and self._tree.named_once(path)
        return path if path and once else None

    def _layer(self, candidate: Candidate, kernels: Sequence[fx.Node]) -> fx.Node | None:
        """The Linear or convolution whose place the new layer can take, between the changes of layout."""
        order = self._extraction.order
        low = max((order[layout] for layout in candidate.before), default=-1)
        high = min((order[layout] for layout in candidate.after), default=len(order))
        fitting = (node for node in kernels if low < order[node] < high)
        layers = (node for node in fitting if self._extraction.has_macs(node) and self._shared[node] == 1)
        return next(layers, None)

    def _unobserved(self, group: Group, layer: fx.Node) -> bool:
        """Whether no code that stays reads a value that will be another one, or writes into it.

        That code runs whether its result is read or not; before the new layer it finds the source.
        """
        candidate, order = group.first, self._extraction.order
        between = slice(bisect(self._writes, candidate.start), bisect_left(self._writes, order[layer]))
        if self._writes[between]:
            return False  # Identity passes the source on, and it is written into before the layer reads it
        for node in candidate.nodes:
            for user in node.users if node not in group.values else ():
                if order[user] in self._written_by and written(user) is node:
                    return False
                early_shape = user in self._extraction.shape_readers and order[node] < order[layer]
                merged = user in candidate.nodes or early_shape
                if not merged and not any(node in nodes and user in nodes for nodes in self._nodes):
                    return False
        return True


def _arguments(node: fx.Node, operand: Callable[[fx.Node], Any]) -> object:
    return map_arg(node.args, operand), map_arg(node.kwargs, operand)
