"""``fuse``: fold expansions and every other affine part of a model, round after round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor, nn

from fxexpand.errors import SelectionError
from fxexpand.passes.folding import plan_folding
from fxexpand.passes.planner import commit, require_lenient, restoring, to_fixed_point
from fxexpand.reporting.progress import at_work, progress_bar
from fxexpand.reporting.rows import Report
from fxexpand.running.copying import copied
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.outputs import outputs_of
from fxexpand.running.verify import require_same_outputs
from fxexpand.surgery.fold import expansion_factors
from fxexpand.surgery.fuse_plan import FusePlan, commit_fusing, plan_fusing
from fxexpand.surgery.transaction import REPORT, Model, commit_and_compare, require_module
from fxexpand.tracing.export import module_of
from fxexpand.tracing.guards import mode_of
from fxexpand.tracing.submodules import Parts
from fxexpand.tracing.tracer import FAILURES

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
    in_training = _outputs_in_training(model, compared) if compared is not None else []
    target = model if inplace else copied(model, shared=expansion_factors(model))
    plan = plan_folding(target, verify, progress_bar("fuse", progress))
    if scope == "expanded":
        require_lenient(plan.report.rows, strict)
        commit_and_compare(target, plan, before, compared)
        return target
    with at_work("fuse", progress) as show, restoring([*target.modules()]):
        commit(plan)
        rounds = _Rounds(target, example_inputs, verify, inplace, show)
        report = to_fixed_point(rounds.fold, [plan.report])
        require_lenient(report.rows, strict)
        if before and compared is not None and report.changed:
            trains = mode_of(rounds.model) == "train"
            expected = in_training if trains else before
            require_same_outputs(
                expected, rounds.model, compared, len(report.changed), report.title, as_it_is=trains
            )
    rounds.model.__dict__[REPORT] = report
    return rounds.model


def _outputs_in_training(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """The outputs of a model that is in training mode: a graph of it may hold in that mode only."""
    try:
        return outputs_of(model, example_inputs, as_it_is=True) if model.training else []
    except FAILURES:  # of a BatchNorm for one image, say; nothing is compared then
        return []


class _Rounds:
    """Rounds of folds in a model that is changed; ``model`` is the result so far.

    The graphs of all paths go first. Once nothing changes any more, parts that have none are read along the
    path of their inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs | None,
        verify: bool,
        inplace: bool,
        show: Callable[[str], None],
    ) -> None:
        self.model = model
        self._has_inputs = example_inputs is not None
        self._parts = Parts(model, example_inputs)
        self._one_path = False
        self._verify = verify
        self._inplace = inplace
        self._show = show

    def fold(self) -> Report:
        """Plan and commit one round."""
        plan = self._round()
        if not plan.report.changed and plan.untraced and not self._one_path and self._has_inputs:
            self._one_path = True
            plan = self._round()
        return plan.report

    def _round(self) -> FusePlan:
        self._parts = self._parts.after(self.model, self._one_path)
        plan = plan_fusing(self.model, self._parts, self._verify, self._show)
        if self._inplace and self.model in plan.replaced:
            raise SelectionError(
                f"{type(self.model).__name__}: fusing changes the calls in its own forward, so it becomes a "
                "GraphModule. Take the result of fuse(model) instead of inplace=True."
            )
        self.model = commit_fusing(self.model, plan)
        return plan
