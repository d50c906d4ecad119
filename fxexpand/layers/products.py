"""Products of factors, prepared once: what to multiply in which order, and how many of the factors at all.

``fxexpand.recipes.fold`` derives the geometry at every call. Training asks at every step, and the common
block, a kernel followed by 1 x 1 factors, is nothing but a chain of matrices: its geometry is settled once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxexpand.errors import FxExpandError
from fxexpand.kernel.geometry import Tree, association
from fxexpand.kernel.lower import is_channels_last
from fxexpand.kernel.modules import LAYERS, kernel_of

# From the first factor to the last one (not included) of those that are multiplied.
Segment: TypeAlias = tuple[int, int]
# Consecutive segments: each is multiplied first, then applied to the activations.
Way: TypeAlias = tuple[Segment, ...]

ENUMERATED = 8  # factors up to which all 2^(d - 1) ways are considered


@dataclass(frozen=True, eq=False)
class MatrixChain:
    """Factors ``(out, in/groups, *k)``, then ``(out, in/groups, 1...)``, all with the same groups.

    Attributes:
        groups: of every factor; the chain is that of one group, as often.
        sizes: ``n_0 = in/groups * prod(k), n_1, ...``: factor i is a matrix ``(n_(i+1), n_i)``.
        orders: the cheapest association of each segment of two factors or more.
        ways: ``(positions, way)`` by falling number of positions from which on a way is the cheapest.
    """

    groups: int
    sizes: tuple[int, ...]
    orders: dict[Segment, Tree]
    ways: tuple[tuple[float, Way], ...]

    @property
    def whole(self) -> Segment:
        """All factors."""
        return 0, len(self.sizes) - 1

    def way(self, positions: float) -> Way:
        """The way with the fewest multiply-adds for that many positions of the output.

        Where torch.compile traces with a size that may vary, all factors are multiplied unless that is never
        the cheapest: one graph serves all sizes.
        """
        for start, way in self.ways:
            if not surely_below(positions, start):
                return way
        return self.ways[-1][1]

    def product(self, weights: Sequence[Tensor], segment: Segment) -> Tensor:
        """The weight ``(out, in/groups, *k)`` of consecutive factors, in the memory format of the first."""
        start, stop = segment
        first = weights[start]
        if stop - start == 1:
            return first
        last_dim = is_channels_last(first)  # then the taps are rows of a matrix without a copy
        source = first.movedim(1, -1) if last_dim else first
        shape = (-1, self.sizes[start]) if self.groups == 1 else (self.groups, -1, self.sizes[start])
        matrices = [source.reshape(shape)]
        for size, weight in zip(self.sizes[start + 1 : stop], weights[start + 1 : stop], strict=True):
            matrices.append(weight.reshape((-1, size) if self.groups == 1 else (self.groups, -1, size)))
        product = _multiplied(self.orders[segment], matrices)
        result = product.reshape(-1, *source.shape[1:])
        return result.movedim(-1, 1) if last_dim else result


def matrix_chain(block: nn.Module) -> MatrixChain | None:
    """The chain of matrices that a block is; None where it is more than that.

    A block that is one: ``nn.Sequential`` of one plain convolution or Linear and others of one tap, stride 1
    and no padding, without biases, with equal groups.
    """
    if type(block) is not nn.Sequential or not len(block) or any(type(part) not in LAYERS for part in block):
        return None
    geometries = [kernel_of(part).geometry for part in block]
    first, *others = geometries
    if any(g.transposed or g.bias or (g.groups, g.rank) != (first.groups, first.rank) for g in geometries):
        return None
    if not all(g.pointwise for g in others):
        return None
    sizes = (first.macs // first.out_channels, *(g.out_channels // g.groups for g in geometries))
    count = len(geometries)
    costs = {(i, i + 1): 0 for i in range(count)}
    orders: dict[Segment, Tree] = {}
    for start, stop in itertools.combinations(range(count + 1), 2):
        if stop - start > 1 and (count <= ENUMERATED or (start, stop) == (0, count)):
            order = association(tuple(geometries[start:stop]))
            assert not isinstance(order, str)  # pointwise kernels compose
            orders[start, stop] = order
            costs[start, stop] = first.groups * _cost(order, sizes[start : stop + 1])[0]
    return MatrixChain(first.groups, sizes, orders, _cheapest(costs, sizes, first.groups))


def surely_below(value: float, limit: float) -> bool:
    """``value < limit``; while torch.compile traces a size that may vary: whether it holds for all sizes."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

        return bool(statically_known_true(value < limit))
    return value < limit


