"""Fuse: every affine part of the graph becomes one layer, where that is exact and costs no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.kernel.modules import LAYERS, describe
from fxexpand.passes.affine.extraction import Extraction
from fxexpand.passes.folding import plan_folding
from fxexpand.passes.fusions import Fusion, grouped, new_layers
from fxexpand.passes.norms import owner_name, split_norms
from fxexpand.passes.planner import commit, restoring, to_fixed_point
from fxexpand.passes.result import Result, require_graph_module
from fxexpand.reporting.rows import Action, Report, Row
from fxexpand.running.copying import copied
from fxexpand.tracing.edit import call_instead, finish, put, read_early


@dataclass(frozen=True)
class Fuse:
    """Replace each affine part of the graph by one layer, named after the first Linear or convolution in it.

    Affine are the operators of ``fxexpand.passes.operators`` and their modules: Linear, convolutions,
    BatchNorm in eval mode, scales, sums of affine maps of one value, and so on; Identity and idle Dropout in
    between vanish. What ``Expand`` did is undone, names included. Nodes are left apart where one kernel would
    cost more multiply-adds, as in a bottleneck. A module called in different places gets a kernel for each.

    Attributes:
        inplace: change the graph module that is given, not a copy of it.
        verify: compare every new layer with the nodes it replaces, in float64.
    """

    inplace: bool = False
    verify: bool = True

    def __call__(self, graph_module: fx.GraphModule) -> Result:
        """Run the pass; all kernels are folded, in float64, before the first edit.

        Raises: VerificationError: a new layer computes something else than what it replaces.
        """
        require_graph_module(graph_module, "Fuse")
        changed = graph_module if self.inplace else copied(graph_module)
        with restoring(changed.modules() if self.inplace else ()):
            folding = plan_folding(changed, self.verify)
            commit(folding)
            report = to_fixed_point(lambda: self._round(changed), [folding.report])
        return Result(changed if report.changed else graph_module, bool(report.changed), report)

    def _round(self, graph_module: fx.GraphModule) -> Report:
        with split_norms(graph_module):
            extraction = Extraction(graph_module)
            fusions = new_layers(extraction, grouped(extraction), self.verify)
            report = Report("fuse", tuple(rows(extraction, fusions)))
            _commit(extraction, fusions)
        return report


def _commit(extraction: Extraction, fusions: Sequence[Fusion]) -> None:
    """Rewrite the graph."""
    if not fusions:
        return
    graph_module, order = extraction.graph_module, extraction.order
    new: dict[fx.Node, fx.Node] = {}
    for fusion in fusions:
        put(graph_module, fusion.group.name, fusion.module)
    groups = [fusion.group for fusion in fusions]
    values = {node: (group.name, each) for group in groups for node, each in group.values.items()}
    nodes, shapes_read = list(order), extraction.shapes_read()
    for node in sorted(values, key=order.__getitem__):
        name, candidate = values[node]
        source, before, after = new.get(candidate.source, candidate.source), candidate.before, candidate.after
        place = nodes[max(candidate.start, candidate.last if before or after else 0)]
        new[node] = call_instead(graph_module, node, name, source, place, before, after)
    for reader, candidate in shapes_read.items():
        read_early(graph_module, reader, new.get(candidate.source, candidate.source), candidate.after)
    constants = extraction.reader.constants
    removable = {node for node in order if node in extraction.steps or node in constants}
    finish(graph_module, [target for fusion in fusions for target in fusion.targets], removable)


def rows(extraction: Extraction, fusions: Sequence[Fusion]) -> list[Row]:
    """A row for each fusion and for each affine operator that is left, in the graph's order."""
    fused: dict[fx.Node, Row] = {}
    for fusion in fusions:
        for candidate in fusion.group.values.values():
            fused.update(dict.fromkeys(extraction.kernels(candidate), fusion.row))
    by_site: dict[tuple[str, str], Row] = {}
    for node in extraction.order:
        row = fused.get(node)
        if row is not None:
            by_site.setdefault((row.site, row.action), row)
        if row is None or (node in extraction.notes and extraction.notes[node].refused):
            row = _row_of_unfused(extraction, node)
            if row is not None:
                by_site.setdefault((row.site, row.action), row)
    return list(by_site.values())


def _row_of_unfused(extraction: Extraction, node: fx.Node) -> Row | None:
    """The row of a node that stays apart; None where it is merged elsewhere, or not affine."""
    module = extraction.module(node) if node.op == "call_module" else None
    affine = type(module) in LAYERS or isinstance(module, _BatchNorm) or node in extraction.notes
    if not affine or node in extraction.absorbed:
        return None
    refused, reason = extraction.notes.get(node, (False, "nothing affine next to it"))
    action: Action = "refused" if refused else "left"
    if module is None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return Row(node.name, name, action, reason)
    count = sum(parameter.numel() for parameter in module.parameters())
    return Row(owner_name(str(node.target)), describe(module), action, reason, count, count)
