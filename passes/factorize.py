"""Factorize: every call of a Linear, convolution or Embedding becomes the calls of two cheaper layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn
from torch.nn.parameter import is_lazy

from fxexpand.errors import RefusedError, SelectionError
from fxexpand.kernel.modules import describe
from fxexpand.lowrank.costs import Target, totals, unfit
from fxexpand.lowrank.criteria import TRP_THRESHOLD, Approach, Criterion
from fxexpand.lowrank.decisions import Decision, decide
from fxexpand.lowrank.factored import FACTORIZED, factors
from fxexpand.lowrank.factorize_report import FactorizeReport, FactorRow
from fxexpand.lowrank.options import FactorizeOptions
from fxexpand.passes.result import Result, require_graph_module
from fxexpand.recipes import Chain
from fxexpand.recipes.selection import Select, Selection
from fxexpand.running.copying import copied
from fxexpand.running.inputs import ExampleInputs
from fxexpand.tracing.edit import ModuleUses, expand_calls, finish, operand, site_of
from fxexpand.tracing.graphs import hooked

ELSEWHERE = "Use fxexpand.factorize on the model before tracing"


@dataclass(frozen=True)
class Factorize(FactorizeOptions):
    """Replace the layers that the graph calls by two cheaper ones each, of lower rank.

    Only layers whose calls are all there is to them, as for ``Expand``. ``Fuse`` leaves the pairs alone as
    long as one layer would cost more.

    Attributes:
        rank, energy, threshold, flops, params, latency: how ranks are chosen, exactly one of them;
            method="trp" without any of them goes by its own threshold.
        method, p, body, scheme: how weights are approximated.
        select: which layers.
        example_inputs: to measure FLOPs and latency by.
        calibration: batches of inputs, on which outputs are to be approximated instead of weights.
        strict: a selected layer that cannot be factored is an error.
        inplace: change the graph module that is given, not a copy of it.

    All are explained at ``fxexpand.factorize``.
    """

    select: Select = None
    example_inputs: ExampleInputs | None = None
    calibration: Sequence[ExampleInputs] | None = None
    strict: bool = False
    inplace: bool = False

    @property
    def criterion(self) -> Criterion:
        """How ranks are chosen.

        Raises: SelectionError: not exactly one criterion, or one out of range.
        """
        given = (self.rank, self.energy, self.threshold, self.flops, self.params, self.latency)
        if self.method == "trp" and all(value is None for value in given):
            return Criterion(threshold=TRP_THRESHOLD)
        return Criterion(*given)

    @property
    def approach(self) -> Approach:
        """How weights are approximated.

        Raises: SelectionError: an unknown method or scheme.
        """
        return Approach(self.method, self.p, self.body, self.scheme)

    def __call__(self, graph_module: fx.GraphModule) -> Result:
        """Run the pass; all factors are computed before the first edit.

        Raises:
            SelectionError: an option out of range, a budget that cannot be met, a pattern without a match.
            RefusedError: ``strict`` and a layer is refused.
            UnusableWeightError: a selected weight holds NaN or Inf.
        """
        require_graph_module(graph_module, "Factorize")
        criterion, approach = self.criterion, self.approach
        changed = graph_module if self.inplace else copied(graph_module)
        rows, targets = _targets(changed, Selection(self.select, Chain()))
        decisions, flops = decide(
            changed, targets, criterion, approach, self.example_inputs, self.calibration
        )
        found = {decision.target.name: decision for decision in decisions}
        require_matched(criterion, targets)
        table = [found[name].row if row is None else row for name, row in rows.items()]
        require_lenient(table, self.strict)
        blocks = {name: _block(decision) for name, decision in found.items() if decision.cut is not None}
        before = totals(changed)
        for name, block in blocks.items():
            expand_calls(changed, name, block)
        if blocks:
            finish(changed)
        report = summed(table, decisions, before, totals(changed), flops)
        return Result(changed if blocks else graph_module, bool(blocks), report)


def require_matched(criterion: Criterion, targets: Sequence[Target]) -> None:
    """Raises: SelectionError: a mapping of ranks names a layer that is not there."""
    named = criterion.rank if isinstance(criterion.rank, Mapping) else {}
    known = {name for target in targets for name in (target.name, *target.paths)}
    missing = [name for name in named if name not in known]
    if missing:
        some = ", ".join(target.name for target in targets[:8])
        raise SelectionError(
            f"rank: {', '.join(missing)}: no layer of that name can be factored. "
            f"There are: {some}{', ...' if len(targets) > 8 else ''}."
        )


def require_lenient(rows: Sequence[FactorRow], strict: bool) -> None:
    """Raises: RefusedError: ``strict`` and a row is a refusal."""
    refused = next((row for row in rows if row.action == "refused"), None)
    if strict and refused is not None:
        raise RefusedError(refused.message)


def summed(
    rows: Sequence[FactorRow],
    decisions: Sequence[Decision],
    before: int,
    after: int,
    flops: float | None,
) -> FactorizeReport:
    """The report, with its totals; the error of each factored row is measured here."""
    measured = {decision.target.name: decision.errors for decision in decisions if decision.cut is not None}
    done = [replace(row, error=measured[row.site][0]) if row.site in measured else row for row in rows]
    lost = sum(error**2 * norm**2 for error, norm in measured.values())
    whole = sum(norm**2 for _, norm in measured.values())
    saved = sum(row.flops_before - row.flops_after for row in done)
    return FactorizeReport(
        "factorize",
        tuple(done),
        params_before=before,
        params_after=after,
        flops_before=flops,
        flops_after=None if flops is None else flops - saved,
        error=(lost / whole) ** 0.5 if whole else None,
    )


def _targets(
    graph_module: fx.GraphModule, selection: Selection
) -> tuple[dict[str, FactorRow | None], list[Target]]:
    """A row for each matrix of the graph, None for those to decide on, and these."""
    uses = ModuleUses(graph_module)
    rows: dict[str, FactorRow | None] = {}
    targets: list[Target] = []
    for node in graph_module.graph.find_nodes(op="call_module"):
        name = str(node.target)
        module = graph_module.get_submodule(name)
        parameters = list(module.parameters())
        if name in rows or not any(is_lazy(each) or each.ndim >= 2 for each in parameters):
            continue
        count = sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))
        row = FactorRow(name, describe(module), "refused", "", params_before=count, params_after=count)
        chosen = selection.recipe_for(name, module) is not None
        if site_of(name, module) is not None:
            rows[name] = replace(row, action="left", reason="a factor of a layer that was rewritten")
        elif not chosen:
            rows[name] = replace(row, action="left", reason="not selected")
        else:
            reason = _blocker(uses, module)
            rows[name] = replace(row, reason=f"{reason}. {ELSEWHERE}") if reason else None
            if reason is None:
                targets.append(Target(name, describe(module), (module,), module.get_parameter("weight")))
    selection.require_used(rows)
    return rows, targets


def _blocker(uses: ModuleUses, module: nn.Module) -> str | None:
    if type(module) not in FACTORIZED:
        return "no Linear, Conv or Embedding of torch itself"
    if hooked(module):
        return "it has hooks or a forward of its own, which its replacement would not have"
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight):
        return "its weight is no parameter with values"
    blocker = uses.blocker(module) or unfit((module,), weight)
    if blocker is None and any(operand(call) is None for call in uses.calls[id(module)]):
        return "it is called with more than its input"
    return blocker


def _block(decision: Decision) -> nn.Sequential:
    assert decision.cut is not None and decision.spectrum is not None
    module = decision.target.modules[0]
    first, second = factors(module, decision.cut, *decision.spectrum.factors(decision.cut.rank))
    return nn.Sequential(first, second).train(module.training)
