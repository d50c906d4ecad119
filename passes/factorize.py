"""Factorize: every call of a Linear, convolution or Embedding becomes the calls of two cheaper layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from fxexpand.errors import InexactError, SelectionError
from fxexpand.lowrank.costs import Target, totals, unfit
from fxexpand.lowrank.criteria import checked
from fxexpand.lowrank.decisions import Decision, decide
from fxexpand.lowrank.factored import FACTORIZED, Factorized, factors
from fxexpand.lowrank.factorize_report import FactorizeReport, FactorRow
from fxexpand.lowrank.options import FactorizeOptions
from fxexpand.passes.planner import Plan, Step, commit, planned, require_lenient
from fxexpand.passes.result import Result, require_graph_module
from fxexpand.passes.sites import Site, find_sites
from fxexpand.recipes import Chain, Recipe
from fxexpand.recipes.selection import Select, Selection
from fxexpand.running.copying import copied
from fxexpand.running.inputs import ExampleInputs
from fxexpand.tracing.edit import ModuleUses, expand_calls, finish

ELSEWHERE = "Use fxexpand.factorize on the model before tracing"
Edit: TypeAlias = "tuple[Callable[[], None], tuple[nn.Module, ...]]"  # and the modules that it touches


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

    def __call__(self, graph_module: fx.GraphModule) -> Result:
        """Run the pass; all factors are computed before the first edit.

        Raises:
            SelectionError: an option out of range, a budget that cannot be met, a pattern without a match.
            RefusedError: ``strict`` and a layer is refused.
            UnusableWeightError: a selected weight holds NaN or Inf.
        """
        require_graph_module(graph_module, "Factorize")
        changed = graph_module if self.inplace else copied(graph_module)
        uses = ModuleUses(changed)

        def blocker(site: Site) -> str | None:
            reason = unfactorable(site) or uses.call_blocker(site.module)
            return reason and f"{reason}. {ELSEWHERE}"

        plan = plan_factoring(changed, self, blocker, partial(_calls_of_both, changed))
        if not plan.steps:
            return Result(graph_module, False, plan.report_on(changed))
        commit(plan)
        finish(changed)
        return Result(changed, True, plan.report_on(changed))


@dataclass(frozen=True)
class Factoring(Plan):
    """A plan, with the decisions that it carries out.

    Attributes:
        decisions: one for each weight that can be factored.
        params: the number of parameters before.
        flops: of the model before; None without example inputs.
    """

    decisions: tuple[Decision, ...] = ()
    params: int = 0
    flops: float | None = None

    def report_on(self, model: nn.Module) -> FactorizeReport:
        """The report with its totals, after the plan was committed; each row's error is measured here."""
        measured = {each.target.name: each.errors for each in self.decisions if each.cut is not None}
        rows: list[Any] = [step.row for step in self.all_steps]
        done = [replace(row, error=measured[row.site][0]) if row.site in measured else row for row in rows]
        lost = sum(error**2 * norm**2 for error, norm in measured.values())
        whole = sum(norm**2 for _, norm in measured.values())
        saved = sum(row.flops_before - row.flops_after for row in done)
        return FactorizeReport(
            "factorize",
            tuple(done),
            params_before=self.params,
            params_after=totals(model),
            flops_before=self.flops,
            flops_after=None if self.flops is None else self.flops - saved,
            error=(lost / whole) ** 0.5 if whole else None,
        )


@torch.inference_mode(False)  # whose tensors never train
def plan_factoring(
    model: nn.Module,
    options: Factorize,
    blocker: Callable[[Site], str | None],
    edit: Callable[[Decision], Edit],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Factoring:
    """Decide on every site of ``model``, and compute the factors; nothing is changed.

    Args:
        blocker: why a site cannot be factored; None if it can.
        edit: how a decision is carried out.

    Raises:
        SelectionError: an option out of range, a budget that cannot be met, a pattern without a match.
        RefusedError: ``options.strict`` and a selected site is refused.
        UnusableWeightError: a selected weight holds NaN or Inf.
    """
    options = checked(options)
    paths: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module] = (*paths.get(module, ()), path)
    targets: list[Target] = []

    def step(site: Site, recipe: Recipe) -> Step:
        reason = blocker(site)
        if reason is not None:
            raise InexactError(reason)
        assert site.weight is not None
        modules = [owner.module for owner in site.owners]
        modules.sort(key=lambda module: isinstance(module, nn.Embedding))
        known = tuple(path for module in modules for path in paths[module])
        targets.append(Target(site.name, site.kind, tuple(modules), site.weight, known))
        return Step(site.row("factorized", "", FactorRow))

    sites = _outside_of_factors(model, find_sites(model, options.example_inputs))
    plan = planned("factorize", sites, Selection(options.select, Chain()), step, row=FactorRow)
    decisions, flops = decide(model, targets, options, options.example_inputs, options.calibration, progress)
    _require_matched(options, targets)
    found = {decision.target.name: decision for decision in decisions}
    rows = [found[each.row.site].row if each.row.site in found else each.row for each in plan.all_steps]
    require_lenient(rows, options.strict)
    steps = [Step(row, *edit(found[row.site])) if row.action == "factorized" else Step(row) for row in rows]
    return Factoring("factorize", tuple(steps), tuple(decisions), totals(model), flops)


def unfactorable(site: Site) -> str | None:
    """Why the weight of a site cannot become that of two layers; None if it can."""
    assert site.weight is not None
    modules = [owner.module for owner in site.owners]
    named = all(owner.attribute == "weight" for owner in site.owners)
    if named and all(type(module) in FACTORIZED for module in modules):
        return unfit(modules, site.weight)
    other = next(m for m in modules if type(m) not in FACTORIZED or not named)
    kind = type(other).__name__
    if isinstance(other, nn.modules.conv._ConvNd | nn.Linear):
        return f"a {kind} has no factored form"
    return f"{kind} reads it as one matrix, in a forward of its own; two layers cannot stand in"


def _outside_of_factors(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    inside = {
        part for module in model.modules() if isinstance(module, Factorized) for part in module.children()
    }
    return [site for site in sites if site.module not in inside]


def _require_matched(options: Factorize, targets: Sequence[Target]) -> None:
    """Raises: SelectionError: a mapping of ranks names a layer that is not there."""
    named = options.rank if isinstance(options.rank, Mapping) else {}
    known = {name for target in targets for name in (target.name, *target.paths)}
    missing = [name for name in named if name not in known]
    if missing:
        some = ", ".join(target.name for target in targets[:8])
        raise SelectionError(
            f"rank: {', '.join(missing)}: no layer of that name can be factored. "
            f"There are: {some}{', ...' if len(targets) > 8 else ''}."
        )


def _calls_of_both(graph_module: fx.GraphModule, decision: Decision) -> Edit:
    """The calls of two layers in place of those of one."""
    assert decision.cut is not None and decision.spectrum is not None
    (module,), (path, *_) = decision.target.modules, decision.target.paths
    pair = factors(module, decision.cut, *decision.spectrum.factors(decision.cut.rank))
    block = nn.Sequential(*pair).train(module.training)
    parent = graph_module.get_submodule(path.rpartition(".")[0])
    return partial(expand_calls, graph_module, path, block), (graph_module, parent)
