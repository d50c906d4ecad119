"""Give a freshly built network the statistics of a trained one.

As built, BatchNorm is the identity, many biases are zero, and some branches are switched off by a scale of
zero or 1e-6, so that an error in them would not reach the outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SMALL = 0.2  # constants below this are scales that switch a branch off


@torch.no_grad()
def settle(model: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Shake the constant parameters and the BatchNorm statistics of ``model``, in place.

    A parameter whose values are all ``c`` becomes normal with deviation 0.05 for ``c = 0``, uniform in
    [0.2, 0.6] for a small ``c``, and ``c`` times uniform in [0.5, 1.5] otherwise. Running statistics are
    those of one forward pass over ``images`` in training mode, moved by up to 40 % of the variance and
    10 % of a deviation, as those of a trained network differ from any batch.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        _shake(parameter, generator)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    if not norms:
        return
    flags = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become those of the batch
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None
        variance.mul_(0.8).add_(0.2 * variance.mean())  # a small batch leaves some channels without variance
        variance.mul_(_uniform(variance, 0.7, 1.4, generator))
        mean.add_(0.1 * variance.sqrt() * _normal(mean, generator))
    for module, training in flags:
        module.training = training


def _shake(parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.numel() == 0 or not parameter.is_floating_point():
        return
    low, high = (float(value) for value in torch.aminmax(parameter))
    if low != high:
        return
    if parameter.numel() == 1:
        if low == 0.0:
            parameter.fill_(SMALL)
    elif low == 0.0:
        parameter.copy_(0.05 * _normal(parameter, generator))
    elif abs(low) < SMALL:
        parameter.copy_(_uniform(parameter, 0.2, 0.6, generator))
    else:
        parameter.mul_(_uniform(parameter, 0.5, 1.5, generator))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    return (low + (high - low) * torch.rand(like.shape, generator=generator)).to(like)
