"""Give a freshly built network the statistics of a trained one.

As built, BatchNorm is the identity, many biases are zero, and some branches are switched off by a scale of
zero or 1e-6, so that an error in them would not reach the outputs.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs

SMALL = 0.2  # constants below this are scales that switch a branch off


@torch.no_grad()
def settle(model: nn.Module, inputs: ExampleInputs, seed: int = 0) -> None:
    """Shake the constant parameters and the BatchNorm statistics of ``model``, in place.

    A parameter whose values are all ``c`` becomes normal with deviation 0.05 for ``c = 0``, uniform in
    [0.2, 0.6] for a small ``c``, and ``c`` times uniform in [0.5, 1.5] otherwise. Running statistics are
    those of one pass in which BatchNorm alone trains (dropped branches would not be those of the network in
    use), moved by up to 10 % of the variance and of a deviation. Where ``inputs`` are a batch of images, the
    pass is over more varied ones of the same size.
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
    model.eval()
    for norm in norms:
        norm.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] == 3
        call(model, _varied(cast(Tensor, inputs), generator) if images else copy_inputs(inputs))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None
        # A small batch leaves some channels without variance. The others must keep theirs: a few percent less
        # in every layer, and the activations grow along the depth until rounding is all one measures.
        variance.clamp_(min=0.1 * float(variance.mean()))
        variance.mul_(_uniform(variance, 0.9, 1.1, generator))
        mean.add_(0.1 * variance.sqrt() * _normal(mean, generator))
    for module, training in flags:
        module.training = training


def _varied(images: Tensor, generator: torch.Generator, count: int = 16) -> Tensor:
    """Images of random colour, contrast and coarse structure, in the size and dtype of ``images``.

    Noise alone is the same everywhere to a deep layer: channels would have next to no variance, and a network
    normalised by it amplifies rounding, which no trained network does.
    """
    size = images.shape[-2:]
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    contrast = 0.3 + 1.7 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.randn(count, 3, *size, generator=generator)
    smooth = functional.interpolate(coarse, size=size, mode="bilinear")
    return (0.5 * colour + contrast * (smooth + 0.5 * noise)).to(images)


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
