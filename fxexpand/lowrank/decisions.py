"""Decisions on which layers to factor, with which cut and rank, before anything is changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fxexpand.errors import SelectionError
from fxexpand.layers.rewritten import kernel_like
from fxexpand.lowrank.allocation import Option, allocate
from fxexpand.lowrank.calibration import CallSizes, Moment, Tokens, observe_calls, observe_moments
from fxexpand.lowrank.costs import Costs, Target, timed_cuts, whole_cost
from fxexpand.lowrank.criteria import cut_of
from fxexpand.lowrank.cuts import Cut, Scheme, matrix_of, schemes_of
from fxexpand.lowrank.factorize_report import FactorRow
from fxexpand.lowrank.lp import lp_spectrum
from fxexpand.lowrank.options import FactorizeOptions
from fxexpand.lowrank.projection import COLUMNS, Spectrum, rank_of_share, spectrum, table_spectrum
from fxexpand.running.finite import require_finite
from fxexpand.running.flops import count_flops
from fxexpand.running.inputs import ExampleInputs

Progress: TypeAlias = Callable[[Iterable[Any]], Iterable[Any]]
READ = (
    "its weight is read outside of its forward, too, where the factors would be multiplied out each time. "
    "Call the layer instead"
)
Moments: TypeAlias = "dict[Scheme, Moment | Tokens]"
Choice: TypeAlias = "tuple[Cut | None, Option]"  # None leaves the target as it is


@dataclass(frozen=True, eq=False)
class Decision:
    """The decision on a target: a cut and its spectrum, or neither, with the reason in the row."""

    target: Target
    row: FactorRow
    cut: Cut | None = None
    spectrum: Spectrum | None = None

    @property
    def errors(self) -> tuple[float, float]:
        """Relative error of the weight in the Frobenius norm, measured, and the norm."""
        assert self.cut is not None and self.spectrum is not None
        matrix = self.spectrum.matrix
        unit = float(matrix.abs().max()) or 1.0
        left, right = self.spectrum.factors(self.cut.rank)
        lost = whole = 0.0
        for block, part in zip(
            torch.split(matrix, COLUMNS, -1), torch.split(right, COLUMNS, -1), strict=True
        ):
            wide = block.to(torch.float64) / unit
            lost += float((wide - left @ (part / unit)).square().sum())
            whole += float(wide.square().sum())
        return (lost / whole if whole else 0.0) ** 0.5, whole**0.5 * unit


@dataclass(frozen=True, eq=False)
class Analysis:
    """A target with its costs and its spectra by scheme; ``refusal`` is the reason for having no spectra."""

    target: Target
    costs: Costs
    spectra: dict[Scheme, Spectrum] = field(default_factory=dict)
    refusal: str = ""

    def unchanged(self, action: Literal["refused", "left"], reason: str) -> Decision:
        """The decision to leave the target as it is."""
        return Decision(self.target, self._row(action, reason))

    def factorized(self, cut: Cut) -> Decision:
        """The decision to factor the target."""
        target, costs, chosen = self.target, self.costs, self.spectra[cut.scheme]
        scheme = f"{cut.scheme}-wise, " if isinstance(target.modules[0], _ConvNd) else ""
        owners = f", shared by {len(target.modules)} layers" if len(target.modules) > 1 else ""
        row = replace(
            self._row("factorized", f"{scheme}rank {cut.rank} of {chosen.full}{owners}"),
            params_after=target.weight.numel() - costs.params + costs.params_of(cut),
            cut=cut,
            full_rank=chosen.full,
            flops_after=costs.flops_of(cut),
            data_error=float(chosen.errors[cut.rank]) ** 0.5 if chosen.by_data else None,
        )
        return Decision(target, row, cut, chosen)

    def _row(self, action: Literal["factorized", "refused", "left"], reason: str) -> FactorRow:
        target, count, flops = self.target, self.target.weight.numel(), self.costs.flops
        row = FactorRow(target.name, target.kind, action, reason, params_before=count, params_after=count)
        return replace(row, flops_before=flops, flops_after=flops)


def decide(
    model: nn.Module,
    targets: Sequence[Target],
    options: FactorizeOptions,
    example_inputs: ExampleInputs | None = None,
    calibration: Sequence[ExampleInputs] | None = None,
    progress: Progress = iter,
) -> tuple[list[Decision], float | None]:
    """A decision for each target, and the model's FLOPs where there are example inputs.

    Raises:
        SelectionError: a budget that cannot be met, or one that needs example inputs.
        UnusableWeightError: a weight holds NaN or Inf.
    """
    budget = options.budget
    if budget in ("flops", "latency") and example_inputs is None:
        raise SelectionError(f"{budget}={getattr(options, budget)}: give example_inputs, to measure by.")
    for target in targets:
        require_finite(target.weight, target.name, target.kind)
    calls: dict[nn.Module, CallSizes] = {}
    read: set[int] = set()
    total: float | None = None
    if example_inputs is not None:
        owners = [module for target in targets for module in target.modules]
        calls, read = observe_calls(model, owners, example_inputs)
        total = float(count_flops(model, example_inputs).total)
    schemes = [READ if id(target.weight) in read else _schemes(target, options) for target in targets]
    moments = _moments(model, targets, schemes, options, calibration)
    analyses: list[Analysis] = []
    for i in progress(range(len(targets))):
        costs = Costs(targets[i], calls, measured=example_inputs is not None)
        allowed = schemes[i]
        if isinstance(allowed, str):
            analyses.append(Analysis(targets[i], costs, refusal=allowed))
        else:
            spectra = _spectra(targets[i], allowed, options, moments[i])
            analyses.append(Analysis(targets[i], costs, spectra))
    if budget is None:
        return [_single_decision(analysis, options) for analysis in analyses], total
    choices = [_choices(analysis, budget, calls) for analysis in analyses]
    chosen = _allocated(choices, options, whole_cost(model, budget, example_inputs, total))
    decisions = [
        _budget_decision(analysis, _uncounted(analysis.target, budget, calls), cut, alone=len(some) == 1)
        for analysis, cut, some in zip(analyses, chosen, choices, strict=True)
    ]
    return decisions, total


def _schemes(target: Target, options: FactorizeOptions) -> tuple[Scheme, ...] | str:
    """The schemes by which a target may be cut, or the reason why there is none."""
    module = target.modules[0]
    if options.method == "lp" and isinstance(module, _ConvNd):
        return "method='lp' is for matrices: Linear and Embedding"
    possible = schemes_of(kernel_like(module, target.weight.detach()))
    if options.scheme is None or not isinstance(module, _ConvNd):
        return possible
    # With all taps on one axis, both schemes are the same cut.
    return (options.scheme,) if options.scheme in possible else possible[:1]


def _moments(
    model: nn.Module,
    targets: Sequence[Target],
    schemes: Sequence[tuple[Scheme, ...] | str],
    options: FactorizeOptions,
    calibration: Sequence[ExampleInputs] | None,
) -> list[Moments]:
    """Second moments of each target on the calibration data, by scheme.

    A shared weight has none: the layers that share it have different inputs.
    """
    moments: list[Moments] = [{} for _ in targets]
    if calibration is None:
        return moments
    if options.method == "lp":
        raise SelectionError("calibration: method='lp' goes by the weights alone.")
    observers: dict[nn.Module, list[Moment | Tokens]] = {}
    for own, target, allowed in zip(moments, targets, schemes, strict=True):
        if isinstance(allowed, str) or len(target.modules) > 1:
            continue
        [module], weight = target.modules, target.weight.detach()
        for scheme in allowed:
            if isinstance(module, nn.Embedding):
                own[scheme] = Tokens(weight.new_ones(len(weight), dtype=torch.float64))
            else:
                own[scheme] = Moment(kernel_like(module, weight), scheme)
        observers[module] = list(own.values())
    observe_moments(model, observers, calibration)
    return moments


def _spectra(
    target: Target, schemes: Iterable[Scheme], options: FactorizeOptions, moments: Moments
) -> dict[Scheme, Spectrum]:
    kernel = kernel_like(target.modules[0], target.weight.detach())
    spectra: dict[Scheme, Spectrum] = {}
    for scheme in schemes:
        matrix, moment = matrix_of(kernel, scheme), moments.get(scheme)
        if options.method == "lp":
            spectra[scheme] = lp_spectrum(matrix, options.p, options.body)
        elif isinstance(moment, Tokens):
            spectra[scheme] = table_spectrum(matrix, moment.count)
        else:
            spectra[scheme] = spectrum(matrix, moment.mean if moment else None)
    return spectra


def _single_decision(analysis: Analysis, options: FactorizeOptions) -> Decision:
    """The cheapest of the cuts that the criterion selects for one target, if it saves anything."""
    target, costs, spectra = analysis.target, analysis.costs, analysis.spectra
    if analysis.refusal:
        return analysis.unchanged("refused", analysis.refusal)
    named = _named_cut(target, options)
    if named is None and isinstance(options.rank, Mapping):
        return analysis.unchanged("left", "no rank is given for it")
    if not isinstance(named, Cut):
        cuts = [Cut(scheme, _rank(each, options, named)) for scheme, each in spectra.items()]
    elif named.scheme in spectra and named.rank <= spectra[named.scheme].full:
        cuts = [named]
    else:
        possible = ", ".join(f"{scheme} up to {each.full}" for scheme, each in spectra.items())
        raise SelectionError(
            f"rank: {target.name} ({target.kind}) has no cut ({named.scheme!r}, {named.rank}): "
            f"choose {possible}."
        )
    best = min(cuts, key=lambda cut: (costs.flops_of(cut), costs.params_of(cut)))
    # A cut named with its scheme is that of a factored model: estimated sizes cannot overrule it.
    if costs.saves(best) or (isinstance(named, Cut) and costs.estimated(best)):
        return analysis.factorized(best)
    unit, before, after = "FLOPs", costs.flops, costs.flops_of(best)
    if target.table or not costs.flops:
        unit, before, after = "parameters", costs.params, float(costs.params_of(best))
    change = f"costs {after / before:.2f} times its {unit}" if before else "saves nothing"
    return analysis.unchanged("refused", f"rank {best.rank} of {spectra[best.scheme].full} {change}")


def _named_cut(target: Target, options: FactorizeOptions) -> int | Cut | None:
    """The rank or cut that a mapping gives a target, under its own name or the path of one of its modules.

    Raises: SelectionError: two names of one weight have different ranks.
    """
    ranks = options.rank
    if not isinstance(ranks, Mapping):
        return None
    given = {name: cut_of(name, ranks[name]) for name in (target.name, *target.paths) if name in ranks}
    if len(set(given.values())) > 1:
        each = ", ".join(f"{name}: {value}" for name, value in given.items())
        raise SelectionError(f"rank: {each}: they are one weight. Give it one rank.")
    return next(iter(given.values()), None)


def _rank(spectrum: Spectrum, options: FactorizeOptions, named: int | None) -> int:
    rank = options.rank if named is None else named
    if options.energy is not None:
        return spectrum.rank_for(options.energy)
    if options.threshold is not None:
        above = (spectrum.singular_values() > options.threshold).any(0)  # of any group
        return max(1, int(above.sum()))
    if rank == "effective":
        return max(1, math.ceil(spectrum.effective_rank() - 1e-6))
    if isinstance(rank, float):
        return rank_of_share(rank, spectrum.full)
    assert isinstance(rank, int)
    return min(rank, spectrum.full)


def _choices(analysis: Analysis, budget: str, calls: Mapping[nn.Module, CallSizes]) -> list[Choice]:
    """The target as it is, then the cuts that save something, each with its cost and squared error."""
    costs, spectra = analysis.costs, analysis.spectra
    if _uncounted(analysis.target, budget, calls) is not None:
        return [(None, Option(0.0, 0.0))]
    if budget == "latency":
        before, timed = timed_cuts(analysis.target, spectra, calls)
        choices: list[Choice] = [(None, Option(before, 0.0))]
        for cut, seconds in timed:
            if costs.saves(cut):
                choices.append((cut, Option(seconds, float(spectra[cut.scheme].errors[cut.rank]))))
        return choices
    cost_of: Callable[[Cut], float] = costs.flops_of if budget == "flops" else costs.params_of
    choices = [(None, Option(float(costs.flops if budget == "flops" else costs.params), 0.0))]
    for scheme, each in spectra.items():
        errors = each.errors.tolist()
        cuts = (Cut(scheme, rank) for rank in range(1, each.full + 1))
        for cut in itertools.takewhile(costs.saves, cuts):
            choices.append((cut, Option(float(cost_of(cut)), errors[cut.rank])))
    return choices


def _allocated(
    choices: Sequence[Sequence[Choice]], options: FactorizeOptions, whole: float
) -> list[Cut | None]:
    """The cuts of small total error that meet the budget, for all targets together.

    Args:
        whole: the cost of the whole model.

    Raises: SelectionError: rank 1 everywhere costs more.
    """
    name = str(options.budget)
    value = getattr(options, name)
    limit = float(value) if isinstance(value, int) else value * whole
    fixed = whole - sum(some[0][1].cost for some in choices)
    try:
        allocation = allocate([[option for _, option in some] for some in choices], limit - fixed)
    except SelectionError:
        least = fixed + sum(min(option.cost for _, option in some) for some in choices)
        raise SelectionError(
            f"{name}={value}: rank 1 in all selected layers still leaves {least / whole:.3g} of the model's "
            f"{name} ({least:.4g} of {whole:.4g}). Ask for more than that, or select more layers."
        ) from None
    return [some[k][0] for some, k in zip(choices, allocation.chosen, strict=True)]


def _budget_decision(analysis: Analysis, uncounted: str | None, cut: Cut | None, *, alone: bool) -> Decision:
    """The decision on one target under a budget; ``alone``: no cut of it saves anything."""
    if analysis.refusal:
        return analysis.unchanged("refused", analysis.refusal)
    if uncounted is not None:
        return analysis.unchanged("left", uncounted)
    if cut is not None:
        return analysis.factorized(cut)
    if alone:
        return analysis.unchanged("refused", "no rank saves anything")
    return analysis.unchanged("left", "the budget is met without it")


def _uncounted(target: Target, budget: str, calls: Mapping[nn.Module, CallSizes]) -> str | None:
    """The reason why a target has no share of a budget; None if it has one."""
    if budget == "params":
        return None
    if not any(module in calls for module in target.modules):
        return "it is not called on the example inputs"
    if target.table:
        return "a look-up costs no FLOPs" if budget == "flops" else "a look-up is not timed"
    shared = budget == "latency" and len(target.modules) > 1
    return f"a weight shared by {len(target.modules)} layers is not timed" if shared else None
