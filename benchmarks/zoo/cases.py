"""A network of the zoo with the inputs it is called with, shortened where it is large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import runs
from benchmarks.shorten import shorten
from fxexpand.running.inputs import ExampleInputs

CLASSES = 16


LARGE = 20_000_000  # parameters above which equal blocks are left out: all is done in float64


KEEP = (2, 1)  # equal blocks in a row, tried in this order until a network is no longer large


@dataclass(frozen=True)
class Case:
    """A network and what it is called with.

    Attributes:
        build: a new one with random weights, always of the same structure.
        inputs: in evaluation mode.
        training: in training mode, where detectors need targets.
        size: pixels, or ``frames x pixels``; "" where there are no images.
        cut: ``kept/all`` of the equal blocks; "" where all are there.
        also: ``(model, inputs) -> outputs`` of another method than forward.
    """

    build: Callable[[], nn.Module]
    inputs: ExampleInputs
    training: ExampleInputs
    size: str = ""
    cut: str = ""
    also: Callable[[nn.Module, ExampleInputs], Any] | None = None


def images(*shape: int) -> Tensor:
    """The same random images at every call."""
    device = torch.empty(0).device  # inside `with torch.device("meta")` there are no values
    generator = torch.Generator().manual_seed(0) if device.type == "cpu" else None
    return torch.randn(shape, generator=generator)


def fitted(
    create: Callable[..., nn.Module],
    options: list[dict[str, Any]],
    inputs: Callable[[int], ExampleInputs],
    sizes: tuple[int, ...],
    argument: str,
) -> Case:
    """The smallest size that a network takes, or can be built for.

    Args:
        options: of ``create``, tried in this order: one that it has no name for is a reason to try the next.
        argument: the name of the option that builds it for a size.

    Raises: RuntimeError: none of the sizes fits.
    """
    for size in sizes:
        example = partial(inputs, size)
        for given in options:
            for more in ({}, {argument: size}):
                build = partial(create, **given, **more)
                if runs(build, example):
                    return shortened(build, example, str(size))
    raise RuntimeError(f"takes none of the sizes {', '.join(map(str, sizes))}")


def shortened(build: Callable[[], nn.Module], inputs: Callable[[], ExampleInputs], size: str) -> Case:
    """The network with as many of its equal blocks as keep it from being large, if it runs without them."""
    whole = Case(build, inputs(), inputs(), size)
    for keep in KEEP:
        model, cut = _cut(build, keep)
        if _count(model) <= LARGE and not cut:
            return whole
        if (_count(model) <= LARGE or keep == KEEP[-1]) and cut:
            short = partial(_short, build, keep)
            return Case(short, inputs(), inputs(), size, cut) if runs(short, inputs) else whole
    return whole


def _cut(build: Callable[[], nn.Module], keep: int) -> tuple[nn.Module, str]:
    try:
        with torch.device("meta"):
            model = build()
    except NotImplementedError:
        model = build()
    if _count(model) <= LARGE:
        return model, ""
    kept, total = shorten(model, keep)
    return model, f"{kept}/{total}" if total else ""


def _short(build: Callable[[], nn.Module], keep: int) -> nn.Module:
    model = build()
    shorten(model, keep)
    return model


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
