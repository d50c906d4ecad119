"""Carry fusions into the tree of modules that a graph was traced from.

Where a fusion is a row of modules, the new layer takes the place of one and the others become Identity: every
class is kept. Where it is all that a module does, the layer takes that module's place. Otherwise the smallest
module that holds all of its nodes becomes a GraphModule. Where there is no graph of all paths through the
code, the parts with one are fused on their own, and then rows of modules that every path has.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.kernel.modules import LAYERS, describe
from fxexpand.layers.rewritten import Rewritten
from fxexpand.passes.affine.extraction import Extraction
from fxexpand.passes.affine.interpretation import Note
from fxexpand.passes.fuse import Fuse, rows
from fxexpand.passes.fusions import grouped, new_layer
from fxexpand.passes.norms import split_norms
from fxexpand.reporting.rows import Row
from fxexpand.running.copying import keep_attributes
from fxexpand.surgery.module_tree import Tree, outermost, within, within_any
from fxexpand.tracing.edit import ModuleUses
from fxexpand.tracing.graphs import hooked
from fxexpand.tracing.recording import Failed
from fxexpand.tracing.submodules import Parts, Reading

NO_PLACE = "it would become part of a graph, and its module is called with different arguments"
NO_GRAPH = "it would become part of a graph, and its module has none that holds for all sizes"
ONE_GRAPH = "as one graph"
SHARED = "another module holds a part of it, and may call that alone"


@dataclass
class Edits:
    """What to do to a model of these modules: what to put in place of which, and the rows of the report.

    ``graphs`` counts the parts that were traced; ``untraced`` is why the whole was not. ``show`` takes the
    name of each part and layer when it is worked on.
    """

    modules: set[nn.Module]
    show: Callable[[str], None]
    replaced: dict[nn.Module, nn.Module] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    graphs: int = 0
    untraced: str = ""

    @property
    def traced(self) -> str:
        """How the model was read."""
        parts = f"in parts, {self.graphs} of them a graph; the whole has none: {self.untraced}"
        return parts if self.untraced else ONE_GRAPH


def plan_fusing(model: nn.Module, parts: Parts, verify: bool, show: Callable[[str], None]) -> Edits:
    """Fuse every graph in ``model`` that can be traced; the model is not touched.

    Args:
        parts: of ``model``.
        show: see ``Edits``.

    Raises:
        UnusableWeightError: what would be folded holds NaN or Inf.
        VerificationError: a new layer computes something else than what it replaces.
    """
    edits, seen = Edits(set(model.modules()), show), set[nn.Module]()
    _visit("", model, parts, verify, edits, seen)
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
            if isinstance(child, Rewritten) and (layer := child.remaining_layer()) is not None:
                parent._modules[name] = layer  # a pair of full rank is one layer again
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
    edits.show(name or type(module).__name__)
    reading = calls.traced(module)
    if isinstance(reading, Failed):
        if hooked(module) and "forward" not in vars(module):
            _visit(name, _without_hooks(module), calls, verify, edits, seen)
            return
        edits.untraced = edits.untraced if name else reading.reason
        for child_name, child in module.named_children():
            inner = f"{name}.{child_name}" if name else child_name
            if type(child) in LAYERS or isinstance(child, _BatchNorm):
                count = sum(parameter.numel() for parameter in child.parameters())
                reason = f"{name or type(module).__name__} cannot be traced: {reading.reason}"
                reason += "" if calls.given(module) is not None else "; example_inputs may help"
                edits.rows.append(Row(inner, describe(child), "refused", reason, count, count))
                seen.add(child)
            else:
                _visit(inner, child, calls, verify, edits, seen)
        return
    edits.graphs += 1
    if reading.failure is not None and not name:
        edits.untraced = reading.failure.reason
    graph_module = reading.traced.graph_module
    parts, around = dict(module.named_modules()), ModuleUses(graph_module).around
    for node in graph_module.graph.find_nodes(op="call_module"):
        part = parts.get(str(node.target))
        whole = type(part).__module__.startswith("torch.nn.") and not isinstance(part, nn.Sequential)
        if part is not None and part._modules and not whole and part not in around:
            _visit(f"{name}.{node.target}" if name else str(node.target), part, calls, verify, edits, seen)
    seen.update(set(parts.values()) - {inner for part in around for inner in part.modules()})
    for path in _fuse_graph(name, module, reading, calls, verify, edits):
        part = module.get_submodule(path)
        seen.difference_update(part.modules())
        _visit(f"{name}.{path}" if name else path, part, calls, verify, edits, seen)


def _fuse_graph(
    name: str, module: nn.Module, reading: Reading, calls: Parts, verify: bool, edits: Edits
) -> list[str]:
    """Fuse one graph; returns the paths of modules in it that are left, to be read by themselves."""
    graph_module, multi_argument_calls = reading.traced.graph_module, reading.traced.multi_argument_calls
    with split_norms(graph_module):
        walk = Extraction(graph_module)
        groups = grouped(walk)
        tree = Tree(walk, module, groups, multi_argument_calls, bool(name), reading.failure is not None)
        tree.apart = {group.name for group in groups if tree.shared(group, calls)}
        graphs = tree.graphs()
        conflicts, alone = _conflicts(module, reading, tree, calls)
        alone = [path for path in alone if not within_any(path, graphs)]
        graphs = {owner: graph for owner, graph in graphs.items() if not within_any(owner, alone)}
        no_place = NO_GRAPH if tree.one_path else NO_PLACE
        fusions = []
        for group in groups:
            where = tree.places[group.name]
            if any(within_any(path, alone) for path in (tree.owner(group), *(where or ()))):
                continue
            reason = no_place if group.name in tree.unplaced else conflicts.get(group.name)
            reason = SHARED if group.name in tree.apart else reason
            if reason is not None:
                forms = group.values.values()
                walk.notes |= {node: Note(True, reason) for form in forms for node in walk.kernels(form)}
            if where is None or reason is not None or any(within_any(path, graphs) for path in where):
                continue
            title = next(path for path, new in where.items() if new is None)
            edits.show(f"{name}.{title}" if name else title)
            fusion = new_layer(walk, replace(group, name=title), verify)
            fusions.append(fusion)
            for path, new in where.items():
                old = module.get_submodule(path)
                edits.replaced[old] = (fusion.module if new is None else new).train(old.training)
        walk.notes = {node: note for node, note in walk.notes.items() if not tree.inside(node, alone)}
        found = [row for row in rows(walk, fusions) if not within_any(row.site, (*graphs, *alone))]
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
    return alone


def _conflicts(
    module: nn.Module, reading: Reading, tree: Tree, calls: Parts
) -> tuple[dict[str, str], list[str]]:
    """Groups that would be wrong for other arguments of the module or other sizes, by their names: why.

    And the parts to be read by themselves instead: all that differs is inside their own calls, which the
    other arguments and sizes that they get themselves decide.
    """
    placed = [group for group in tree.groups if tree.places[group.name] is not None]
    found: dict[str, str] = {}
    outside: set[str] = set()  # where code calls something inside of the owner
    for reason, other in calls.others(module, reading) if placed else ():
        if other is None:
            return {group.name: reason for group in placed} | found, []
        with split_norms(other.graph_module):
            walk = Extraction(other.graph_module)
            others = Tree(walk, module, grouped(walk), other.multi_argument_calls, True, tree.one_path)
            same: dict[frozenset[str], list[object]] = {}
            for group in others.groups:
                same.setdefault(frozenset(others.places[group.name] or ()), []).append(
                    others.outlines[group.name]
                )
            for group in placed:
                where, owner = tree.places[group.name] or {}, tree.owner(group)
                used = others.uses(where)
                # Where the module's own code fails, that of the parts which it has called by then is known.
                unknown = other.partial and (not used or owner == "")
                if unknown or (used and tree.outlines[group.name] not in same.get(frozenset(where), ())):
                    found.setdefault(group.name, reason)
                    if other.partial or not all(others.inside(node, [owner]) for node in used):
                        outside.add(group.name)
    owners = {tree.owner(group) for group in placed if group.name in found} - {""}
    mixed = [path for name in outside for path in tree.places[name] or ()]
    owners = {owner for owner in owners if not any(within(path, owner) for path in mixed)}
    return found, outermost(owners)


def _without_hooks(module: nn.Module) -> nn.Module:
    """A module with the same parts. Its hooks run around what is inside, which may be rewritten."""
    bare = copy.copy(module)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(bare)[name] = OrderedDict()
    vars(bare)["_modules"] = module._modules  # a graph module copies the modules that hold others
    return bare
