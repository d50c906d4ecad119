"""The functions people call: expand, fuse, and what is known of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias, cast, get_args, overload

import torch
from torch import Tensor, nn

from fxexpand.errors import RefusedError, SelectionError
from fxexpand.passes.fixed_point import combined
from fxexpand.reporting.progress import at_work, progress_bar
from fxexpand.reporting.rows import Report
from fxexpand.running.copying import copied
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.outputs import outputs_of
from fxexpand.running.verify import require_same_outputs
from fxexpand.surgery.fold import expansion_factors, plan_folding
from fxexpand.surgery.placement import commit_fusing, plan_fusing
from fxexpand.surgery.transaction import (
    REPORT,
    Model,
    Plan,
    commit,
    commit_and_compare,
    require_module,
    restoring,
)
from fxexpand.tracing.export import module_of
from fxexpand.tracing.submodules import Parts

Scope: TypeAlias = Literal["all", "expanded"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@overload
def fuse(
    model: torch.export.ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    scope: Scope = "all",
    inplace: bool = False,
    strict: bool = False,
    verify: bool = True,
    progress: bool | None = None,
) -> nn.Module: ...


@overload
def fuse(
    model: Model,
    example_inputs: ExampleInputs | None = None,
    *,
    scope: Scope = "all",
    inplace: bool = False,
    strict: bool = False,
    verify: bool = True,
    progress: bool | None = None,
) -> Model: ...


def fuse(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    scope: Scope = "all",
    inplace: bool = False,
    strict: bool = False,
    verify: bool = True,
    progress: bool | None = None,
) -> nn.Module:
    """Fold every expansion, and every other affine part of the network, into the one kernel it computes.

    With ``scope="expanded"`` the result is the original network again: its class, its state-dict keys, shapes
    and dtypes, and its FLOPs. With ``"all"``, BatchNorm in evaluation mode goes into its neighbours, parallel
    branches become one layer, and so on; call ``model.eval()`` first. Nothing is merged that would then cost
    more. Classes are kept where modules alone change; where the calls between them change too, the smallest
    module that makes these calls becomes a GraphModule. What holds no graph is left, and its parts are fused.

    Products are formed in float64 and rounded once. BatchNorm inside an expansion folds by its running
    statistics, whatever the mode of the model. What was done, and what was not and why: ``report(result)``.

    Args:
        model: any module, traced or not, expanded or not; or a ``torch.export.ExportedProgram``, of which the
            result is a GraphModule.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. If given, the outputs
            before and after are compared, and the graph may rely on the number of dimensions they show.
        scope: ``"all"``, or ``"expanded"`` for nothing but what ``expand`` made.
        inplace: change ``model`` itself; by default a deep copy is changed.
        strict: a site that cannot be folded is an error.
        verify: compare every fold with what it replaces in float64, and the outputs if there are inputs.
        progress: show a bar on stderr; None shows it on a terminal once two seconds have passed.

    Raises:
        RefusedError: ``strict=True`` and a site is refused.
        VerificationError: a site or the outputs changed by more than rounding.
        UnusableWeightError: what would be folded holds NaN or Inf.
        SelectionError: an unknown scope, or ``inplace=True`` where the model itself would become a graph.

    An error leaves ``model`` as it was.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = module_of(model)
    require_module(model, "fuse")
    if scope not in SCOPES:
        raise SelectionError(f"scope={scope!r}: choose from {', '.join(SCOPES)}.")
    compared = example_inputs if verify else None
    before = outputs_of(model, compared) if compared is not None else []
    target = model if inplace else copied(model, shared=expansion_factors(model))
    plan = plan_folding(target, verify, progress_bar("fuse", progress))
    if scope == "expanded":
        commit_and_compare(target, plan, before, compared)
        return target
    with at_work("fuse", progress) as show:
        return _fused(target, plan, before, example_inputs, verify, strict, inplace, show)


def _fused(
    target: Model,
    folding: Plan,
    before: list[Tensor],
    example_inputs: ExampleInputs | None,
    verify: bool,
    strict: bool,
    inplace: bool,
    show: Callable[[str], None],
) -> Model:
    """Fold the expansions, then everything else; on an error ``target`` is as it was."""
    with restoring([*target.modules()]):
        commit(folding)
        result: nn.Module = target
        reports = [folding.report]
        one_path = False  # what holds in the parts with a graph goes first
        parts = Parts(result, example_inputs, one_path)
        while True:
            edits = plan_fusing(result, parts, verify, show)
            if inplace and target in edits.replaced:
                raise SelectionError(
                    f"{type(target).__name__}: fusing changes the calls in its own forward, so it becomes a "
                    "GraphModule. Take the result of fuse(model) instead of inplace=True."
                )
            result = commit_fusing(result, edits)
            reports.append(Report("fuse", tuple(edits.rows), edits.traced))
            if not reports[-1].changed:  # a fold takes readers away, so that more may follow
                if one_path or not edits.untraced or example_inputs is None:
                    break
                one_path = True
            parts = parts.after(result, one_path)
        found = replace(combined(reports), traced=reports[-1].traced)
        if strict and found.refusals:
            raise RefusedError(found.refusals[0].message)
        if before and example_inputs is not None and found.changed:
            require_same_outputs(before, result, example_inputs, len(found.changed), found.title)
    result.__dict__[REPORT] = found
    return cast(Model, result)
