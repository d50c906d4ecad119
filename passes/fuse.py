"""Fuse: every affine part of the graph becomes one layer, where that is exact and costs no more."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.errors import InexactError, UnusableWeightError
from fxexpand.kernel.algebra import Kernel, cast
from fxexpand.kernel.lower import laid_out_as, to_module
from fxexpand.kernel.modules import LAYERS, describe
from fxexpand.passes.affine.candidates import Form
from fxexpand.passes.affine.extraction import Walk
from fxexpand.passes.affine.maps import Place
from fxexpand.passes.norms import shown, split_norms
from fxexpand.passes.result import Result, require_graph_module
from fxexpand.reporting.rows import Action, Report, Row
from fxexpand.running.copying import copied
from fxexpand.running.verify import fold_error, require_small
from fxexpand.tracing.edit import call_alone, call_instead, extract, finish, put, read_early


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

        Raises:
            UnusableWeightError: what would be folded holds NaN or Inf.
            VerificationError: a new layer computes something else than what it replaces.
        """
        require_graph_module(graph_module, "Fuse")
        changed = graph_module if self.inplace else copied(graph_module)
        reports = [self._once(changed)]
        while reports[-1].changed:  # a fold takes readers away, so that more may be merged
            reports.append(self._once(changed))
        report = combined(reports)
        return Result(changed if report.changed else graph_module, bool(report.changed), report)

    def _once(self, graph_module: fx.GraphModule) -> Report:
        with split_norms(graph_module):
            walk = Walk(graph_module)
            fusions = [new_layer(walk, group, self.verify) for group in grouped(walk)]
            found = Report("fuse", tuple(rows(walk, fusions)))
            carry_out(walk, fusions)
        return found


def combined(reports: Sequence[Report]) -> Report:
    """One report of passes one after the other: all that was fused, and what the last one left alone."""
    fused = [row for report in reports for row in report.changed]
    sites = {row.site for row in fused}
    rest = [row for row in reports[-1].rows if row.action == "refused" or row.site not in sites]
    return Report(reports[-1].title, (*fused, *(row for row in rest if row not in fused)))


@dataclass(frozen=True, eq=False)
class Fusion:
    """A new layer, and the values it computes.

    Attributes:
        name: of the layer.
        values: the nodes that it replaces, each with its form.
        targets: the modules and parameters that they called and read.
    """

    row: Row
    module: nn.Module
    name: str
    values: dict[fx.Node, Form]
    targets: Sequence[str]


@dataclass(frozen=True, eq=False)
class Group:
    """Values that one new layer is to compute, each with its form, and the name of that layer."""

    name: str
    values: dict[fx.Node, Form]


def grouped(walk: Walk) -> list[Group]:
    """What to fuse, calls of the same modules in the same way together; no numbers are computed yet."""
    groups: dict[object, dict[fx.Node, Form]] = {}
    for node, form in walk.chosen.items():
        groups.setdefault(_key(walk, form) or node, {})[node] = form
    gone = walk.gone()
    kept = {str(node.target) for node in walk.order if node.op == "call_module" and node not in gone}
    found = []
    for values in groups.values():
        name = _name(walk, next(iter(values.values())), kept)
        kept.add(name)
        found.append(Group(name, values))
    return found


def carry_out(walk: Walk, fusions: Sequence[Fusion]) -> None:
    """Rewrite the graph."""
    if not fusions:
        return
    changed = walk.graph_module
    new: dict[fx.Node, fx.Node] = {}
    for fusion in fusions:
        put(changed, fusion.name, fusion.module)
    values = {node: (fusion.name, form) for fusion in fusions for node, form in fusion.values.items()}
    nodes, shapes_read = list(walk.order), walk.shapes_read()
    for node in sorted(values, key=walk.order.__getitem__):
        name, form = values[node]
        source = new.get(form.source, form.source)
        place = nodes[max(form.start, form.last if form.before or form.after else 0)]
        new[node] = call_instead(changed, node, name, source, place, form.before, form.after)
    for reader, form in shapes_read.items():
        read_early(changed, reader, new.get(form.source, form.source), form.after)
    removable = {node for node in walk.order if node in walk.steps or node in walk.reader.constants}
    finish(changed, [target for fusion in fusions for target in fusion.targets], removable)


def rows(walk: Walk, fusions: Sequence[Fusion]) -> list[Row]:
    """A row for each fusion and for each affine operator that is left, in the graph's order."""
    fused: dict[fx.Node, Row] = {}
    for fusion in fusions:
        for form in fusion.values.values():
            fused.update(dict.fromkeys(walk.kernels(form), fusion.row))
    found: dict[tuple[str, str], Row] = {}
    for node in walk.order:
        if node in fused:
            found.setdefault((fused[node].site, "fused"), fused[node])
        module = walk.module(node) if node.op == "call_module" else None
        layer = type(module) in LAYERS or isinstance(module, _BatchNorm)
        refused, reason = walk.notes.get(node, (False, "nothing affine next to it"))
        if (node in fused and not refused) or not (layer or node in walk.notes) or node in walk.absorbed:
            continue
        site = shown(str(node.target)) if module is not None else node.name
        count = sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0
        kind = describe(module) if module is not None else _title(node)
        action: Action = "refused" if refused else "left"
        found.setdefault((site, action), Row(site, kind, action, reason, count, count))
    return list(found.values())


