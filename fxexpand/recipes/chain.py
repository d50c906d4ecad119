"""The linear chain of Huh et al., "The Low-Rank Simplicity Bias in Deep Networks" (TMLR 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError, SelectionError
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.lower import laid_out_as, to_module
from fxexpand.recipes.factors import balanced_factors, kaiming_factors
from fxexpand.recipes.parts import keeps_size, require_init, require_weight, silent_norm
from fxexpand.recipes.recipe import Init, Recipe
from fxexpand.recipes.structure import Skip

LOPSIDED = 4
Runs: TypeAlias = "Sequence[tuple[int, int, bool]]"  # start, stop, whether a skip goes around the factors


@dataclass(frozen=True)
class Chain(Recipe):
    """``depth`` linear layers in a row: the k x k kernel first, then 1 x 1.

    Padding, stride, dilation and transposition are on the first factor, the bias on the last, so the fold is
    exact at the borders too. (The released code has the stride on the last layer; as all later kernels are
    1 x 1 that is the same map, at several times the cost.) A grouped kernel becomes a chain per group.

    Attributes:
        depth: number of factors, at least 1.
        width: the hidden width is ``ceil(width * out)``, but at least the full rank, and ``out`` counts at
            most ``LOPSIDED`` times the full rank: else the head of a language model, 50,000 outputs from 768,
            would have factors of 100,000 x 100,000.
        batch_norm: a BatchNorm after every factor. Such a block runs on activations and folds in evaluation
            mode only, where ``init="preserve"`` holds; a layer without a bias gets one.
        residual: n > 0 puts a skip around each run of n factors, -1 around the whole chain, 0 none. A run
            that changes the number of channels or the size gets none, so ``width=1`` is mostly needed.
        bottleneck: allow a hidden width below full rank, which constrains the map.

    Raises: SelectionError: a value is out of range.
    """

    depth: int = 3
    width: float = 2
    batch_norm: bool = False
    residual: int = 0
    bottleneck: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.depth, int) or self.depth < 1:
            raise SelectionError(f"Chain(depth={self.depth!r}): choose a whole number of factors, 1 or more.")
        if not (isinstance(self.width, int | float) and 0 < self.width < math.inf):
            raise SelectionError(
                f"Chain(width={self.width!r}): choose a positive number, 1 or more as a rule."
            )
        if not isinstance(self.residual, int) or self.residual < -1:
            raise SelectionError(
                f"Chain(residual={self.residual!r}): choose the number of factors under one skip, -1 for a "
                "single skip around the chain, or 0 for none."
            )

    def __str__(self) -> str:
        """Depth, width and all values other than the defaults, as tables show them."""
        special = [
            f.name for f in fields(self) if f.name in ("depth", "width") or getattr(self, f.name) != f.default
        ]
        return f"Chain({', '.join(f'{name}={getattr(self, name)}' for name in special)})"

    @property
    def needs_activations(self) -> bool:
        return self.batch_norm

    def hidden_width(self, kernel: Kernel) -> int:
        """Number of channels between the factors, a multiple of the groups."""
        groups = kernel.groups
        full = groups * min(kernel.out_channels // groups, _matrix(kernel.weight, groups).shape[2])
        wanted = math.ceil(self.width * min(kernel.out_channels, LOPSIDED * full))
        if not self.bottleneck:
            wanted = max(wanted, full)
        return groups * math.ceil(wanted / groups)

    def build(
        self, kernel: Kernel, *, init: Init = "preserve", generator: torch.Generator | None = None
    ) -> nn.Sequential:
        require_init(init)
        geometry = self._geometry(kernel)
        runs = self._runs(geometry)
        if self.residual and not any(skip for _, _, skip in runs):
            raise InexactError(
                f"residual={self.residual} finds no run of factors that keeps channels and size. "
                "Use width=1 and a smaller residual, or residual=0"
            )
        if kernel.weight.is_meta:
            weights = [factor.weight for factor in geometry]
        elif init == "preserve":
            weights = self._preserving(kernel, geometry, runs, generator)
        else:
            weights = self._random(kernel, geometry, runs, init, generator)
        trains = kernel.weight.requires_grad
        factors = [
            replace(factor, weight=weight.detach().requires_grad_(trains))
            for factor, weight in zip(geometry, weights, strict=True)
        ]
        factors[0] = replace(factors[0], weight=laid_out_as(factors[0].weight, kernel.weight))
        if kernel.bias is not None:
            bias = kernel.bias.detach().clone().requires_grad_(kernel.bias.requires_grad)
            factors[-1] = replace(factors[-1], bias=bias)
        return self._assemble(factors, runs)

    def _geometry(self, kernel: Kernel) -> list[Kernel]:
        """The factors with weights on the meta device."""
        require_weight(kernel)
        if self.depth == 1:
            return [replace(kernel, weight=torch.empty_like(kernel.weight, device="meta"), bias=None)]
        groups, hidden, ones = kernel.groups, self.hidden_width(kernel), (1,) * kernel.rank
        empty = partial(torch.empty, dtype=kernel.weight.dtype, device="meta")
        first = empty((hidden, kernel.weight.shape[1], *kernel.kernel_size))
        widths = [hidden] * (self.depth - 2) + [kernel.out_channels]
        later = [Kernel(empty((width, hidden // groups, *ones)), groups=groups) for width in widths]
        return [replace(kernel, weight=first, bias=None), *later]

    def _runs(self, geometry: Sequence[Kernel]) -> Runs:
        depth = len(geometry)
        length = depth if self.residual in (0, -1) else self.residual
        runs = []
        for start in range(0, depth, length):
            stop = min(start + length, depth)
            same = geometry[start].in_channels == geometry[stop - 1].out_channels
            kept = same and keeps_size(geometry[start])
            runs.append((start, stop, bool(self.residual) and kept))
        return runs

    def _preserving(
        self, kernel: Kernel, geometry: Sequence[Kernel], runs: Runs, generator: torch.Generator | None
    ) -> list[Tensor]:
        """Balanced factors of the kernel; under a skip, those of the share of the run minus the identity."""
        groups, hidden = kernel.groups, geometry[0].out_channels // kernel.groups
        targets = balanced_factors(_matrix(kernel.weight, groups), hidden, len(runs), generator)
        weights: list[Tensor] = []
        for (start, stop, skip), target in zip(runs, targets, strict=True):
            if skip:
                weight = target.new_zeros(geometry[start].weight.shape)  # of the centred identity
                channels: Any = torch.arange(len(weight))
                weight[(channels, channels % weight.shape[1], *(k // 2 for k in weight.shape[2:]))] = 1.0
                target = target - _matrix(weight, groups)
            weights += balanced_factors(target, hidden, stop - start, generator)
        return [weight.reshape(factor.weight.shape) for weight, factor in zip(weights, geometry, strict=True)]

    def _random(
        self,
        kernel: Kernel,
        geometry: Sequence[Kernel],
        runs: Runs,
        init: Init,
        generator: torch.Generator | None,
    ) -> list[Tensor]:
        shapes = [tuple(factor.weight.shape) for factor in geometry]
        weights = kaiming_factors(shapes, "fan_out" if kernel.rank else "fan_in", kernel.weight, generator)
        if init == "kaiming":
            return weights
        if any(skip for _, _, skip in runs):
            raise InexactError("init='matched' is not defined with a residual. Use 'preserve' or 'kaiming'")
        product = _matrix(weights[0], kernel.groups).double()
        for weight in weights[1:]:
            product = _matrix(weight, kernel.groups).double() @ product
        norm, wanted = float(product.norm()), float(kernel.weight.detach().double().norm())
        if wanted == 0.0 or norm == 0.0:
            return weights
        return [weight * (wanted / norm) ** (1.0 / len(weights)) for weight in weights]

    def _assemble(self, factors: Sequence[Kernel], runs: Runs) -> nn.Sequential:
        parts: list[nn.Module] = []
        for start, stop, skip in runs:
            run: list[nn.Module] = []
            for factor in factors[start:stop]:
                norm = [silent_norm(factor.weight, factor.out_channels)] if self.batch_norm else []
                run += [to_module(factor, copy=False), *norm]
            parts.extend([Skip(*run)] if skip else run)
        return nn.Sequential(*parts)


def _matrix(weight: Tensor, groups: int) -> Tensor:
    """``(out, in/groups, *k)`` as ``(groups, out/groups, in/groups * prod(k))``."""
    return weight.detach().reshape(groups, weight.shape[0] // groups, -1)