class Held:
    """Products that are formed once and stand in for themselves as leaves, so that gradients gather there.

    Args:
        factors: what the products are made of, as they are at the time of the call.
        batches: micro-batches that share one product; the choice of a form counts it that much less.
    """

    def __init__(self, factors: Callable[[], Sequence[Tensor]], batches: int) -> None:
        self.batches = batches
        self._factors = factors
        self._first = list(factors())
        self._states = [state(factor) for factor in self._first]
        self._pairs: dict[Any, tuple[Tensor, Tensor]] = {}
        self._open = [True]  # a list: what hooks on the stand-ins share, without a cycle through this object

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model, made inside the block, holds no products."""
        return type(None), ()

    def leaf(self, key: Any, form: Callable[[], Tensor]) -> Tensor:
        """The stand-in for the product ``form()``, formed at the first call with ``key``.

        Other factors, as torch.func.functional_call lends them, have a product of their own.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._exchanged():
            return form()
        if key not in self._pairs:
            # Neither can hand a leaf on: a compiled graph, and inference mode, whose tensors never train.
            if compiling or torch.is_inference_mode_enabled():
                return form()
            with torch.enable_grad(), unhooked():
                product = form()
            leaf = product.detach().requires_grad_(product.requires_grad)
            if leaf.requires_grad:
                leaf.register_hook(partial(_require_open, self._open))  # type: ignore[no-untyped-call]
            self._pairs[key] = product, leaf
        leaf = self._pairs[key][1]
        return leaf if torch.is_grad_enabled() else leaf.detach()

    def gathered(self) -> list[tuple[Tensor, Tensor]]:
        """Each product with the gradient that has gathered at its stand-in.

        Raises: FxExpandError: the factors are no longer those that the products were made of.
        """
        if self._exchanged() or [state(factor) for factor in self._first] != self._states:
            raise FxExpandError(
                "accumulate: the factors changed inside the block, so the products are out of date. Step the "
                "optimizer after the block, and open a new one for the next step."
            )
        return [(product, leaf.grad) for product, leaf in self._pairs.values() if leaf.grad is not None]

    def close(self) -> None:
        """From now on a gradient that reaches a stand-in is an error: nobody takes it to the factors."""
        self._open[0] = False

    def _exchanged(self) -> bool:
        return any(now is not then for now, then in zip(self._factors(), self._first, strict=True))


def exact_products(like: Tensor) -> AbstractContextManager[Any]:
    """No autocast: a half-precision product would add its rounding once per factor."""
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def unhooked() -> AbstractContextManager[Any]:
    """What is saved for backward inside escapes the hooks around.

    A checkpoint counts what its hooks see, forwards and again in backward; a product that is formed in one of
    the two passes and was kept from elsewhere in the other must not be among it.
    """
    autograd: Any = torch._C._autograd
    if torch.compiler.is_compiling() or not autograd._saved_tensors_hooks_is_enabled():
        return nullcontext()  # torch.func allows no hooks at all
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def state(factor: Tensor) -> tuple[int | None, int | None]:
    """Changes when the values do, in place or by another ``.data``; inference tensors do not count."""
    storage = factor.untyped_storage()._cdata if torch._C._has_storage(factor) else None  # vmap's have none
    return None if factor.is_inference() else factor._version, storage


def _require_open(still: list[bool], gradient: Tensor) -> None:
    if not still[0]:
        raise FxExpandError(
            "accumulate: backward was called after the block, where no gradient reaches the factors any "
            "more. Call loss.backward() inside it."
        )


def _multiplied(order: Tree, matrices: Sequence[Tensor]) -> Tensor:
    if isinstance(order, int):
        return matrices[order]
    inner, outer = order
    return _multiplied(outer, matrices) @ _multiplied(inner, matrices)


def _cost(order: Tree, sizes: Sequence[int]) -> tuple[int, int, int]:
    """Multiply-adds, rows and columns of a product in a given association."""
    if isinstance(order, int):
        return 0, sizes[order + 1], sizes[order]
    before, between, columns = _cost(order[0], sizes)
    after, rows, _ = _cost(order[1], sizes)
    return before + after + rows * between * columns, rows, columns


def _cheapest(costs: dict[Segment, int], sizes: Sequence[int], groups: int) -> tuple[tuple[float, Way], ...]:
    """The lower envelope of the costs of all ways, each ``products + positions * weights``."""
    count = len(sizes) - 1
    if count <= ENUMERATED:
        cuts = [c for n in range(count) for c in itertools.combinations(range(1, count), n)]
    else:
        cuts = [(), tuple(range(1, count))]
    lines: list[tuple[int, int, Way]] = []
    for cut in cuts:
        way = tuple(itertools.pairwise((0, *cut, count)))
        weights = groups * sum(sizes[start] * sizes[stop] for start, stop in way)
        lines.append((weights, sum(costs[segment] for segment in way), way))
    # From many positions, where the fewest weights win, down to none, where the cheapest products do.
    weights, fixed, way = min(lines)
    envelope: list[tuple[float, Way]] = []
    while True:
        crossings = [((fixed - f) / (w - weights), f, w, v) for w, f, v in lines if f < fixed and w > weights]
        if not crossings:
            return (*envelope, (0.0, way))
        start, f, w, v = max(crossings, key=lambda crossing: (crossing[0], -crossing[1]))
        envelope.append((start, way))
        fixed, weights, way = f, w, v
