"""The functions people call: expand, fuse, and what is known of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, TypeAlias, TypeVar, cast, get_args, overload

import torch
from torch import Tensor, nn

from fxexpand.calls import Parts
from fxexpand.copying import copied
from fxexpand.errors import FxExpandError, RefusedError, SelectionError
from fxexpand.exported import module_of
from fxexpand.inputs import ExampleInputs
from fxexpand.layers import FORMS, Expanded, Form
from fxexpand.outputs import outputs_of
from fxexpand.passes.fuse import combined
from fxexpand.passes.placement import commit_fusing, plan_fusing
from fxexpand.progress import at_work, progress_bar
from fxexpand.recipes import INITS, Chain, Init, Recipe
from fxexpand.report import Report
from fxexpand.selection import Select, Selection
from fxexpand.sharding import sharded_part
from fxexpand.sites import find_sites, own_modules
from fxexpand.surgery import Plan, commit, plan_expansion, plan_folding, restoring
from fxexpand.verify import require_same_outputs
from fxexpand.weights import expanded_weights, originals

Scope: TypeAlias = Literal["all", "expanded"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
Model = TypeVar("Model", bound=nn.Module)

REPORT = "_fxexpand_report"  # the attribute of a model that holds its report


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
    _carry_out(target, plan, before, compared)
    return target


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
        UnusableWeightError: what would be folded holds NaN or Inf.
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
    target = model if inplace else copied(model, shared=_factors(model))
    plan = plan_folding(target, verify, progress_bar("fuse", progress))
    if scope == "expanded":
        _carry_out(target, plan, before, compared)
        return target
    with at_work("fuse", progress) as show:
        return _fused(target, plan, before, example_inputs, verify, strict, inplace, show)


def _fused(
    target: Model,
    folding: Plan,
    before: list[Tensor],
    example_inputs: ExampleInputs | None,
    verify: bool,
    strict: bool,
    inplace: bool,
    show: Callable[[str], None],
) -> Model:
    """Fold the expansions, then everything else; on an error ``target`` is as it was."""
    with restoring([*target.modules()]):
        commit(folding)
        result: nn.Module = target
        reports = [folding.report]
        one_path = False  # what holds in the parts with a graph goes first
        parts = Parts(result, example_inputs, one_path)
        while True:
            edits = plan_fusing(result, parts, verify, show)
            if inplace and target in edits.replaced:
                raise SelectionError(
                    f"{type(target).__name__}: fusing changes the calls in its own forward, so it becomes a "
                    "GraphModule. Take the result of fuse(model) instead of inplace=True."
                )
            result = commit_fusing(result, edits)
            reports.append(Report("fuse", tuple(edits.rows), edits.traced))
            if not reports[-1].changed:  # a fold takes readers away, so that more may follow
                if one_path or not edits.untraced or example_inputs is None:
                    break
                one_path = True
            parts = parts.after(result, one_path)
        found = replace(combined(reports), traced=reports[-1].traced)
        if strict and found.refusals:
            raise RefusedError(found.refusals[0].message)
        if before and example_inputs is not None and found.changed:
            require_same_outputs(before, result, example_inputs, len(found.changed), found.title)
    result.__dict__[REPORT] = found
    return cast(Model, result)


def report(model: nn.Module) -> Report:
    """What the last ``expand`` or ``fuse`` did to each site of ``model``, and why it left others alone.

    Raises: FxExpandError: neither has been called on it.
    """
    found = model.__dict__.get(REPORT)
    if not isinstance(found, Report):
        raise FxExpandError(
            f"{type(model).__name__}: has no report. Call fxexpand.expand or fuse, and ask the result."
        )
    return found


def fused_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that ``fuse(model)`` would have, without a second model; it loads into the original.

    Products are formed in float64 and rounded once. Tensors that belong to no expansion share memory with the
    model.
    """
    require_module(model, "fused_state_dict")
    skeleton = copied(model, shared=[*model.parameters(), *model.buffers()])
    commit(plan_folding(skeleton, verify=False))
    return dict(skeleton.state_dict())


def _carry_out(
    target: nn.Module, plan: Plan, before: list[Tensor], example_inputs: ExampleInputs | None
) -> None:
    """Commit, compare the outputs, and note the report; on an error ``target`` is as it was."""
    with restoring([*plan.modules, target]):
        commit(plan)
        if example_inputs is not None and plan.steps:
            require_same_outputs(before, target, example_inputs, len(plan.steps), plan.report.title)
        target.__dict__[REPORT] = plan.report


def _factors(model: nn.Module) -> Iterator[Tensor]:
    for _, module in own_modules(model):
        if isinstance(module, Expanded):
            yield from module.expansion.parameters()
        for _, held, _ in expanded_weights(module):
            yield from originals(held)


def require_module(model: nn.Module, verb: str) -> None:
    """Raises: FxExpandError or SelectionError: ``verb`` does not take such a model."""
    if isinstance(model, torch.jit.ScriptModule):
        raise FxExpandError(f"{type(model).__name__}: TorchScript is compiled. Call {verb} before scripting.")
    if not isinstance(model, nn.Module):
        raise SelectionError(f"{verb}: got {type(model).__name__}; give an nn.Module.")
    _refuse_sharded(model, verb)
    for _, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise FxExpandError(
                f"{type(module).__name__}: is compiled already. Call {verb} on the model, then torch.compile."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise FxExpandError(
                f"{type(module).__name__}: holds references to the parameters. "
                f"Call {verb} on the model inside, then wrap it."
            )


def _refuse_sharded(model: nn.Module, verb: str) -> None:
    sharded = sharded_part(model)
    if sharded is not None:
        raise FxExpandError(
            f"{sharded}: is sharded. Call expand before fully_shard. To fold, gather the state with "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), load it into the "
            f"expanded model as it was before, and call {verb} on that."
        )
