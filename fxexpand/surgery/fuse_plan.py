"""The plan of one round of ``fuse`` over a tree of modules, and its commit.

A layer takes the place of modules where that keeps every class. Otherwise the smallest module that holds all
of its nodes becomes a GraphModule. Where a module has no graph of all paths through its code, its parts are
fused on their own, and then rows of modules that every path has.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.kernel.modules import LAYERS, describe
from fxexpand.layers.rewritten import Rewritten
from fxexpand.passes.fuse import Fuse
from fxexpand.passes.fusions import Fusion, new_layers
from fxexpand.passes.norms import split_norms
from fxexpand.reporting.rows import Report, Row
from fxexpand.running.copying import keep_attributes
from fxexpand.surgery.graph_plan import GraphPlan, plan_graph
from fxexpand.tracing.edit import ModuleUses
from fxexpand.tracing.guards import guard_tensors
from fxexpand.tracing.recording import Failed
from fxexpand.tracing.submodules import Parts, Reading
from fxexpand.tracing.tracer import HOOKS, hooked

ONE_GRAPH = "as one graph"


@dataclass
class FusePlan:
    """The edits of one round.

    Attributes:
        replaced: new modules by those in whose place they are put.
        rows: the rows of the report.
        graphs: how many parts were traced.
        untraced: why the whole was not traced; "" if it was.
    """

    replaced: dict[nn.Module, nn.Module] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    graphs: int = 0
    untraced: str = ""

    @property
    def report(self) -> Report:
        """The report of the round, with how the model was read."""
        in_parts = f"in parts, {self.graphs} of them a graph; the whole has none: {self.untraced}"
        return Report("fuse", tuple(self.rows), in_parts if self.untraced else ONE_GRAPH)


def plan_fusing(model: nn.Module, parts: Parts, verify: bool, show: Callable[[str], None]) -> FusePlan:
    """Fuse every graph in ``model`` that can be traced; the model is not touched.

    Args:
        parts: those of ``model``.
        show: takes the name of each part and layer when it is worked on.

    Raises: VerificationError: a new layer computes something else than what it replaces.
    """
    planner = _Planner(model, parts, verify, show)
    planner.visit("", model)
    planner.refuse_unseen(model)
    return planner.plan


def commit_fusing(model: nn.Module, plan: FusePlan) -> nn.Module:
    """Carry a plan out; returns the model, which is a new one where the root itself was replaced."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in plan.replaced:
                parent._modules[name] = plan.replaced[child]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Rewritten) and (layer := child.remaining_layer()) is not None:
                parent._modules[name] = layer  # a pair of full rank is one layer again
    return plan.replaced.get(model, model)


