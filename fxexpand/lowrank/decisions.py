"""Which layers to factor, where to cut them and at which rank: decided before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxexpand.errors import SelectionError
from fxexpand.layers.rewritten import kernel_like
from fxexpand.lowrank.allocation import Option, allocate
from fxexpand.lowrank.calibration import Moment, Seen, Tokens, sizes, watch_moments
from fxexpand.lowrank.costs import Costs, Target, timed_cuts, whole_cost
from fxexpand.lowrank.criteria import Approach, Criterion, Ranks, cut_of
from fxexpand.lowrank.cuts import Cut, Scheme, matrix_of, schemes_of
from fxexpand.lowrank.factorize_report import FactorRow
from fxexpand.lowrank.lp import lp_spectrum
from fxexpand.lowrank.projection import COLUMNS, Spectrum, of_tokens, rank_of_share, spectrum
from fxexpand.running.finite import require_finite
from fxexpand.running.flops import count_flops
from fxexpand.running.inputs import ExampleInputs

Progress: TypeAlias = Callable[[Iterable[Any]], Iterable[Any]]
READ = (
    "its weight is read outside of its forward, too, where the factors would be multiplied out each time. "
    "Call the layer instead"
)
Found: TypeAlias = "dict[Scheme, Spectrum] | str"  # by scheme, or why there is none


@dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of a target: a cut and its spectrum, or neither, with the reason in the row."""

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


def totals(model: nn.Module) -> int:
    """The number of parameters, shared ones once."""
    known = (parameter for parameter in model.parameters() if not is_lazy(parameter))
    return sum({id(parameter): parameter.numel() for parameter in known}.values())


def decide(
    model: nn.Module,
    targets: Sequence[Target],
    criterion: Criterion,
    approach: Approach,
    example_inputs: ExampleInputs | None = None,
    calibration: Sequence[ExampleInputs] | None = None,
    progress: Progress = iter,
) -> tuple[list[Decision], float | None]:
    """A decision for each target, and the model's FLOPs where there are example inputs.

    Raises:
        SelectionError: a budget that cannot be met, or one that needs example inputs.
        UnusableWeightError: a weight holds NaN or Inf.
    """
    budget = criterion.budget
    if budget in ("flops", "latency") and example_inputs is None:
        raise SelectionError(f"{budget}={getattr(criterion, budget)}: give example_inputs, to measure by.")
    for target in targets:
        require_finite(target.weight, target.name, target.kind)
    seen: dict[nn.Module, Seen] = {}
    read: set[int] = set()
    total: float | None = None
    if example_inputs is not None:
        owners = [module for target in targets for module in target.modules]
        seen, read = sizes(model, owners, example_inputs)
        total = float(count_flops(model, example_inputs).total)
    costs = [Costs(target, seen, measured=example_inputs is not None) for target in targets]
    schemes = [READ if id(target.weight) in read else _schemes(target, approach) for target in targets]
    spectra = _spectra(model, targets, schemes, approach, calibration, progress)
    if budget is None:
        judged = [
            _judged(target, cost, found, criterion)
            for target, cost, found in zip(targets, costs, spectra, strict=True)
        ]
        return judged, total
    return _allocated(model, targets, costs, spectra, criterion, example_inputs, total, seen), total


def _spectra(
    model: nn.Module,
    targets: Sequence[Target],
    schemes: Sequence[tuple[Scheme, ...] | str],
    approach: Approach,
    calibration: Sequence[ExampleInputs] | None,
    progress: Progress,
) -> list[Found]:
    """The spectra of each target, by scheme, or why it has none."""
    moments: dict[tuple[int, Scheme], Moment | Tokens] = {}
    if calibration is not None:
        if approach.method == "lp":
            raise SelectionError("calibration: method='lp' goes by the weights alone.")
        takers: dict[nn.Module, list[Any]] = {}
        for i, (target, some) in enumerate(zip(targets, schemes, strict=True)):
            if isinstance(some, str) or len(target.modules) > 1:
                continue  # owners of a shared weight see different data
            [module], weight = target.modules, target.weight.detach()
            for scheme in some:
                taker: Moment | Tokens
                if isinstance(module, nn.Embedding):
                    taker = Tokens(weight.new_ones(len(weight), dtype=torch.float64))
                else:
                    taker = Moment(kernel_like(module, weight), scheme)
                moments[i, scheme] = taker
                takers.setdefault(module, []).append(taker)
        watch_moments(model, takers, calibration)
    found: list[Found] = []
    for i in progress(range(len(targets))):
        some = schemes[i]
        if isinstance(some, str):
            found.append(some)
            continue
        kernel = kernel_like(targets[i].modules[0], targets[i].weight.detach())
        spectra: dict[Scheme, Spectrum] = {}
        for scheme in some:
            matrix, moment = matrix_of(kernel, scheme), moments.get((i, scheme))
            if approach.method == "lp":
                spectra[scheme] = lp_spectrum(matrix, approach.p, approach.body)
            elif isinstance(moment, Tokens):
                spectra[scheme] = of_tokens(matrix, moment.count)
            else:
                spectra[scheme] = spectrum(matrix, moment.mean if moment else None)
        found.append(spectra)
    return found


