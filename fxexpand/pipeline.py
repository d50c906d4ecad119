"""The functions people call: expand, fuse, and what is known of the result."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.inputs import ExampleInputs
from fxexpand.layers import FORMS, Expanded, Form
from fxexpand.recipes import INITS, Chain, Init, Recipe
from fxexpand.report import Report
from fxexpand.selection import Select, Selection
from fxexpand.sites import find_sites, own_modules
from fxexpand.surgery import Plan, commit, plan_expansion, plan_folding, restoring
from fxexpand.verify import outputs_of, require_same_outputs
from fxexpand.weights import expanded_weights, originals

Scope: TypeAlias = Literal["all", "expanded"]
Model = TypeVar("Model", bound=nn.Module)
T = TypeVar("T")

_REPORT = "_fxexpand_report"


def expand(
    model: Model,
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
) -> Model:
    """Turn every Linear, convolution and other weight of a linear map into a product of trainable factors.

    The result has the class, the methods, the attributes and the mode of ``model`` and, with the default
    ``init``, computes the same function. Train it with anything, then call ``fuse``. An original checkpoint
    loads into it under the original names. What was changed, and what was not and why, is in
    ``report(result)``.

    Build optimizers after this call: it makes new parameters.

    Args:
        model: any module, in any mode, on any devices, the meta device too.
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
    _require_module(model, "expand")
    if init not in INITS:
        raise SelectionError(f"init={init!r}: choose from {', '.join(INITS)}.")
    if form not in FORMS:
        raise SelectionError(f"form={form!r}: choose from {', '.join(FORMS)}.")
    selection = Selection(select, recipe)
    compared = example_inputs if init == "preserve" else None
    before = outputs_of(model, compared) if compared is not None else []
    target = model if inplace else _copied(model)
    plan = plan_expansion(
        find_sites(target, example_inputs),
        selection,
        init=init,
        form=form,
        generator=generator,
        strict=strict,
        progress=_bar("expand", progress),
    )
    _carry_out(target, plan, before, compared)
    return target


def fuse(
    model: Model,
    example_inputs: ExampleInputs | None = None,
    *,
    scope: Scope = "expanded",
    inplace: bool = False,
    strict: bool = False,
    verify: bool = True,
    progress: bool | None = None,
) -> Model:
    """Fold every expansion back into the one kernel it computes.

    The result has the class of the original network, its state-dict keys, shapes and dtypes, and its FLOPs,
    and can be trained. Products are formed in float64 and rounded once. BatchNorm inside an expansion folds
    by its running statistics, whatever the mode of the model.

    Args:
        model: a network that ``expand`` made, trained or not; without expansions it is returned as a copy.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. If given, the outputs
            before and after are compared.
        scope: ``"expanded"`` folds what ``expand`` made. (Other affine subgraphs: the ``Fuse`` pass.)
        inplace: change ``model`` itself; by default a deep copy is changed.
        strict: a site that cannot be folded is an error.
        verify: compare every folded site with its factors in float64, and the outputs if there are inputs.
        progress: show a bar on stderr; None shows it on a terminal once two seconds have passed.

    Raises:
        VerificationError: a site or the outputs changed by more than rounding.
        SelectionError: an unknown scope.

    An error leaves ``model`` as it was.
    """
    _require_module(model, "fuse")
    if scope != "expanded":
        raise SelectionError(
            f"scope={scope!r}: this version folds what expand made, scope='expanded'. For other affine "
            "subgraphs use fxexpand.passes.Fuse on a GraphModule."
        )
    compared = example_inputs if verify else None
    before = outputs_of(model, compared) if compared is not None else []
    target = model if inplace else _copied(model, shared=_factors(model))
    plan = plan_folding(target, verify, _bar("fuse", progress))
    _carry_out(target, plan, before, compared)
    return target


def report(model: nn.Module) -> Report:
    """What the last ``expand`` or ``fuse`` did to each site of ``model``, and why it left others alone.

    Raises: FxExpandError: neither has been called on it.
    """
    found = model.__dict__.get(_REPORT)
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
    _require_module(model, "fused_state_dict")
    skeleton = _copied(model, shared=[*model.parameters(), *model.buffers()])
    commit(plan_folding(skeleton, verify=False))
    return dict(skeleton.state_dict())


def _carry_out(
    target: nn.Module, plan: Plan, before: list[Tensor], example_inputs: ExampleInputs | None
) -> None:
    """Commit, compare the outputs, and note the report; on an error ``target`` is as it was."""
    with restoring([*plan.modules, target]):
        commit(plan)
        if example_inputs is not None and plan.steps:
            after = outputs_of(target, example_inputs)
            require_same_outputs(before, after, len(plan.steps), plan.report.title)
        target.__dict__[_REPORT] = plan.report


def _copied(model: Model, shared: Iterable[Tensor] = ()) -> Model:
    """A deep copy of the model that keeps the ``shared`` tensors instead of copying them."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for tensor in _uncopyable(model):
        memo.setdefault(
            id(tensor),
            type(tensor)(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else tensor.detach().clone(),
        )
    return copy.deepcopy(model, memo)


def _uncopyable(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that deepcopy refuses: what legacy hooks and recurrent layers keep, sparse parameters."""
    for module in model.modules():
        for value in vars(module).values():
            for item in tree_leaves(value):
                if isinstance(item, Tensor) and (not item.is_leaf or item.layout != torch.strided):
                    yield item


def _factors(model: nn.Module) -> Iterator[Tensor]:
    for _, module in own_modules(model):
        if isinstance(module, Expanded):
            yield from module.expansion.parameters()
        for _, held, _ in expanded_weights(module):
            yield from originals(held)


def _require_module(model: nn.Module, verb: str) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise FxExpandError(f"{type(model).__name__}: TorchScript is compiled. Call {verb} before scripting.")
    if not isinstance(model, nn.Module):
        raise SelectionError(f"{verb}: got {type(model).__name__}; give an nn.Module.")
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


def _bar(title: str, progress: bool | None) -> Callable[[Iterable[T]], Iterable[T]]:
    """Show a progress bar on stderr: always, never, or on a terminal once two seconds have passed."""

    def track(items: Iterable[T]) -> Iterator[T]:
        listed = list(items)
        if not (sys.stderr.isatty() if progress is None else progress):
            yield from listed
            return
        from rich.console import Console
        from rich.progress import Progress

        start, shown = time.monotonic(), progress is True
        with Progress(console=Console(stderr=True), transient=True, disable=False) as bar:
            task = bar.add_task(title, total=len(listed), visible=shown)
            for item in listed:
                yield item
                shown = shown or time.monotonic() - start > 2.0
                bar.update(task, advance=1, visible=shown)

    return track
