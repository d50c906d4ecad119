"""The one weight that each expansion computes: a state dict without a second model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fxexpand.layers.expanded import Expanded
from fxexpand.layers.parametrized import expanded_weights, originals
from fxexpand.passes.folding import plan_folding
from fxexpand.passes.planner import commit, require_lenient
from fxexpand.passes.sites import own_modules
from fxexpand.running.copying import copied
from fxexpand.surgery.transaction import require_module


def fused_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that ``fuse(model)`` would have, without a second model; it loads into the original.

    Products are formed in float64 and rounded once. Tensors that belong to no expansion share memory with the
    model.

    Raises: RefusedError: an expansion cannot be folded.
    """
    require_module(model, "fused_state_dict")
    skeleton = copied(model, shared=[*model.parameters(), *model.buffers()])
    plan = plan_folding(skeleton, verify=False)
    require_lenient(plan.report.rows, strict=True)
    commit(plan)
    return dict(skeleton.state_dict())


def expansion_factors(model: nn.Module) -> Iterator[Tensor]:
    """The parameters of all expansions, which a fold reads and does not change."""
    for _, module in own_modules(model):
        if isinstance(module, Expanded):
            yield from module.expansion.parameters()
        for _, held, _ in expanded_weights(module):
            yield from originals(held)
