"""Low-rank compression: layers become pairs of cheaper layers, in any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fxexpand.lowrank.cuts import Cut, Scheme
from fxexpand.lowrank.decisions import Decision
from fxexpand.lowrank.factored import Factorized, factorize_layer, factors, tied_factors
from fxexpand.lowrank.lp import Body
from fxexpand.lowrank.options import Method, Ranks
from fxexpand.passes.factorize import Edit, Factorize, plan_factoring, unfactorable
from fxexpand.passes.planner import commit, restoring
from fxexpand.recipes.selection import Select
from fxexpand.reporting.progress import progress_bar
from fxexpand.running.copying import copied
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.outputs import outputs_of
from fxexpand.surgery.transaction import REPORT, require_module

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
    options = Factorize(
        *(rank, energy, threshold, flops, params, latency, method, p, body, scheme),
        select=select,
        example_inputs=example_inputs,
        calibration=calibration,
        strict=strict,
    )
    before = outputs_of(model, example_inputs) if example_inputs is not None else []
    result = model if inplace else copied(model)
    bar = progress_bar("factorize", progress)
    plan = plan_factoring(result, options, unfactorable, _layers_become_pairs, bar)
    with restoring([result, *plan.modules]):
        commit(plan)
        report = plan.report_on(result)
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


def _layers_become_pairs(decision: Decision) -> Edit:
    """The factors, and the edit that puts them in each owner of a weight."""
    cut, target = decision.cut, decision.target
    assert cut is not None and decision.spectrum is not None
    left, right = decision.spectrum.factors(cut.rank)
    first, *others = target.modules
    pair = factors(first, cut, left, right)
    pairs = [(first, pair), *((other, tied_factors(other, cut, left, right, pair)) for other in others)]

    def edit() -> None:
        for module, parts in pairs:
            factorize_layer(module, *parts, cut)

    return edit, target.modules