def _schemes(target: Target, approach: Approach) -> tuple[Scheme, ...] | str:
    module = target.modules[0]
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    if approach.method == "lp" and convolution:
        return "method='lp' is for matrices: Linear and Embedding"
    kernel = kernel_like(module, target.weight.detach())
    some = schemes_of(kernel)
    if approach.scheme is None or not convolution:
        return some
    return (approach.scheme,) if approach.scheme in some else some[:1]  # with taps on one axis they are one


def _judged(target: Target, costs: Costs, found: Found, criterion: Criterion) -> Decision:
    """One layer by itself: the cheapest of the cuts that the criterion asks for."""
    if isinstance(found, str):
        return Decision(target, _row(target, costs, "refused", found))
    cuts = _asked(target, found, criterion)
    if cuts is None:
        return Decision(target, _row(target, costs, "left", "no rank is given for it"))
    if not cuts:
        asked = _named(target, criterion.rank)
        assert isinstance(asked, Cut)
        some = ", ".join(f"{scheme} up to {each.full}" for scheme, each in found.items())
        raise SelectionError(
            f"rank: {target.name} ({target.kind}) has no cut ({asked.scheme!r}, {asked.rank}): choose {some}."
        )
    best = min(cuts, key=lambda cut: (costs.flops_of(cut), costs.params_of(cut)))
    # A cut that was named with its scheme is that of a factored model: guessed sizes cannot overrule it.
    named = isinstance(_named(target, criterion.rank), Cut)
    if not costs.saves(best) and not (named and costs.guessed(best)):
        by, before, after = "FLOPs", costs.flops, costs.flops_of(best)
        if target.table or not costs.flops:
            by, before, after = "parameters", costs.params, float(costs.params_of(best))
        full = found[best.scheme].full
        reason = (
            f"rank {best.rank} of {full} costs {after / before:.2f} times its {by}"
            if before
            else f"rank {best.rank} of {full} saves nothing"
        )
        return Decision(target, _row(target, costs, "refused", reason))
    return _decision(target, costs, found, best)


def _asked(target: Target, found: dict[Scheme, Spectrum], criterion: Criterion) -> list[Cut] | None:
    """The cuts that a criterion asks for, one per scheme; None where it names others."""
    if isinstance(criterion.rank, Mapping):
        given = _named(target, criterion.rank)
        if given is None:
            return None
        if isinstance(given, int):
            return [Cut(scheme, min(given, spectrum.full)) for scheme, spectrum in found.items()]
        return [given] if given.scheme in found and given.rank <= found[given.scheme].full else []
    return [Cut(scheme, _rank(spectrum, criterion)) for scheme, spectrum in found.items()]


def _named(target: Target, rank: Ranks | None) -> int | Cut | None:
    """What a mapping of ranks says of a target, under its own name or the path of one of its modules.

    Raises: SelectionError: two names of one weight have different ranks.
    """
    if not isinstance(rank, Mapping):
        return None
    given = {name: cut_of(name, rank[name]) for name in (target.name, *target.paths) if name in rank}
    if len(set(given.values())) > 1:
        each = ", ".join(f"{name}: {value}" for name, value in given.items())
        raise SelectionError(f"rank: {each}: they are one weight. Give it one rank.")
    return next(iter(given.values()), None)


def _rank(found: Spectrum, criterion: Criterion) -> int:
    rank = criterion.rank
    if criterion.energy is not None:
        return found.rank_for(criterion.energy)
    if criterion.threshold is not None:
        above = (found.singular_values() > criterion.threshold).any(0)  # of any group
        return max(1, int(above.sum()))
    if rank == "effective":
        return max(1, math.ceil(found.effective_rank() - 1e-6))
    if isinstance(rank, float):
        return rank_of_share(rank, found.full)
    assert isinstance(rank, int)
    return min(rank, found.full)


