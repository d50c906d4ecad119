"""Fold: every expansion becomes again the one weight that it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import cast, native_weight
from fxexpand.kernel.lower import laid_out_as
from fxexpand.kernel.modules import describe
from fxexpand.layers.expanded import Expanded
from fxexpand.layers.parametrized import (
    WeightExpansion,
    expanded_weights,
    originals,
    restore_weight,
)
from fxexpand.layers.rewritten import bare, restore_layer
from fxexpand.recipes import fold
from fxexpand.recipes.structure import telling_weight
from fxexpand.reporting.rows import Report, Row
from fxexpand.running.copying import copied
from fxexpand.running.evaluation import evaluating
from fxexpand.running.finite import require_finite
from fxexpand.running.verify import Scratch, block_error, in_float64, require_small
from fxexpand.surgery.sites import own_modules
from fxexpand.surgery.transaction import Plan, commit, require_module


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


def fused_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that ``fuse(model)`` would have, without a second model; it loads into the original.

    Products are formed in float64 and rounded once. Tensors that belong to no expansion share memory with the
    model.
    """
    require_module(model, "fused_state_dict")
    skeleton = copied(model, shared=[*model.parameters(), *model.buffers()])
    commit(plan_folding(skeleton, verify=False))
    return dict(skeleton.state_dict())


def expansion_factors(model: nn.Module) -> Iterator[Tensor]:
    for _, module in own_modules(model):
        if isinstance(module, Expanded):
            yield from module.expansion.parameters()
        for _, held, _ in expanded_weights(module):
            yield from originals(held)
