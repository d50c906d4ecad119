"""Folding: every expansion becomes again the one weight that it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import cast, native_weight
from fxexpand.kernel.lower import laid_out_as
from fxexpand.kernel.modules import describe
from fxexpand.layers.expanded import Expanded
from fxexpand.layers.parametrized import LISTS, WeightExpansion, expanded_weights, originals, restore_weight
from fxexpand.layers.rewritten import bare, restore_layer
from fxexpand.passes.planner import Plan, Step
from fxexpand.passes.sites import Owner, own_modules
from fxexpand.recipes import fold
from fxexpand.recipes.structure import telling_weight
from fxexpand.reporting.rows import REFUSED, Row
from fxexpand.running.evaluation import evaluating
from fxexpand.running.finite import is_finite
from fxexpand.running.verify import Scratch, block_error, in_float64, require_small
from fxexpand.tracing.edit import Read, parameter_reads, reread


@torch.inference_mode(False)  # whose tensors never train
def plan_folding(
    model: nn.Module, verify: bool = True, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> Plan:
    """Fold every expansion in ``model``, in float64 and cast once; the model is not touched.

    An expansion that holds NaN or Inf, or has no single weight, is refused.

    Raises: VerificationError: ``verify`` and a folded site computes something else than its factors.
    """
    owners: dict[nn.Module, list[Owner]] = {}  # of each expanded layer and each list of parametrizations
    for path, module in own_modules(model):
        if isinstance(module, Expanded):
            owners[module] = [Owner(path or type(module).__name__, module, "weight")]
        for name, held, _ in expanded_weights(module):
            owners.setdefault(held, []).append(Owner(path, module, name))
    reads, scratch = parameter_reads(model), Scratch()
    steps = []
    for held, group in progress(list(owners.items())):
        name, layer = (
            group[0].path if isinstance(held, Expanded) else group[0].name,
            isinstance(held, Expanded),
        )
        try:
            if layer:
                steps.append(_folded_layer(name, held, verify, scratch))
            else:
                steps.append(_folded_weight(held, group, reads.get(id(held), []), verify))
        except InexactError as error:
            count = sum(factor.numel() for factor in held.parameters())
            steps.append(Step(Row(name, describe(held) if layer else "", REFUSED, str(error), count, count)))
    return Plan("fuse", tuple(steps))


def _require_finite(factors: dict[str, Tensor]) -> None:
    name = next((name for name, factor in factors.items() if not is_finite(factor)), None)
    if name is not None:
        raise InexactError(f"its factor {name} holds NaN or Inf. Load a sound checkpoint")


def _folded_layer(name: str, module: Expanded, verify: bool, scratch: Scratch) -> Step:
    _require_finite(module.expansion.state_dict())
    factors = list(module.expansion.parameters())
    dtype, trains = factors[0].dtype, any(factor.requires_grad for factor in factors)
    wide = in_float64(module.expansion, scratch)
    with evaluating(wide):  # a BatchNorm folds by its running statistics
        kernel = fold(wide)
    fused = cast(kernel, dtype)
    weight = laid_out_as(native_weight(fused), telling_weight(module.expansion))
    parameter = nn.Parameter(weight, requires_grad=trains)
    own = new_bias = module._parameters["bias"]
    if kernel.bias is not None:
        bias = kernel.bias if own is None else kernel.bias + own.detach()
        new_bias = nn.Parameter(bias.to(dtype), requires_grad=trains if own is None else own.requires_grad)
    error = None
    if verify and not parameter.is_meta:
        error = require_small(block_error(wide, fused), dtype, name, lambda: block_error(wide, kernel))
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
    return Step(row, partial(restore_layer, module, parameter, new_bias), (module,))


def _folded_weight(held: Any, owners: list[Owner], reads: list[Read], verify: bool) -> Step:
    name, expansion = owners[0].name, held[0]
    assert isinstance(expansion, WeightExpansion)
    if len(held) > 1:
        raise InexactError(
            f"{type(held[1]).__name__} was registered on top of the expansion (torch.nn.utils.parametrize) "
            "and would be lost. Remove it first: remove_parametrizations keeps the value"
        )
    factors = originals(held)
    _require_finite({f"original{i}": factor for i, factor in enumerate(factors)})
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

    def edit() -> None:
        for owner in owners:
            restore_weight(owner.module, owner.attribute, parameter)
        for read in reads:
            path, _, attribute = str(read.node.target).rpartition(".")
            path = path.removesuffix(LISTS).removesuffix(".")
            reread(read, "get_attr", f"{path}.{attribute}".lstrip("."))

    touched = (*(owner.module for owner in owners), *(read.graph_module for read in reads))
    return Step(row, edit, touched)
