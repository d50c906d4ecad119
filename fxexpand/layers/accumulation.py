"""Gradient accumulation: one product of the factors for many micro-batches."""

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
from fxexpand.layers.products import Held
from fxexpand.layers.sharding import sharded_part


@contextmanager
def accumulate(expanded: nn.Module, batches: int = 1) -> Iterator[None]:
    """Form each product of factors once for all micro-batches of a step, and back-propagate through it once.

    ::

        with accumulate(model, batches=4):
            for x, y in micro_batches:
                (loss(model(x), y) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    Inside, a product is a leaf at which the gradients of the micro-batches add up; on leaving, one backward
    pass takes the sum to the factors: ``d/dW_i Σ_b L_b(P(W)) = (dP/dW_i)^T Σ_b dL_b/dP``. Losses and
    gradients are those of the plain loop, up to the order of additions. Clip, unscale and step afterwards.

    Only where factors are multiplied at all: layers that run as chains (``form="chain"``, BatchNorm inside,
    or few positions) go on as they are. Evaluation under ``torch.no_grad`` uses the products too. Code under
    ``torch.compile`` shares a product where it is known beforehand that it is needed: with
    ``form="collapsed"``, and in weight space. Elsewhere it forms its own, with the same results.

    Args:
        expanded: the model; a wrapper around it will do. Under DistributedDataParallel use ``no_sync`` for
            all micro-batches but the last, as in any accumulation; the factors' gradients are reduced on
            leaving the block.
        batches: how many micro-batches follow, at a guess: ``form="auto"`` weighs one product against all of
            them.

    Raises:
        SelectionError: ``batches`` out of range.
        FxExpandError: a block inside a block of the same model; a model that is sharded (FSDP), whose whole
            factors exist only while their layer runs; DistributedDataParallel with
            ``find_unused_parameters``, which takes the factors behind a leaf for unused; at the end, factors
            that changed inside, as by an optimizer; or a backward pass after the block of a forward inside.

    After an error inside nothing is passed on: the factors' ``.grad`` lacks the micro-batches so far.
    """
    if not isinstance(batches, int) or batches < 1:
        raise SelectionError(f"accumulate(batches={batches!r}): choose a whole number, 1 or more.")
    holders = _holders(expanded)
    if holders:
        _require_whole(expanded)
    for name, holder, _ in holders:
        if holder.held is not None:
            raise FxExpandError(f"{name}: is accumulating already. Leave that block before opening another.")
    try:
        for _, holder, factors in holders:
            holder.held = Held(factors, batches)
            if not isinstance(holder, Expanded):
                holder(*factors())
            elif holder.form == "collapsed":
                _ = holder.weight
        yield
        gathered = [holder.held.gathered() for _, holder, _ in holders]
    finally:
        for _, holder, _ in holders:
            if holder.held is not None:
                holder.held.close()
            holder.held = None
    while gathered:  # layer by layer: what one has gathered goes before the next has gradients of its factors
        pairs = gathered.pop()
        if pairs:
            products, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(products, gradients)


def _require_whole(model: nn.Module) -> None:
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


def _holders(model: nn.Module) -> list[tuple[str, Any, Callable[[], list[Tensor]]]]:
    """(name, what holds products, its factors) of every expansion whose factors are multiplied."""
    found: dict[int, tuple[str, Any, Callable[[], list[Tensor]]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Expanded) and not module.normed:
            found[id(module)] = path or type(module).__name__, module, partial(_of_layer, module)
        for name, held, expansion in expanded_weights(module):
            found[id(expansion)] = f"{path}.{name}".lstrip("."), expansion, partial(originals, held)
    return list(found.values())


def _of_layer(module: Expanded) -> list[Tensor]:
    return list(module.expansion.parameters())
