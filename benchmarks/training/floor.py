"""The floor of a training step: what arithmetic asks of an expanded network, whatever computes it.

The original step, the extra FLOPs of each layer's cheapest form at the machine's measured rate of matrix
products, and what the optimizer takes for that many more parameters. Counted here anew, without the library's
own choice of forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import combinations, pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training.training_steps import timed
from fxexpand.kernel.algebra import macs
from fxexpand.kernel.modules import kernel_of
from fxexpand.layers.expanded import Expanded
from fxexpand.layers.rewritten import bare, effective_shape


def matmul_rate(device: str, half: bool = False, size: int = 1024) -> float:
    """Multiply-adds per second of a square matrix product, the median of 5."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    return size**3 / median(timed(partial(torch.mm, a, a), device) for _ in range(5))


def extra_macs(big: nn.Module, x: Tensor, batches: int) -> float:
    """Multiply-adds that the cheapest forms add to one forward, with a product for every ``batches``.

    Args:
        big: with ``Chain`` in its layers; the meta device will do.
    """
    seen: dict[nn.Module, float] = {}

    def note(module: Any, args: Any, output: Any) -> None:
        channels = output.shape[-1 if isinstance(module, nn.Linear) else 1]
        positions = output.numel() // channels
        empty = torch.empty(effective_shape(module), device="meta")
        original = macs(kernel_of(bare(module, empty))) * positions
        seen[module] = cheapest(module.expansion, positions, batches) - original

    layers = [module for module in big.modules() if isinstance(module, Expanded)]
    handles = [module.register_forward_hook(note) for module in layers]
    with torch.no_grad():
        big(x)
    for handle in handles:
        handle.remove()
    return sum(seen.values())


def cheapest(block: nn.Sequential, positions: int, batches: int) -> float:
    """Multiply-adds of a chain of factors for that many positions, with the input last in every product.

    Of all ways to cut the chain into runs: each run is multiplied first, then applied to the activations.
    """
    groups = kernel_of(block[0]).groups
    shapes = [kernel_of(part).weight.shape for part in block]
    sizes = (shapes[0][1:].numel(), *(shape[0] // groups for shape in shapes))
    count = len(shapes)
    costs = []
    for number in range(count):
        for cut in combinations(range(1, count), number):
            runs = list(pairwise((0, *cut, count)))
            products = sum(_product_macs(sizes[a : b + 1]) for a, b in runs) / batches
            costs.append(groups * (products + positions * sum(sizes[a] * sizes[b] for a, b in runs)))
    return float(min(costs))


@lru_cache(maxsize=4096)
def _product_macs(sizes: Sequence[int]) -> int:
    """Matrix-chain ordering, as plainly as it goes."""
    if len(sizes) <= 2:
        return 0
    return min(
        _product_macs(sizes[: k + 1]) + _product_macs(sizes[k:]) + sizes[0] * sizes[k] * sizes[-1]
        for k in range(1, len(sizes) - 1)
    )