def _key(walk: Walk, form: Form) -> object:
    """The same for calls of the same modules in the same way, which one new layer may serve; else None."""
    nodes = walk.kernels(form)
    if any(node.op != "call_module" and node.target is not operator.add for node in nodes):
        return None
    return tuple((node.op, node.target) for node in walk.in_order(form))


def _name(walk: Walk, form: Form, kept: set[str]) -> str:
    """That of the first layer, or of the expanded layer all of whose factors are in the form."""
    first = form.layer
    assert first is not None
    name, site = str(first.target) if first.op == "call_module" else first.name, walk.site(first)
    mine = {str(node.target) for node in form.nodes}
    if site is not None and walk.factors(first) <= mine and not walk.factors(first) & kept:
        name = site
    number, free = 0, name
    while free in kept or ((number > 0 or first.op != "call_module") and _taken(walk, free)):
        number += 1
        free = f"{name}_{number}"
    return free


def _taken(walk: Walk, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    return hasattr(walk.graph_module.get_submodule(path), attribute)


@torch.inference_mode(False)  # whose tensors never train
def new_layer(walk: Walk, group: Group, verify: bool = True) -> Fusion:
    """The layer of a group, folded in float64 and cast once; nothing is changed yet.

    Raises:
        UnusableWeightError: what would be folded holds NaN or Inf.
        VerificationError: the layer computes something else than what it replaces.
    """
    name, values = group.name, group.values
    form = next(iter(values.values()))
    nodes = walk.in_order(form)
    parts = walk.kernels(form)
    reading = [node for node in nodes if node in parts or walk.reader.read(node)]  # ATen's BatchNorm too
    for node in reading:
        _require_finite(walk, node)
    assert form.layer is not None and form.map.shape is not None
    layers = [node for node in parts if walk.has_macs(node)]
    first = _weight(walk, form.layer)
    shape, (dtype,) = form.map.shape, form.dtypes
    with torch.no_grad():
        kernel = cast(form.map.at(Place(shape.in_channels, shape.rank, first.device)), dtype)
        if kernel.weight.ndim == first.ndim:
            kernel = replace(kernel, weight=laid_out_as(kernel.weight, first))
        module = to_module(kernel)
    holder = walk.module(form.layer) if form.layer.op == "call_module" else walk.graph_module
    module.train(holder.training)
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    weight.requires_grad_(any(_weight(walk, layer).requires_grad for layer in layers))
    if bias is not None:
        given = [tensor for node in reading for tensor in walk.reader.tensors(node)
                 if isinstance(tensor, nn.Parameter) and _is_bias(walk, node, tensor)]  # fmt: skip
        bias.requires_grad_(any(t.requires_grad for t in given) if given else weight.requires_grad)
    error = None
    if verify and not weight.is_meta:
        error = _error(walk, form, module, kernel)
        if error is not None:
            require_small(error, weight.dtype, name)
    held = {id(tensor): tensor for node in reading for tensor in walk.reader.tensors(node)}
    targets = [str(node.target) for node in parts if node.op == "call_module"]
    read = [name for node in reading for name in walk.reader.read(node)]
    described = dict.fromkeys([shown(target) for target in targets] + [node.name for node in parts
                              if node.op != "call_module" and node.target is not operator.add])  # fmt: skip
    row = Row(
        site=name,
        kind=describe(module),
        action="fused",
        reason=f"one kernel for {', '.join(described)}",
        params_before=sum(t.numel() for t in held.values() if isinstance(t, nn.Parameter)),
        params_after=sum(parameter.numel() for parameter in module.parameters()),
        error=error,
    )
    targets += [str(node.target) for node in nodes if node.op == "call_module"]
    return Fusion(row, module, name, values, list(dict.fromkeys([*targets, *read])))


def _error(walk: Walk, form: Form, module: nn.Module, kernel: Kernel) -> float | None:
    """The relative error on a probe; None where the nodes read sizes that only a run of the network knows."""
    probe, sizes = walk.probe(form)
    try:
        probed = extract(walk.graph_module, form.source, walk.in_order(form), sizes)
        alone = call_alone(walk.graph_module, module, form.source, form.before, form.after, sizes)
    except InexactError:
        return None
    return fold_error(probed, alone, kernel, probe)


def _weight(walk: Walk, layer: fx.Node) -> Tensor:
    """The weight of a layer, or the largest tensor that it is computed of."""
    if layer.op == "call_module" and isinstance(walk.module(layer)._parameters.get("weight"), Tensor):
        return walk.module(layer).get_parameter("weight")
    return max(walk.reader.tensors(layer), key=Tensor.numel)


def _is_bias(walk: Walk, node: fx.Node, tensor: Tensor) -> bool:
    if node.op == "call_module":
        return walk.module(node)._parameters.get("bias") is tensor
    return tensor.ndim <= 1


def _title(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _require_finite(walk: Walk, node: fx.Node) -> None:
    if node.op == "call_module":
        module = walk.module(node)
        held = [(f"{shown(str(node.target))}.{name} ({describe(module)})", tensor)
                for name, tensor in module.state_dict().items()]  # fmt: skip
    else:
        named = zip(walk.reader.read(node), walk.reader.tensors(node), strict=True)
        held = [(f"{name} (read by {node.name})", tensor) for name, tensor in named]
    for title, tensor in held:
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise UnusableWeightError(
                f"{title}: holds NaN or Inf, so what it folds to cannot be checked. Load a sound checkpoint."
            )
