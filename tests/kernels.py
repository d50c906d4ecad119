"""Random kernels, their definition as plain loops, and strategies for property tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxexpand.kernel.algebra import Kernel, apply

MODES = ("reflect", "replicate", "circular")


def kernel(out: int, inp: int, *size: int, bias: bool = False, groups: int = 1, **geometry: Any) -> Kernel:
    """A float64 kernel of random numbers."""
    weight = torch.randn(out, inp // groups, *size, dtype=torch.float64)
    return Kernel(weight, torch.randn(out, dtype=torch.float64) if bias else None, groups=groups, **geometry)


def definition(k: Kernel, x: Tensor) -> Tensor:
    """A rank-1 kernel on x (in, length), by the formulas of ``fxexpand.geometry``, one product at a time."""
    (before, after), s, d, taps = k.padding[0], k.stride[0], k.dilation[0], k.kernel_size[0]
    weight = torch.zeros(k.out_channels, k.in_channels, taps, dtype=x.dtype)
    rows, columns = k.out_channels // k.groups, k.in_channels // k.groups
    for g in range(k.groups):
        block = k.weight[g * rows : (g + 1) * rows]
        weight[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = block
    length = x.shape[1]
    if k.transposed:
        y = torch.zeros(k.out_channels, s * (length - 1) + d * (taps - 1) + 1 - before - after, dtype=x.dtype)
        for n in range(length):
            for a in range(taps):
                if 0 <= s * n + d * a - before < y.shape[1]:
                    y[:, s * n + d * a - before] += weight[:, :, a] @ x[:, n]
    else:
        y = torch.zeros(
            k.out_channels, (length + before + after - d * (taps - 1) - 1) // s + 1, dtype=x.dtype
        )
        for n in range(y.shape[1]):
            for a in range(taps):
                place = source(s * n + d * a - before, length, k.padding_mode)
                if place is not None:
                    y[:, n] += weight[:, :, a] @ x[:, place]
    return y if k.bias is None else y + k.bias[:, None]


def source(place: int, length: int, mode: str) -> int | None:
    """The input position that a padded position copies; None for a zero."""
    if 0 <= place < length:
        return place
    if mode == "reflect":
        return -place if place < 0 else 2 * (length - 1) - place
    return {"zeros": None, "replicate": min(max(place, 0), length - 1), "circular": place % length}[mode]


def in_turn(kernels: list[Kernel] | tuple[Kernel, ...], x: Tensor) -> Tensor:
    """The kernels one after the other, first applied first.

    Raises: RuntimeError for an empty result in between, as torch's layers do.
    """
    for k in kernels:
        x = apply(k, x)
        if x.numel() == 0:
            raise RuntimeError("an empty result")
    return x


def outputs(
    one: Callable[[Tensor], Tensor], two: Callable[[Tensor], Tensor], channels: int, lengths: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of both for random inputs of many lengths, those at which ``one`` has no output left out."""
    for length in lengths:
        x = torch.randn(1, channels, length, dtype=torch.float64)
        try:
            expected = one(x)
        except RuntimeError:  # torch: no output, or a padding larger than the input
            continue
        yield two(x), expected


@st.composite
def geometries(
    draw: st.DrawFn, out: int, inp: int, *, modes: bool = False, transposed: bool = False, crops: bool = True
) -> Kernel:
    """A rank-1 kernel of any geometry; numbers are random, not drawn."""
    taps, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sides = st.integers(-1 if crops else 0, 3)
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if math.gcd(out, inp) % g == 0]))
    return kernel(
        out,
        inp,
        taps,
        bias=draw(st.booleans()),
        groups=groups,
        stride=(draw(st.integers(1, 3)),),
        dilation=(dilation,),
        padding=((draw(sides), draw(sides)),),
        transposed=transposed and draw(st.booleans()),
        padding_mode=draw(st.sampled_from(("zeros", *MODES))) if modes else "zeros",
    )


def perturbed(norm: nn.Module) -> nn.Module:
    """A BatchNorm with random statistics and parameters, in evaluation mode and float64."""
    norm = norm.double().eval()
    with torch.no_grad():
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5
                    if name in ("weight", "running_var")
                    else torch.randn_like(tensor)
                )
    return norm
