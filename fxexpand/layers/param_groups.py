"""Parameter groups for any torch optimizer, with the weight decay of each factor of a product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd

from fxexpand.errors import InexactError, SelectionError
from fxexpand.layers.expanded import Expanded
from fxexpand.layers.parametrized import expanded_weights, originals
from fxexpand.recipes import Skip
from fxexpand.recipes.structure import Branches, Scale

Decayed: TypeAlias = Literal["factors", "effective"]
DECAYED: tuple[Decayed, ...] = get_args(Decayed)


def param_groups(
    model: nn.Module, weight_decay: float, *, on: Decayed = "factors", decay_vectors: bool = False
) -> list[dict[str, Any]]:
    """Groups of the parameters of ``model``, each with its ``weight_decay``, for any torch optimizer.

    With a decay λ, learning rate η and a product ``W = W_d ... W_1``:

    ``on="factors"``: λ on each factor, as the papers train. It is the penalty ``λ/2 Σ ||W_i||²``, whose least
    value over all factors of one W is ``λ d/2 Σ_j σ_j(W)^(2/d)`` over the singular values: for d = 2 the
    nuclear norm, for more factors closer to the rank still. A step shrinks W by ``(1 - ηλ)^d``, d times as
    fast as it would a single weight.

    ``on="effective"``: λ/d on each factor, so that a step shrinks W itself by ``(1 - ηλ/d)^d``, which is
    ``1 - ηλ`` up to (ηλ)², the decay of the weight in a step of the original network. The factors keep their
    balance, and nothing depends on the form, on autocast, loss scaling, clipping or accumulation. (It is not
    the gradient of ``λ/2 ||W||²`` through the factors: that gradient, like every other, is preconditioned by
    the factors, and vanishes where they do.) Parts that do not scale, such as a skip, the identity among
    branches or fixed taps, and scales next to layers, have no decay; the layers in sequence with them take
    the whole share.

    Args:
        model: expanded or not; a plain weight gets λ.
        weight_decay: λ.
        on: the tensors that λ applies to.
        decay_vectors: decay biases, norms and scales too, that is, all parameters with less than two
            dimensions; by default they have no decay, as usual.

    Returns:
        One group per value of ``weight_decay``, in the order of their first parameters, each parameter once.
        Parameters that require no gradient are left out.

    Raises:
        SelectionError: an argument out of range.
        InexactError: ``on="effective"`` and a block for which no shares exist: a BatchNorm inside, or a skip
            around everything.
    """
    if on not in DECAYED:
        raise SelectionError(f"on={on!r}: choose from {', '.join(DECAYED)}.")
    if not isinstance(weight_decay, int | float) or not weight_decay >= 0:
        raise SelectionError(f"weight_decay={weight_decay!r}: choose a number, 0 or more.")
    shares = _shares(model) if on == "effective" else {}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        usual = 1.0 if decay_vectors or parameter.ndim >= 2 else 0.0
        decay = weight_decay * shares.get(id(parameter), usual)
        groups.setdefault(decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def _shares(model: nn.Module) -> Mapping[int, float]:
    """The share of each factor, by id, in the decay of its product.

    Raises: InexactError: the factors of a block have no shares.
    """
    shares: dict[int, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, Expanded):
            if module.normed:
                raise InexactError(
                    f"{path or type(module).__name__}: a BatchNorm inside undoes the effect of decay, so "
                    "there is no effective weight to decay. Use on='factors'."
                )
            named = dict(module.expansion.named_parameters())
            found = _block_shares(path or type(module).__name__, module.expansion)
            shares.update({id(named[name]): share for name, share in found.items()})
        for name, parametrization, expansion in expanded_weights(module):
            block = expansion.structure
            found = _block_shares(f"{path}.{name}".lstrip("."), block)
            for (key, _), factor in zip(block.named_parameters(), originals(parametrization), strict=True):
                shares[id(factor)] = found[key]
    return shares


def _block_shares(name: str, block: nn.Sequential) -> dict[str, float]:
    if not _is_scalable(block):
        raise InexactError(
            f"{name}: multiplying the factors of this block does not multiply its weight, because of a skip "
            "or a fixed branch around everything. Use on='factors'."
        )
    found = dict.fromkeys((key for key, _ in block.named_parameters()), 0.0)
    found.update(_distributed(block, 1.0, ""))
    return found


def _is_scalable(part: nn.Module) -> bool:
    """Whether multiplying its parameters can multiply its output."""
    if isinstance(part, Branches):
        return all(_is_scalable(branch) for branch in part)
    if isinstance(part, nn.Sequential):
        return not isinstance(part, Skip) and any(_is_scalable(inner) for inner in part)
    return isinstance(part, nn.Linear | _ConvNd | Scale)


def _distributed(part: nn.Module, share: float, prefix: str) -> Iterator[tuple[str, float]]:
    """(name of a weight, its share): equal shares along a sequence, the whole share in each branch."""
    if isinstance(part, Branches):
        for name, branch in part.named_children():
            yield from _distributed(branch, share, f"{prefix}{name}.")
    elif isinstance(part, nn.Sequential):
        scalable = [(name, inner) for name, inner in part.named_children() if _is_scalable(inner)]
        # Scales are vectors, which usually do not decay: they take the share only where nothing else can.
        scalable = [pair for pair in scalable if not isinstance(pair[1], Scale)] or scalable
        for name, inner in scalable:
            yield from _distributed(inner, share / len(scalable), f"{prefix}{name}.")
    else:
        yield f"{prefix}weight", share
