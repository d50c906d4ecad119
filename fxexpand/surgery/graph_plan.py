"""The plan of one graph: which layers take the place of modules, and which modules become graphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxexpand.passes.affine.extraction import Extraction
from fxexpand.passes.affine.interpretation import Note
from fxexpand.passes.fuse import rows
from fxexpand.passes.fusions import Fusion, Group, grouped
from fxexpand.reporting.rows import Row
from fxexpand.surgery.module_graphs import ModuleGraphs
from fxexpand.surgery.module_tree import ModuleTree, made_inside, within_any
from fxexpand.surgery.other_calls import conflicts
from fxexpand.surgery.placement import Placement, Placements
from fxexpand.tracing.submodules import Parts, Reading

NO_PLACE = "it would become part of a graph, and its module is called with different arguments"
NO_GRAPH = "it would become part of a graph, and its module has none that holds for all sizes"
KEEPS = "it would become part of a graph, and its code keeps values on modules, which a graph does not"
SHARED = "another module holds a part of it, and may call that alone"


@dataclass(frozen=True)
class GraphPlan:
    """The folds in one graph; paths are those in its module.

    Attributes:
        placed: the groups whose layers replace modules.
        graphs: the graphs of the modules that become graphs, by their paths.
        alone: the modules that are to be read by themselves.
    """

    extraction: Extraction
    placed: Sequence[tuple[Group, Placement]]
    graphs: dict[str, fx.GraphModule]
    alone: Sequence[str]

    def rows(self, fusions: Sequence[Fusion]) -> list[Row]:
        """The rows of the sites that are in no module which becomes a graph or is read by itself."""
        elsewhere = (*self.graphs, *self.alone)
        return [row for row in rows(self.extraction, fusions) if not within_any(row.site, elsewhere)]


def plan_graph(module: nn.Module, reading: Reading, parts: Parts, part: bool) -> GraphPlan:
    """Plan the folds in the graph of ``module``, whose norms are split; ``part``: it is inside a model."""
    extraction, one_path = Extraction(reading.traced.graph_module), reading.failure is not None
    groups = grouped(extraction)
    tree = ModuleTree(extraction, module, reading.traced.multi_argument_calls)
    placements = Placements(extraction, groups, tree, one_path)
    shared = _shared(module, placements, parts)
    module_graphs = ModuleGraphs(extraction, module, tree, placements, part, one_path, shared)
    conflict = conflicts(module, reading, placements, parts)
    alone = [path for path in conflict.alone if not within_any(path, module_graphs.chosen)]
    graphs = {path: graph for path, graph in module_graphs.chosen.items() if not within_any(path, alone)}
    left_out = NO_GRAPH if one_path else KEEPS if module_graphs.keeps_values else NO_PLACE
    reasons = conflict.reasons | dict.fromkeys(module_graphs.left_out, left_out)
    reasons |= dict.fromkeys(shared, SHARED)
    placed = []
    for group in groups:
        placement, paths = placements.of(group), placements.paths(group)
        if _any_within((placements.owners[group.name], *paths), alone):
            continue
        if group.name in reasons:
            for candidate in group.values.values():
                extraction.note(candidate, Note(True, reasons[group.name]))
        elif placement is not None and not _any_within(paths, graphs):
            placed.append((group, placement))
    extraction.notes = {n: note for n, note in extraction.notes.items() if not made_inside(n, alone)}
    return GraphPlan(extraction, placed, graphs, alone)


def _shared(module: nn.Module, placements: Placements, parts: Parts) -> set[str]:
    """The names of the groups that would replace a module which another one holds as well."""
    owners, paths = placements.owners, placements.paths
    return {g.name for g in placements.groups if parts.shared(module, owners[g.name], paths(g))}


def _any_within(paths: Iterable[str], owners: Iterable[str]) -> bool:
    return any(within_any(path, owners) for path in paths)