class _Planner:
    """Plans the graphs of a model, from the root to the parts; ``seen`` has the modules that are done."""

    def __init__(self, model: nn.Module, parts: Parts, verify: bool, show: Callable[[str], None]) -> None:
        self._modules = set(model.modules())
        self._parts = parts
        self._verify = verify
        self._show = show
        self._seen: set[nn.Module] = set()
        self.plan = FusePlan()

    def visit(self, name: str, module: nn.Module) -> None:
        """Fuse the graph of a module; where it has none, those of its children."""
        if module in self._seen:
            return
        self._seen.add(module)
        self._show(name or type(module).__name__)
        reading = self._parts.traced(module)
        if isinstance(reading, Failed):
            if hooked(module) and "forward" not in vars(module):
                self.visit(name, _without_hooks(module))
            else:
                self._visit_children(name, module, reading.reason)
            return
        self.plan.graphs += 1
        if reading.failure is not None and not name:
            self.plan.untraced = reading.failure.reason
        self._visit_called(name, module, reading.traced.graph_module)
        for path in self._fuse_graph(name, module, reading):
            part = module.get_submodule(path)
            self._seen.difference_update(part.modules())
            self.visit(_joined(name, path), part)

    def _visit_children(self, name: str, module: nn.Module, failure: str) -> None:
        """Fuse the children of a module without a graph; layers among them are refused."""
        self.plan.untraced = self.plan.untraced if name else failure
        reason = f"{name or type(module).__name__} cannot be traced: {failure}"
        reason += "" if self._parts.given(module) is not None else "; example_inputs may help"
        for child_name, child in module.named_children():
            if _is_affine(child):
                self._refuse(_joined(name, child_name), child, reason)
                self._seen.add(child)
            else:
                self.visit(_joined(name, child_name), child)

    def _visit_called(self, name: str, module: nn.Module, graph_module: fx.GraphModule) -> None:
        """Fuse the modules that a graph calls as a whole, by graphs of their own."""
        parts, around = dict(module.named_modules()), ModuleUses(graph_module).around
        for node in graph_module.graph.find_nodes(op="call_module"):
            part = parts.get(str(node.target))
            whole = type(part).__module__.startswith("torch.nn.") and not isinstance(part, nn.Sequential)
            if part is not None and not whole and part not in around and _children_hold_tensors(part):
                self.visit(_joined(name, str(node.target)), part)
        self._seen.update(set(parts.values()) - {inner for part in around for inner in part.modules()})

    def _fuse_graph(self, name: str, module: nn.Module, reading: Reading) -> list[str]:
        """Fuse one graph; returns the paths of modules in it that are left, to be read by themselves."""
        with split_norms(reading.traced.graph_module):
            plan = plan_graph(module, reading, self._parts, part=bool(name))
            rows = plan.rows(self._place(name, module, plan))
        for path, graph_module in plan.graphs.items():
            old = module.get_submodule(path)
            if old not in self._modules:  # the copy of a module with hooks
                continue
            guard_tensors(graph_module)
            result = Fuse(inplace=True, verify=self._verify)(graph_module)
            if result.report.changed:
                keep_attributes(result.graph_module, old)
                self.plan.replaced[old] = result.graph_module
            rows += [replace(row, site=_joined(path, row.site)) for row in result.report.rows]
        self.plan.rows += [replace(row, site=_joined(name, row.site)) for row in rows]
        return [*plan.alone]

    def _place(self, name: str, module: nn.Module, plan: GraphPlan) -> list[Fusion]:
        """Make the layers of a graph, and put them in place of modules."""
        placed = {replace(group, name=placement.layer): placement for group, placement in plan.placed}
        fusions = new_layers(
            plan.extraction, placed, self._verify, lambda layer: self._show(_joined(name, layer))
        )
        for fusion in fusions:
            placement = placed[fusion.group]
            for path, new in {placement.layer: fusion.module, **placement.others}.items():
                old = module.get_submodule(path)
                self.plan.replaced[old] = new.train(old.training)
        return fusions

    def refuse_unseen(self, model: nn.Module) -> None:
        """A row for each layer and BatchNorm that no graph calls."""
        sites = {row.site for row in self.plan.rows}
        for name, module in model.named_modules():
            if _is_affine(module) and module not in self._seen and name not in sites:
                self._refuse(name, module, "no graph that can be traced calls it")

    def _refuse(self, name: str, module: nn.Module, reason: str) -> None:
        count = sum(parameter.numel() for parameter in module.parameters())
        self.plan.rows.append(Row(name, describe(module), "refused", reason, count, count))


def _is_affine(module: nn.Module) -> bool:
    return type(module) in LAYERS or isinstance(module, _BatchNorm)


def _children_hold_tensors(module: nn.Module) -> bool:
    """Whether a child has parameters or buffers: without them, there is no layer inside to fuse."""
    tensors = (chain(child.parameters(), child.buffers()) for child in module.children())
    return any(True for _ in chain.from_iterable(tensors))


def _joined(name: str, path: str) -> str:
    return f"{name}.{path}" if name and path else name or path


def _without_hooks(module: nn.Module) -> nn.Module:
    """A copy without hooks, of the same parts: hooks run around these, which may be rewritten."""
    bare = copy.copy(module)
    for name in HOOKS:
        vars(bare)[name] = OrderedDict()
    vars(bare)["_modules"] = module._modules  # a graph module copies the modules that hold others
    return bare
