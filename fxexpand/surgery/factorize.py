"""Low-rank compression: layers become pairs of cheaper layers, in any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxexpand.lowrank.costs import Target, totals, unfit
from fxexpand.lowrank.criteria import Method, Ranks
from fxexpand.lowrank.cuts import Cut, Scheme
from fxexpand.lowrank.decisions import Decision, decide
from fxexpand.lowrank.factored import FACTORIZED, Factorized, factorize_layer, factors, tied_factors
from fxexpand.lowrank.factorize_report import FactorRow
from fxexpand.lowrank.lp import Body
from fxexpand.passes.factorize import Factorize, require_lenient, require_matched, summed
from fxexpand.recipes import Chain
from fxexpand.recipes.selection import Select, Selection
from fxexpand.reporting.progress import progress_bar
from fxexpand.running.copying import copied
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.outputs import outputs_of
from fxexpand.surgery.sites import Site, find_sites
from fxexpand.surgery.transaction import REPORT, require_module, restoring

Model = TypeVar("Model", bound=nn.Module)


@torch.inference_mode(False)  # whose tensors never train
def factorize(
    model: Model,
    example_inputs: ExampleInputs | None = None,
    *,
    rank: Ranks | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    flops: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    method: Method = "svd",
    p: float = 1.0,
    body: Body = "lewis",
    scheme: Scheme | None = None,
    calibration: Sequence[ExampleInputs] | None = None,
    select: Select = None,
    inplace: bool = False,
    strict: bool = False,
    progress: bool | None = None,
) -> Model:
    """Replace Linear layers, convolutions and embeddings by two layers each, of low rank and fewer FLOPs.

    A Linear of rank r is ``in -> r -> out``; a convolution is cut channel-wise (k x k, then 1 x 1) or
    spatially (k x 1, then 1 x k), whichever costs less; an Embedding is a narrower one and a Linear. Stride,
    dilation, groups and padding are kept exactly. No layer gets more FLOPs than it had: those are refused
    with that reason. (A look-up costs none, so an Embedding must have fewer parameters instead.)

    The result has the class, methods and attributes of ``model``, and its layers keep their classes (as
    subclasses), hooks and names; ``fc.weight`` becomes ``fc.0.weight`` and ``fc.1.weight``. Weights that
    are shared stay shared. It loads a state dict under the original names, and ``factorize`` with
    ``rank=cuts(result)`` builds the same structure again from the original model. ``report(result)`` has the
    cut, the rank and the errors of every layer, and the totals.

    Args:
        model: any module, trained, with values.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. If given, FLOPs are
            those of these inputs, layers whose weight is read outside of them, too, are refused, and the
            error of the outputs is measured.
        rank: of every layer (an int), as a share of the full rank (a float), ``"effective"``: the effective
            rank, rounded up, or a mapping from layers to ranks, or to ``(scheme, rank)``, which leaves the
            others alone. Ranks are per group of a convolution.
        energy: the share of the squared norm to keep: the smallest rank with ``sum_{i<=r} s_i^2`` of it.
        threshold: keep the singular values above this value; with calibration, those of the outputs, of which
            the squares are means over positions.
        flops, params: a budget for the whole model, as a share (a float) or a number (an int): the ranks of
            all layers are chosen together so that the sum of the relative squared errors is small; within
            ``fxexpand.compression.allocation`` of the optimum.
        latency: the same for the time of a forward pass on this machine, a share. It goes by timings of each
            layer alone, so the sum is an estimate; measure the result.
        method: ``"svd"``: least squares; ``"lp"``: least sensitive to outlier rows, for Linear and
            Embedding; ``"trp"``: as after Trained Rank Pruning, by threshold 0.05 if nothing else is given.
        p: of the norm of ``"lp"``, from 1 to 2.
        body: the ellipsoid of ``"lp"``; see ``fxexpand.lowrank.lp``.
        scheme: how convolutions are cut, ``"channel"`` or ``"spatial"``; None takes the cheaper.
        calibration: a list of batches of inputs. If given, the outputs of each layer on them are
            approximated, instead of its weight. Shared weights are approximated as without.
        select: which sites; see ``fxexpand.selection.Selection``.
        inplace: change ``model`` itself; by default a deep copy is changed.
        strict: a selected site that cannot be factored is an error.
        progress: show a bar on stderr; None shows it on a terminal once two seconds have passed.

    Raises:
        SelectionError: not exactly one way to choose ranks, an option out of range, a budget that cannot be
            met, a pattern that matches nothing, or a calibration without batches or with NaN or Inf.
        RefusedError: ``strict=True`` and a site is refused.
        UnusableWeightError: a weight holds NaN or Inf.

    An error leaves ``model`` as it was.
    """
    require_module(model, "factorize")
    options = Factorize(rank, energy, threshold, flops, params, latency, method, p, body, scheme, select)
    criterion, approach = options.criterion, options.approach
    before = outputs_of(model, example_inputs) if example_inputs is not None else []
    result = model if inplace else copied(model)
    rows, targets = _targets(find_sites(result, example_inputs), Selection(select, Chain()), result)
    bar = progress_bar("factorize", progress)
    decisions, counted = decide(result, targets, criterion, approach, example_inputs, calibration, bar)
    found = {decision.target.name: decision for decision in decisions}
    require_matched(criterion, targets)
    table = [found[name].row if row is None else row for name, row in rows.items()]
    require_lenient(table, strict)
    steps = [step for decision in decisions if decision.cut is not None for step in _steps(decision)]
    count = totals(result)
    with restoring([result, *(module for target in targets for module in target.modules)]):
        for step in steps:
            step()
        report = summed(table, decisions, count, totals(result), counted)
        if example_inputs is not None:
            after = outputs_of(result, example_inputs)
            report = replace(report, output_error=_output_error(after, before))
        result.__dict__[REPORT] = report
    return result


def _output_error(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """``|a - b| / |b|`` over all outputs; NaN or Inf that was there before (a masked score) is no error."""
    lost = whole = 0.0
    for one, other in zip(after, before, strict=True):
        wide = torch.complex128 if other.is_complex() else torch.float64
        a, b = one.to(wide), other.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        lost += float((a - b)[~same].abs().square().sum())
        whole += float(b[b.isfinite()].abs().square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def cuts(model: nn.Module) -> dict[str, Cut]:
    """The cut of every factored layer by name: what ``factorize(original, rank=...)`` takes."""
    return {name: module.cut for name, module in model.named_modules() if isinstance(module, Factorized)}


def _targets(
    sites: Iterable[Site], selection: Selection, model: nn.Module
) -> tuple[dict[str, FactorRow | None], list[Target]]:
    """A row for each site, None for those to decide on, and these."""
    inside = {
        part for module in model.modules() if isinstance(module, Factorized) for part in module.children()
    }
    paths: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module] = (*paths.get(module, ()), path)
    rows: dict[str, FactorRow | None] = {}
    targets: list[Target] = []
    for site in sites:
        if site.module in inside:
            continue
        count = 0 if site.weight is None or is_lazy(site.weight) else site.weight.numel()
        row = FactorRow(site.name, site.kind, "left", site.reason, params_before=count, params_after=count)
        if selection.recipe_for(site.name, site.module, site.aliases) is None:
            rows[site.name] = replace(row, reason="not selected")
        elif site.action != "expand":
            rows[site.name] = replace(row, action="refused" if site.action == "refuse" else "left")
        else:
            reason = _blocker(site)
            rows[site.name] = replace(row, action="refused", reason=reason) if reason else None
            if reason is None:
                assert site.weight is not None
                modules = [owner.module for owner in site.owners]
                modules.sort(key=lambda module: isinstance(module, nn.Embedding))
                known = tuple(path for module in modules for path in paths[module])
                targets.append(Target(site.name, site.kind, tuple(modules), site.weight, known))
    selection.require_used(rows)
    return rows, targets


def _blocker(site: Site) -> str | None:
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


def _steps(decision: Decision) -> list[Callable[[], None]]:
    """What to do for each owner of a weight; the factors are computed here."""
    cut, target = decision.cut, decision.target
    assert cut is not None and decision.spectrum is not None
    left, right = decision.spectrum.factors(cut.rank)
    first, *others = target.modules
    pair = factors(first, cut, left, right)
    pairs = [(first, pair), *((other, tied_factors(other, cut, left, right, pair)) for other in others)]

    def step(module: nn.Module, parts: tuple[nn.Module, nn.Module]) -> Callable[[], None]:
        return lambda: factorize_layer(module, *parts, cut)

    return [step(module, parts) for module, parts in pairs]
