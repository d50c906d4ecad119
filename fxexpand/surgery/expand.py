"""Expand: every weight of a linear map becomes a product of trainable factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxexpand.errors import InexactError, RefusedError, SelectionError
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.modules import kernel_of
from fxexpand.layers.expanded import FORMS, Form, expand_layer
from fxexpand.layers.parametrized import (
    WeightExpansion,
    expand_weight,
)
from fxexpand.layers.products import exact_products
from fxexpand.recipes import Init, Recipe, fold
from fxexpand.recipes.chain import Chain
from fxexpand.recipes.recipe import INITS
from fxexpand.recipes.selection import Select, Selection
from fxexpand.recipes.structure import leaves
from fxexpand.reporting.progress import progress_bar
from fxexpand.reporting.rows import Action, Report, Row
from fxexpand.running.copying import copied
from fxexpand.running.finite import require_finite
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.outputs import outputs_of
from fxexpand.running.verify import Scratch, block_error, require_small
from fxexpand.surgery.sites import Site, find_sites
from fxexpand.surgery.transaction import Model, Plan, commit_and_compare, require_module
from fxexpand.tracing.export import module_of


@torch.inference_mode(False)  # whose tensors never train
def plan_expansion(
    sites: Sequence[Site],
    selection: Selection,
    *,
    init: Init,
    form: Form,
    generator: torch.Generator | None,
    strict: bool,
    progress: Callable[[Iterable[Site]], Iterable[Site]] = iter,
) -> Plan:
    """Build the block of every selected site; the model is not touched.

    Raises:
        RefusedError: ``strict`` and a selected site is refused.
        UnusableWeightError: a selected weight holds NaN or Inf.
        SelectionError: a pattern matches no site.
    """
    rows: list[Row] = []
    steps: list[Callable[[], None]] = []
    modules: dict[nn.Module, None] = {}
    scratch = Scratch()
    for site in progress(sites):
        recipe = selection.recipe_for(site.name, site.module, site.aliases)
        if site.action != "expand" or recipe is None:
            if recipe is None:
                rows.append(_row(site, "left", "not selected"))
            else:
                rows.append(_row(site, "refused" if site.action == "refuse" else "left", site.reason))
        else:
            weight = site.weight
            assert weight is not None
            require_finite(weight, site.owners[0].name, site.kind)
            try:
                block, kernel = _block(site, recipe, weight, init, form, generator)
            except InexactError as error:
                rows.append(_row(site, "refused", str(error)))
            else:
                block.requires_grad_(weight.requires_grad)
                measured = init == "preserve" and not weight.is_meta
                deviation: float | None = None
                if measured:
                    deviation = require_small(block_error(block, kernel, scratch), weight.dtype, site.name)
                after = sum(p.numel() for p in block.parameters())
                rows.append(
                    replace(_row(site, "expanded", _into(site, recipe)), params_after=after, error=deviation)
                )
                steps.append(_step(site, block, recipe, form))
                modules.update(dict.fromkeys(owner.module for owner in site.owners))
        if strict and rows[-1].action == "refused":
            raise RefusedError(rows[-1].message)
    selection.require_used(site.name for site in sites)
    return Plan(Report("expand", tuple(rows)), tuple(steps), tuple(modules))


def _block(
    site: Site,
    recipe: Recipe,
    weight: Tensor,
    init: Init,
    form: Form,
    generator: torch.Generator | None,
) -> tuple[nn.Sequential, Kernel]:
    """The training-time block of a site, and the kernel it replaces (without the layer's bias)."""
    if site.space == "layer":
        kernel = replace(kernel_of(site.module), bias=None)
        if form == "collapsed" and recipe.needs_activations:
            raise InexactError("form='collapsed' has no activations for a BatchNorm. Use form='auto'")
    else:
        if recipe.needs_activations:
            raise InexactError("it is expanded as a weight, and a BatchNorm needs activations")
        if form == "chain":
            raise InexactError(
                "it is expanded as a weight, and form='chain' needs activations. Use form='auto'"
            )
        assert site.view is not None
        kernel = site.view.kernel(weight.detach())
    with exact_products(weight):
        block = recipe.build(kernel, init=init, generator=generator)
    padding = getattr(site.module, "padding_idx", None)
    if init != "preserve" and isinstance(site.module, nn.Embedding | nn.EmbeddingBag) and padding is not None:
        _silence(block, padding)
    return block, kernel


def _silence(block: nn.Sequential, column: int) -> None:
    """Zero a column of the weight, which then stays zero, as nothing reaches it in training.

    Raises: InexactError: the block cannot keep it zero.
    """
    with torch.no_grad():
        leaves(block)[0].get_parameter("weight")[:, column] = 0.0
        if not next(block.parameters()).is_meta and bool(fold(block).weight[:, column].any()):
            raise InexactError("the row of padding_idx would not be zero with this recipe. Use Chain")


def _step(site: Site, block: nn.Sequential, recipe: Recipe, form: Form) -> Callable[[], None]:
    if site.space == "layer":
        return lambda: expand_layer(site.module, block, recipe, form)
    assert site.view is not None
    expansion = WeightExpansion(site.view, recipe, block)
    return lambda: expand_weight([(owner.module, owner.attribute) for owner in site.owners], expansion)


def _row(site: Site, action: Action, reason: str) -> Row:
    weight = site.weight
    count = 0 if weight is None or is_lazy(weight) else weight.numel()
    return Row(site.name, site.kind, action, reason, params_before=count, params_after=count)


def _into(site: Site, recipe: Recipe) -> str:
    where = "" if site.space == "layer" else " in weight space"
    tied = f", shared by {', '.join(owner.name for owner in site.owners)}" if len(site.owners) > 1 else ""
    return f"{recipe}{where}{tied}"


@overload
def expand(
    model: torch.export.ExportedProgram,
    recipe: Recipe = ...,
    *,
    select: Select = None,
    init: Init = "preserve",
    form: Form = "auto",
    example_inputs: ExampleInputs | None = None,
    inplace: bool = False,
    strict: bool = False,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> nn.Module: ...


@overload
def expand(
    model: Model,
    recipe: Recipe = ...,
    *,
    select: Select = None,
    init: Init = "preserve",
    form: Form = "auto",
    example_inputs: ExampleInputs | None = None,
    inplace: bool = False,
    strict: bool = False,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Model: ...


def expand(
    model: nn.Module | torch.export.ExportedProgram,
    recipe: Recipe = Chain(depth=3, width=2),  # noqa: B008 - a frozen dataclass
    *,
    select: Select = None,
    init: Init = "preserve",
    form: Form = "auto",
    example_inputs: ExampleInputs | None = None,
    inplace: bool = False,
    strict: bool = False,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Turn every Linear, convolution and other weight of a linear map into a product of trainable factors.

    The result has the class, the methods, the attributes and the mode of ``model`` and, with the default
    ``init``, computes the same function. Train it with anything, then call ``fuse``. An original checkpoint
    loads into it under the original names. What was changed, and what was not and why, is in
    ``report(result)``.

    Build optimizers after this call: it makes new parameters.

    Args:
        model: any module, in any mode, on any devices, the meta device too; or a
            ``torch.export.ExportedProgram``, of which the result is a GraphModule.
        recipe: what a weight becomes.
        select: which sites; see ``fxexpand.selection.Selection``.
        init: ``"preserve"``: the same function; ``"matched"``: random factors whose product has the norm of
            the original weight; ``"kaiming"``: random factors as in the recipe's paper.
        form: ``"chain"`` runs the factors on activations, ``"collapsed"`` multiplies them first, ``"auto"``
            takes what costs fewer FLOPs for the shape of the input.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. If given, the outputs
            before and after are compared, and modules that cannot be traced are watched while they run.
        inplace: change ``model`` itself; by default a deep copy is changed.
        strict: a selected site that cannot be expanded is an error.
        generator: of the random parts; None takes torch's global one.
        progress: show a bar on stderr; None shows it on a terminal once two seconds have passed.

    Raises:
        RefusedError: ``strict=True`` and a site is refused.
        SelectionError: an argument out of range, or a pattern that matches nothing.
        UnusableWeightError: a weight holds NaN or Inf; the message names it.
        VerificationError: the outputs changed by more than rounding.

    An error leaves ``model`` as it was.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = module_of(model)
    require_module(model, "expand")
    if init not in INITS:
        raise SelectionError(f"init={init!r}: choose from {', '.join(INITS)}.")
    if form not in FORMS:
        raise SelectionError(f"form={form!r}: choose from {', '.join(FORMS)}.")
    selection = Selection(select, recipe)
    compared = example_inputs if init == "preserve" else None
    before = outputs_of(model, compared) if compared is not None else []
    target = model if inplace else copied(model)
    plan = plan_expansion(
        find_sites(target, example_inputs),
        selection,
        init=init,
        form=form,
        generator=generator,
        strict=strict,
        progress=progress_bar("expand", progress),
    )
    commit_and_compare(target, plan, before, compared)
    return target