def _allocated(
    model: nn.Module,
    targets: Sequence[Target],
    costs: Sequence[Costs],
    spectra: Sequence[Found],
    criterion: Criterion,
    example_inputs: ExampleInputs | None,
    total: float | None,
    seen: Mapping[nn.Module, Seen],
) -> list[Decision]:
    """All layers together: the cuts of small total error that meet the budget."""
    name = criterion.budget
    assert name is not None
    choices: list[list[tuple[Cut | None, Option]]] = []
    blind = [_uncounted(target, name, seen) for target in targets]
    for target, cost, found, reason in zip(targets, costs, spectra, blind, strict=True):
        some: list[tuple[Cut | None, Option]] = []
        if reason is not None:
            some.append((None, Option(0.0, 0.0)))
        elif name == "latency":
            before, timed = timed_cuts(target, {} if isinstance(found, str) else found, seen)
            some.append((None, Option(before, 0.0)))
            some += [(cut, Option(time, _squared(found, cut))) for cut, time in timed if cost.saves(cut)]
        else:
            spent = cost.flops if name == "flops" else float(cost.params)
            some.append((None, Option(spent, 0.0)))
            if not isinstance(found, str):
                for scheme, each in found.items():
                    errors = each.errors.tolist()
                    for rank in range(1, each.full + 1):
                        cut = Cut(scheme, rank)
                        if not cost.saves(cut):
                            break
                        price = cost.flops_of(cut) if name == "flops" else float(cost.params_of(cut))
                        some.append((cut, Option(price, errors[rank])))
        choices.append(some)
    whole = whole_cost(model, name, example_inputs, total)
    value = getattr(criterion, name)
    allowed = float(value) if isinstance(value, int) else value * whole
    fixed = whole - sum(some[0][1].cost for some in choices)
    try:
        found_best = allocate([[option for _, option in some] for some in choices], allowed - fixed)
    except SelectionError:
        least = fixed + sum(min(option.cost for _, option in some) for some in choices)
        raise SelectionError(
            f"{name}={value}: rank 1 in all selected layers still leaves {least / whole:.3g} of the model's "
            f"{name} ({least:.4g} of {whole:.4g}). Ask for more than that, or select more layers."
        ) from None
    decisions = []
    for i, k in enumerate(found_best.chosen):
        chosen, found, uncounted = choices[i][k][0], spectra[i], blind[i]
        if isinstance(found, str):
            decisions.append(Decision(targets[i], _row(targets[i], costs[i], "refused", found)))
        elif uncounted is not None:
            decisions.append(Decision(targets[i], _row(targets[i], costs[i], "left", uncounted)))
        elif chosen is None:
            alone = len(choices[i]) == 1
            reason = "no rank saves anything" if alone else "the budget is met without it"
            action: Literal["refused", "left"] = "refused" if alone else "left"
            decisions.append(Decision(targets[i], _row(targets[i], costs[i], action, reason)))
        else:
            decisions.append(_decision(targets[i], costs[i], found, chosen))
    return decisions


def _uncounted(target: Target, budget: str, seen: Mapping[nn.Module, Seen]) -> str | None:
    """Why a target is nothing to a budget; None if it has a share of it."""
    if budget == "params":
        return None
    if not any(module in seen for module in target.modules):
        return "it is not called on the example inputs"
    if target.table:
        return "a look-up costs no FLOPs" if budget == "flops" else "a look-up is not timed"
    shared = budget == "latency" and len(target.modules) > 1
    return f"a weight shared by {len(target.modules)} layers is not timed" if shared else None


def _squared(found: Found, cut: Cut) -> float:
    assert not isinstance(found, str)
    return float(found[cut.scheme].errors[cut.rank])


def _decision(target: Target, costs: Costs, found: dict[Scheme, Spectrum], cut: Cut) -> Decision:
    each = found[cut.scheme]
    row = replace(
        _row(target, costs, "factorized", ""),
        reason=f"{_title(target, cut)} of {each.full}{_shared(target)}",
        params_after=target.weight.numel() - costs.params + costs.params_of(cut),
        cut=cut,
        full_rank=each.full,
        flops_after=costs.flops_of(cut),
        data_error=float(each.errors[cut.rank]) ** 0.5 if each.by_data else None,
    )
    return Decision(target, row, cut, each)


def _row(
    target: Target, costs: Costs, action: Literal["factorized", "refused", "left"], reason: str
) -> FactorRow:
    count = target.weight.numel()
    row = FactorRow(target.name, target.kind, action, reason, params_before=count, params_after=count)
    return replace(row, flops_before=costs.flops, flops_after=costs.flops)


def _title(target: Target, cut: Cut) -> str:
    convolution = isinstance(target.modules[0], nn.modules.conv._ConvNd)
    return f"{cut.scheme}-wise, rank {cut.rank}" if convolution else f"rank {cut.rank}"


def _shared(target: Target) -> str:
    return f", shared by {len(target.modules)} layers" if len(target.modules) > 1 else ""
