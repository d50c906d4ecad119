"""Rewrite the sites of a model in place: all values are computed first, then everything is put in at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxexpand.errors import InexactError, RefusedError
from fxexpand.evaluating import evaluating
from fxexpand.finite import require_finite
from fxexpand.kernel import Kernel, cast, native_weight
from fxexpand.layers import Expanded, Form, bare, exact_products, expand_layer, restore_layer
from fxexpand.lower import laid_out_as
from fxexpand.ops import describe, kernel_of
from fxexpand.recipes import Init, Recipe, fold
from fxexpand.recipes.structure import leaves, telling_weight
from fxexpand.report import Action, Report, Row
from fxexpand.selection import Selection
from fxexpand.sites import Site, own_modules
from fxexpand.verify import Scratch, block_error, in_float64, require_small
from fxexpand.weights import (
    WeightExpansion,
    expand_weight,
    expanded_weights,
    originals,
    restore_weight,
)


@dataclass(frozen=True)
class Plan:
    """What will be done: ``steps`` cannot fail on their own account; ``modules`` are those they touch."""

    report: Report
    steps: tuple[Callable[[], None], ...]
    modules: tuple[nn.Module, ...]


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


@torch.inference_mode(False)  # whose tensors never train
def plan_folding(
    model: nn.Module, verify: bool = True, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> Plan:
    """Fold every expansion in ``model``, in float64 and cast once; the model is not touched.

    Raises: VerificationError: ``verify`` and a folded site computes something else than its factors.
    """
    rows: list[Row] = []
    steps: list[Callable[[], None]] = []
    modules: dict[nn.Module, None] = {}
    shared: dict[int, nn.Parameter] = {}
    scratch = Scratch()
    for path, module in progress(list(own_modules(model))):
        if isinstance(module, Expanded):
            row, weight, bias = _folded_layer(path or type(module).__name__, module, verify, scratch)
            rows.append(row)
            steps.append(_restore_layer_step(module, weight, bias))
            modules[module] = None
        for name, held, expansion in expanded_weights(module):
            if id(held) not in shared:
                row, shared[id(held)] = _folded_weight(
                    f"{path}.{name}" if path else name, held, expansion, verify
                )
                rows.append(row)
            steps.append(_restore_weight_step(module, name, shared[id(held)]))
            modules[module] = None
    return Plan(Report("fuse", tuple(rows)), tuple(steps), tuple(modules))


def commit(plan: Plan) -> None:
    """Carry a plan out; should a step fail all the same, the model is put back as it was."""
    with restoring(plan.modules):
        for step in plan.steps:
            step()


@contextmanager
def restoring(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On any error, give the modules the class and the attributes that they have now."""
    before = [(module, type(module), _shallow(module.__dict__)) for module in modules]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's attributes whose dictionaries (parameters, children, hooks) are copies too."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in attributes.items()}


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


def _folded_layer(
    name: str, module: Expanded, verify: bool, scratch: Scratch
) -> tuple[Row, nn.Parameter, nn.Parameter | None]:
    for key, tensor in module.expansion.state_dict().items():
        require_finite(tensor, f"{name}.expansion.{key}", str(module.recipe))
    factors = list(module.expansion.parameters())
    dtype, trains = factors[0].dtype, any(factor.requires_grad for factor in factors)
    wide = in_float64(module.expansion, scratch)
    with evaluating(wide):  # a BatchNorm folds by its running statistics
        try:
            kernel = fold(wide)
        except InexactError as reason:
            raise InexactError(f"{name} ({module.recipe}): cannot be folded: {reason}") from None
    fused = cast(kernel, dtype)
    weight = laid_out_as(native_weight(fused), telling_weight(module.expansion))
    parameter = nn.Parameter(weight, requires_grad=trains)
    own = new_bias = module._parameters["bias"]
    if kernel.bias is not None:
        bias = kernel.bias if own is None else kernel.bias + own.detach()
        new_bias = nn.Parameter(bias.to(dtype), requires_grad=trains if own is None else own.requires_grad)
    error = None
    if verify and not parameter.is_meta:
        error = require_small(block_error(wide, fused), dtype, name)
    row = Row(
        site=name,
        kind=describe(bare(module, parameter)),
        action="fused",
        reason=f"{module.recipe}"
        + (", bias added (BatchNorm inside)" if own is None and new_bias is not None else ""),
        params_before=sum(factor.numel() for factor in factors),
        params_after=parameter.numel(),
        error=error,
    )
    return row, parameter, new_bias


def _folded_weight(
    name: str, held: Any, expansion: WeightExpansion, verify: bool
) -> tuple[Row, nn.Parameter]:
    if len(held) > 1:
        raise InexactError(
            f"{name} ({expansion.recipe}): cannot be folded: {type(held[1]).__name__} was registered on top "
            "of the expansion (torch.nn.utils.parametrize) and would be lost. Remove it first: "
            "remove_parametrizations keeps the value."
        )
    factors = originals(held)
    for i, factor in enumerate(factors):
        require_finite(factor, f"{name}, factor {i}", f"{expansion.recipe}")
    dtype, trains = factors[0].dtype, any(factor.requires_grad for factor in factors)
    with torch.no_grad():
        weight = expansion.folded(factors, torch.float64).to(dtype)
    parameter = nn.Parameter(weight, requires_grad=trains)
    error = None
    if verify and not weight.is_meta:
        error = block_error(expansion.block(factors), expansion.view.kernel(weight))
        require_small(error, dtype, name)
    row = Row(
        site=name,
        kind="x".join(map(str, weight.shape)),
        action="fused",
        reason=f"{expansion.recipe} in weight space",
        params_before=sum(factor.numel() for factor in factors),
        params_after=parameter.numel(),
        error=error,
    )
    return row, parameter


def _restore_layer_step(
    module: Expanded, weight: nn.Parameter, bias: nn.Parameter | None
) -> Callable[[], None]:
    return lambda: restore_layer(module, weight, bias)


def _restore_weight_step(module: nn.Module, name: str, parameter: nn.Parameter) -> Callable[[], None]:
    return lambda: restore_weight(module, name, parameter)


def _row(site: Site, action: Action, reason: str) -> Row:
    weight = site.weight
    count = 0 if weight is None or is_lazy(weight) else weight.numel()
    return Row(site.name, site.kind, action, reason, params_before=count, params_after=count)


def _into(site: Site, recipe: Recipe) -> str:
    where = "" if site.space == "layer" else " in weight space"
    tied = f", shared by {', '.join(owner.name for owner in site.owners)}" if len(site.owners) > 1 else ""
    return f"{recipe}{where}{tied}"
