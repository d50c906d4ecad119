"""Fuse: every affine part of the graph becomes one layer, where that is exact and costs no more."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.errors import UnusableWeightError
from fxexpand.graph import extract, finish, fuse_calls
from fxexpand.kernel import cast
from fxexpand.lower import to_module
from fxexpand.ops import LAYERS, describe, kernel_of
from fxexpand.passes.affine import Run, Walk
from fxexpand.passes.result import Result, require_graph_module
from fxexpand.report import Action, Report, Row
from fxexpand.verify import block_error, require_small


@dataclass(frozen=True)
class Fuse:
    """Replace each run of affine calls by one layer, named after the first Linear or convolution in it.

    Affine are Linear, convolutions, BatchNorm in eval mode, and the sum of two affine maps of one value;
    Identity and idle Dropout in between vanish. What ``Expand`` did is undone, names included. Runs are left
    apart where one kernel would cost more multiply-adds, as in a bottleneck.

    Attributes:
        inplace: change the graph module that is given, not a copy of it.
    """

    inplace: bool = False

    def __call__(self, graph_module: fx.GraphModule) -> Result:
        """Run the pass; all kernels are folded, in float64, before the first edit.

        Raises:
            UnusableWeightError: what would be folded holds NaN or Inf.
            VerificationError: a new layer computes something else than what it replaces.
        """
        require_graph_module(graph_module, "Fuse")
        changed = graph_module if self.inplace else copy.deepcopy(graph_module)
        walk = Walk(changed)
        fusions = [_fusion(walk, name, runs) for name, runs in walk.maximal_runs().items()]
        report = Report("fuse", tuple(_rows(walk, fusions)))
        if not fusions:
            return Result(graph_module, False, report)
        for fusion in fusions:
            fuse_calls(changed, fusion.row.site, fusion.module, [run.nodes for run in fusion.runs])
        finish(changed, [target for fusion in fusions for target in fusion.targets])
        return Result(changed, True, report)


@dataclass(frozen=True, eq=False)
class _Fusion:
    """A new layer, the runs whose calls it takes, and the modules that go."""

    row: Row
    module: nn.Module
    runs: Sequence[Run]
    targets: Sequence[str]


def _fusion(walk: Walk, name: str, runs: Sequence[Run]) -> _Fusion:
    """The new layer: folded in float64, cast once, trainable where what it replaces is."""
    run = runs[0]
    for node in walk.kernels(run.nodes):
        _require_finite(str(node.target), walk.module(node))
    parts = [walk.module(node) for node in walk.kernels(run.nodes)]
    layers = [walk.module(node) for node in walk.layers(run.nodes)]
    first = layers[0].get_parameter("weight")
    with torch.no_grad():
        module = to_module(cast(run.fold(), first.dtype)).train(layers[0].training)
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    weight.requires_grad_(any(layer.get_parameter("weight").requires_grad for layer in layers))
    if bias is not None:
        given = [part._parameters["bias"] for part in parts]
        trains = [each.requires_grad for each in given if each is not None]
        bias.requires_grad_(any(trains) if trains else weight.requires_grad)
    error = None
    if not weight.is_meta:
        block = extract(walk.graph_module, run.nodes)
        error = require_small(block_error(block, kernel_of(module)), weight.dtype, name)
    targets = list(dict.fromkeys(str(node.target) for node in run.nodes if node.op == "call_module"))
    row = Row(
        site=name,
        kind=describe(module),
        action="fused",
        reason=f"one kernel for {', '.join(targets)}",
        params_before=sum(_count(part) for part in parts),
        params_after=_count(module),
        error=error,
    )
    return _Fusion(row, module, runs, targets)


def _rows(walk: Walk, fusions: Sequence[_Fusion]) -> list[Row]:
    """A row for each fusion and for each affine module that is left, in the graph's order."""
    fused = {target: fusion.row for fusion in fusions for target in fusion.targets}
    rows: dict[str, Row] = {}
    for node in walk.order:
        target = str(node.target)
        if node.op != "call_module":
            continue
        if target in fused:
            rows.setdefault(fused[target].site, fused[target])
        elif isinstance(walk.module(node), (*LAYERS, _BatchNorm)):
            refused, reason = walk.notes.get(target, (False, "nothing affine next to it"))
            action: Action = "refused" if refused else "left"
            kind, count = describe(walk.module(node)), _count(walk.module(node))
            rows[target] = Row(target, kind, action, reason, params_before=count, params_after=count)
    return list(rows.values())


def _require_finite(target: str, module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise UnusableWeightError(
                f"{target}.{name} ({describe(module)}): holds NaN or Inf, so what it folds to cannot be "
                "checked. Load a sound checkpoint."
            )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
