"""Gradient accumulation with one product of the factors for all micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.layers.expanded import Expanded
from fxexpand.layers.parametrized import expanded_weights, originals
from fxexpand.layers.products import ProductCache
from fxexpand.layers.sharding import sharded_part


@contextmanager
def accumulate(expanded: nn.Module, batches: int = 1) -> Iterator[None]:
    """Compute each product of factors, and back-propagate through it, once for all micro-batches of a step.

    ::

        with accumulate(model, batches=4):
            for x, y in micro_batches:
                (loss(model(x), y) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    Inside the block, a product is a leaf at which the gradients of the micro-batches add up. At its end, one
    backward pass takes the sum to the factors: ``d/dW_i Σ_b L_b(P(W)) = (dP/dW_i)^T Σ_b dL_b/dP``. Losses and
    gradients are those of the plain loop, up to the order of additions. Clip, unscale and step afterwards.

    Layers that multiply no factors (``form="chain"``, BatchNorm inside, or few positions) run as without the
    block. Evaluation under ``torch.no_grad`` uses the products too. Code under ``torch.compile`` shares a
    product if the product is certain to be needed: with ``form="collapsed"``, and in weight space. Elsewhere
    it computes its own, with the same results.

    Args:
        expanded: the model, or a wrapper around it. Under DistributedDataParallel use ``no_sync`` for all
            micro-batches but the last, as in any accumulation; the gradients of the factors are reduced at
            the end of the block.
        batches: the number of micro-batches that follow, or an estimate: ``form="auto"`` compares the cost of
            one product with all of them.

    Raises:
        SelectionError: ``batches`` out of range.
        FxExpandError: a block inside a block of the same model; a sharded model (FSDP), whose whole factors
            exist only while their layer runs; DistributedDataParallel with ``find_unused_parameters``, which
            takes the factors behind a leaf for unused; at the end, factors that changed inside, as by an
            optimizer; or a backward pass after the block for a forward inside.

    After an error inside the block, no gradient reaches the factors: their ``.grad`` lacks all its
    micro-batches.
    """
    if not isinstance(batches, int) or batches < 1:
        raise SelectionError(f"accumulate(batches={batches!r}): choose a whole number, 1 or more.")
    expansions = _expansions(expanded)
    if expansions:
        _require_unsharded(expanded)
    for name, owner, _ in expansions:
        if owner.product_cache is not None:
            raise FxExpandError(f"{name}: is accumulating already. Leave that block before opening another.")
    try:
        for _, owner, factors in expansions:
            owner.product_cache = ProductCache(factors, batches)
            if not isinstance(owner, Expanded):
                owner(*factors())
            elif owner.form == "collapsed":
                _ = owner.weight
        yield
        gradients = [owner.product_cache.gradients() for _, owner, _ in expansions]
    finally:
        for _, owner, _ in expansions:
            if owner.product_cache is not None:
                owner.product_cache.close()
            owner.product_cache = None
    while gradients:  # a layer at a time: its products are freed before the next has gradients of its factors
        pairs = gradients.pop()
        if pairs:
            products, at_leaves = zip(*pairs, strict=True)
            torch.autograd.backward(products, at_leaves)


def _require_unsharded(model: nn.Module) -> None:
    sharded = sharded_part(model)
    if sharded is not None:
        raise FxExpandError(
            f"{sharded}: is sharded, and a product of its factors cannot outlive a forward pass. "
            "Accumulate without this block, or with DistributedDataParallel."
        )
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel) and module.find_unused_parameters:
            raise FxExpandError(
                f"{type(module).__name__}: find_unused_parameters takes the factors of a shared product for "
                "unused. Wrap the model without it, or accumulate without this block."
            )


def _expansions(model: nn.Module) -> list[tuple[str, Any, Callable[[], list[Tensor]]]]:
    """(name, owner of the product cache, factors) of every expansion whose factors are multiplied."""
    found: dict[int, tuple[str, Any, Callable[[], list[Tensor]]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Expanded) and not module.normed:
            found[id(module)] = path or type(module).__name__, module, partial(_layer_factors, module)
        for name, parametrization, expansion in expanded_weights(module):
            name = f"{path}.{name}".lstrip(".")
            found[id(expansion)] = name, expansion, partial(originals, parametrization)
    return list(found.values())


def _layer_factors(module: Expanded) -> list[Tensor]:
    return list(module.expansion.parameters())
