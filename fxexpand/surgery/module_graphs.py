"""Which modules become GraphModules, since folds change the calls in their code.

These are the smallest that hold all nodes of a fold without a placement, and have a graph that holds for each
of their calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import fx, nn

from fxexpand.passes.affine.extraction import Extraction
from fxexpand.passes.affine.shapes import NDIM
from fxexpand.passes.fusions import Group
from fxexpand.passes.norms import LayerNormAffine
from fxexpand.surgery.module_tree import ModuleTree, outermost, within_any
from fxexpand.surgery.placement import Placements
from fxexpand.tracing.graphs import attempt_symbolic, fixes_arguments
from fxexpand.tracing.recording import Failed
from fxexpand.tracing.stores import stored
from fxexpand.tracing.tracer import TraceOptions


class ModuleGraphs:
    """The modules of ``root`` that become graphs.

    Args:
        part: there is a model around the root.
        one_path: the root stays as it is, with all of its paths; modules inside it may be replaced.
        apart: the names of the groups that are not to be fused.

    Attributes:
        chosen: the graphs by the paths of their modules, none inside another.
        left_out: the names of the groups that no module can take.
        keeps_values: the code keeps values on modules, which a graph would not.
    """

    def __init__(
        self,
        extraction: Extraction,
        root: nn.Module,
        tree: ModuleTree,
        placements: Placements,
        part: bool,
        one_path: bool,
        apart: Collection[str],
    ) -> None:
        self._extraction = extraction
        self._root = root
        self._tree = tree
        self._placements = placements
        graph_module = extraction.graph_module
        self.keeps_values = bool(graph_module.graph.find_nodes(op="call_function", target=stored))
        fixed = part and fixes_arguments(graph_module)
        self._root_has_graph = not one_path and not fixed and not self.keeps_values
        self._graphs: dict[str, fx.GraphModule | None] = {}
        self.chosen, kept = self._choice(apart)
        self.left_out = {group.name for group in placements.groups} - {group.name for group in kept}

    def _choice(self, apart: Collection[str]) -> tuple[dict[str, fx.GraphModule], list[Group]]:
        """The graphs, and the groups that they or placements can take."""
        wanted = (group for group in self._placements.groups if group.name not in apart)
        groups = self._undivided([each for each in wanted if self._placed(each) or not self._slight(each)])
        placed = [group for group in groups if self._placed(group)]
        graphs = self._graphs_for(groups)
        if graphs is None:
            groups = self._undivided([each for each in groups if self._placed(each) or self._held(each)])
            graphs = self._graphs_for(groups)
        return (graphs, groups) if graphs is not None else ({}, self._undivided(placed))

    def _placed(self, group: Group) -> bool:
        return self._placements.of(group) is not None

    def _held(self, group: Group) -> bool:
        return self._holder(self._placements.owners[group.name]) is not None

    def _slight(self, group: Group) -> bool:
        """Whether all it saves is the scale of a LayerNorm: not worth a graph in place of a class."""
        kernels = self._extraction.kernels(group.first)
        called = [self._extraction.module(node) for node in kernels if node.op == "call_module"]
        scales = sum(isinstance(module, LayerNormAffine) for module in called)
        return len(kernels) - scales == 1 < len(kernels)

    def _undivided(self, groups: Sequence[Group]) -> list[Group]:
        """Those that share no node with a group that stays away: one value goes for all or for none."""
        kept = list(groups)
        while True:
            away = {node for group in self._placements.groups if group not in kept for node in group.nodes}
            whole = [group for group in kept if not away & group.nodes]
            if len(whole) == len(kept):
                return kept
            kept = whole

    def _graphs_for(self, groups: Iterable[Group]) -> dict[str, fx.GraphModule] | None:
        """The graphs that hold the groups without a placement; None where a module around has none."""
        owned = {group: self._placements.owners[group.name] for group in groups}
        owners = {owner for group, owner in owned.items() if not self._placed(group)}
        while True:
            owners = set(outermost(owners))
            torn = {owner for group, owner in owned.items() if self._torn(group, owners)}
            holders = [self._holder(owner) for owner in (*owners, *torn)]
            if None in holders:
                return None
            graphs = {holder: self._graph(holder) for holder in holders if holder is not None}
            if graphs.keys() == owners:
                return {owner: graph for owner, graph in sorted(graphs.items()) if graph is not None}
            owners = set(graphs)

    def _torn(self, group: Group, owners: Collection[str]) -> bool:
        """Whether some of the modules that a layer replaces become part of a graph, and others do not."""
        return len({within_any(path, owners) for path in self._placements.paths(group)}) > 1

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
            return self._extraction.graph_module if self._root_has_graph else None
        outcome = attempt_symbolic(self._root.get_submodule(owner), TraceOptions(stores="fail"))
        if isinstance(outcome, Failed) or fixes_arguments(outcome.graph_module):
            return None
        graph_module = outcome.graph_module
        reader, inside = self._extraction.reader, set(self._tree.computed[owner])
        read = {each for node in inside for each in node.all_input_nodes if each not in inside}
        given = [each for each in read if each not in reader.constants]
        taken = graph_module.graph.find_nodes(op="placeholder")
        if len(given) == len(taken) == 1:
            taken[0].meta[NDIM] = reader.values.ndim(given[0])
        return graph_module
