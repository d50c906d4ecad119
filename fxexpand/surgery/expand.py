"""Expand: every weight of a linear map becomes a product of trainable factors."""

from __future__ import annotations

from typing import overload

import torch
from torch import nn

from fxexpand.errors import SelectionError
from fxexpand.layers.expanded import FORMS, Form
from fxexpand.passes.expand import Expansion
from fxexpand.passes.planner import planned
from fxexpand.passes.sites import find_sites
from fxexpand.recipes import Init, Recipe
from fxexpand.recipes.chain import Chain
from fxexpand.recipes.recipe import INITS
from fxexpand.recipes.selection import Select, Selection
from fxexpand.reporting.progress import progress_bar
from fxexpand.running.copying import copied
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.outputs import outputs_of
from fxexpand.surgery.transaction import Model, commit_and_compare, require_module
from fxexpand.tracing.export import module_of


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
    plan = planned(
        "expand",
        find_sites(target, example_inputs),
        selection,
        Expansion(init, form, generator),
        strict=strict,
        progress=progress_bar("expand", progress),
    )
    commit_and_compare(target, plan, before, compared)
    return target
