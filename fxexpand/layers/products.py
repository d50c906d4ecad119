"""Products of factors: which runs of factors to multiply, in which order, and how long to keep the products.

``fxexpand.recipes.fold`` derives the geometry of a block at every call. Training needs the product at every
step, and the common block, a kernel followed by 1 x 1 factors, is a chain of matrices: its evaluation plans
are made once.
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
from fxexpand.kernel.geometry import Association, Geometry, association
from fxexpand.kernel.lower import is_channels_last
from fxexpand.kernel.modules import LAYERS, kernel_of

# A run of factors (start, stop): those that are multiplied, ``stop`` not included.
Run: TypeAlias = tuple[int, int]
# An evaluation plan: consecutive runs, each multiplied first, then applied to the activations.
Plan: TypeAlias = tuple[Run, ...]

ENUMERATED = 8  # number of factors up to which all 2^(d - 1) plans are considered


@dataclass(frozen=True, eq=False)
class MatrixChain:
    """Factors ``(out, in/groups, *k)``, then ``(out, in/groups, 1...)``, all with the same groups.

    Attributes:
        groups: of every factor; each group has a chain of its own, of the same sizes.
        sizes: ``n_0 = in/groups * prod(k), n_1, ...``: factor i is a matrix ``(n_(i+1), n_i)``.
        orders: the cheapest association of each run of two factors or more.
        plans: ``(positions, plan)``: the plan is the cheapest from that number of positions on, up to the
            number of the entry before.
    """

    groups: int
    sizes: tuple[int, ...]
    orders: dict[Run, Association]
    plans: tuple[tuple[float, Plan], ...]

    @property
    def whole(self) -> Run:
        """The run of all factors."""
        return 0, len(self.sizes) - 1

    def plan(self, positions: float) -> Plan:
        """The plan with the fewest multiply-adds for that many positions of the output.

        Where torch.compile traces with a size that may vary, all factors are multiplied unless that is never
        the cheapest: one graph serves all sizes.
        """
        for start, plan in self.plans:
            if not surely_below(positions, start):
                return plan
        return self.plans[-1][1]

    def product(self, weights: Sequence[Tensor], run: Run) -> Tensor:
        """The weight ``(out, in/groups, *k)`` of consecutive factors, in the memory format of the first."""
        start, stop = run
        first = weights[start]
        if stop - start == 1:
            return first
        last_dim = is_channels_last(first)  # the weight is a matrix without a copy
        source = first.movedim(1, -1) if last_dim else first
        shape = (-1, self.sizes[start]) if self.groups == 1 else (self.groups, -1, self.sizes[start])
        matrices = [source.reshape(shape)]
        for size, weight in zip(self.sizes[start + 1 : stop], weights[start + 1 : stop], strict=True):
            matrices.append(weight.reshape((-1, size) if self.groups == 1 else (self.groups, -1, size)))
        product = _multiplied(self.orders[run], matrices)
        result = product.reshape(-1, *source.shape[1:])
        return result.movedim(-1, 1) if last_dim else result


def matrix_chain(block: nn.Module) -> MatrixChain | None:
    """The block as a chain of matrices; None if it is not one.

    A chain of matrices is an ``nn.Sequential`` of one plain convolution or Linear and of pointwise layers
    with stride 1 and no padding, without biases, with equal groups.
    """
    if type(block) is not nn.Sequential or not len(block) or any(type(part) not in LAYERS for part in block):
        return None
    geometries = [kernel_of(part).geometry for part in block]
    return _planned(geometries) if _are_matrices(*geometries) else None


def _are_matrices(first: Geometry, *others: Geometry) -> bool:
    common = (first.groups, first.rank, False, False)
    plain = all((g.groups, g.rank, g.transposed, g.bias) == common for g in (first, *others))
    return plain and all(g.pointwise for g in others)


def _planned(geometries: Sequence[Geometry]) -> MatrixChain:
    first, count = geometries[0], len(geometries)
    sizes = (first.macs // first.out_channels, *(g.out_channels // g.groups for g in geometries))
    costs = {(i, i + 1): 0 for i in range(count)}
    orders: dict[Run, Association] = {}
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


class ProductCache:
    """Products that are computed once; each is replaced by a leaf tensor, at which gradients accumulate.

    Args:
        factors: the current factors of the products.
        batches: number of micro-batches that share a product; the evaluation plan is chosen for all of them.
    """

    def __init__(self, factors: Callable[[], Sequence[Tensor]], batches: int) -> None:
        self.batches = batches
        self._factors = factors
        self._first = list(factors())
        self._versions = [version(factor) for factor in self._first]
        self._pairs: dict[Any, tuple[Tensor, Tensor]] = {}
        self._open = [True]  # a list, which the hooks on the leaves share without a cycle through this object

    def __reduce__(self) -> tuple[Any, ...]:
        """The copy is None: a copy of the model made inside ``accumulate`` has no cache."""
        return type(None), ()

    def leaf(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """The leaf for the product ``compute()``, which is computed at the first call with ``key``.

        Factors that torch.func.functional_call overrides have a product of their own.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._overridden():
            return compute()
        if key not in self._pairs:
            # Neither a compiled graph nor inference mode, whose tensors never train, can make a leaf.
            if compiling or torch.is_inference_mode_enabled():
                return compute()
            with torch.enable_grad(), unhooked():
                product = compute()
            leaf = product.detach().requires_grad_(product.requires_grad)
            if leaf.requires_grad:
                leaf.register_hook(partial(_require_open, self._open))  # type: ignore[no-untyped-call]
            self._pairs[key] = product, leaf
        leaf = self._pairs[key][1]
        return leaf if torch.is_grad_enabled() else leaf.detach()

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Each product with the gradient that has accumulated at its leaf.

        Raises: FxExpandError: the factors changed since the products were computed.
        """
        if self._overridden() or [version(factor) for factor in self._first] != self._versions:
            raise FxExpandError(
                "accumulate: the factors changed inside the block, so the products are out of date. Step the "
                "optimizer after the block, and open a new one for the next step."
            )
        return [(product, leaf.grad) for product, leaf in self._pairs.values() if leaf.grad is not None]

    def close(self) -> None:
        """From now on a gradient that reaches a leaf is an error: it would not reach the factors."""
        self._open[0] = False

    def _overridden(self) -> bool:
        return any(now is not first for now, first in zip(self._factors(), self._first, strict=True))


def exact_products(like: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast: a half-precision product would add its rounding once per factor."""
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def unhooked() -> AbstractContextManager[Any]:
    """Tensors saved for backward inside this context do not reach the saved-tensor hooks around it.

    Activation checkpointing counts the tensors that its hooks see, forwards and again in backward. A product
    may be computed in one of the two passes and come from a cache in the other, so it must not be counted.
    """
    autograd: Any = torch._C._autograd
    if torch.compiler.is_compiling() or not autograd._saved_tensors_hooks_is_enabled():
        return nullcontext()  # torch.func allows no hooks at all
    return torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def version(factor: Tensor) -> tuple[int | None, int | None]:
    """A value that changes when those of the factor do, in place or by another ``.data``.

    Inference tensors have no version.
    """
    storage = factor.untyped_storage()._cdata if torch._C._has_storage(factor) else None  # vmap's have none
    return None if factor.is_inference() else factor._version, storage


def _require_open(is_open: list[bool], gradient: Tensor) -> None:
    if not is_open[0]:
        raise FxExpandError(
            "accumulate: backward was called after the block, where no gradient reaches the factors any "
            "more. Call loss.backward() inside it."
        )


def _multiplied(order: Association, matrices: Sequence[Tensor]) -> Tensor:
    if isinstance(order, int):
        return matrices[order]
    inner, outer = order
    return _multiplied(outer, matrices) @ _multiplied(inner, matrices)


def _cost(order: Association, sizes: Sequence[int]) -> tuple[int, int, int]:
    """Multiply-adds, rows and columns of a product in a given association."""
    if isinstance(order, int):
        return 0, sizes[order + 1], sizes[order]
    before, between, columns = _cost(order[0], sizes)
    after, rows, _ = _cost(order[1], sizes)
    return before + after + rows * between * columns, rows, columns


def _cheapest(costs: dict[Run, int], sizes: Sequence[int], groups: int) -> tuple[tuple[float, Plan], ...]:
    """The lower envelope of the costs of all plans, each ``products + positions * weights``."""
    count = len(sizes) - 1
    if count <= ENUMERATED:
        cuts = [c for n in range(count) for c in itertools.combinations(range(1, count), n)]
    else:
        cuts = [(), tuple(range(1, count))]
    lines: list[tuple[int, int, Plan]] = []
    for cut in cuts:
        plan = tuple(itertools.pairwise((0, *cut, count)))
        weights = groups * sum(sizes[start] * sizes[stop] for start, stop in plan)
        lines.append((weights, sum(costs[run] for run in plan), plan))
    # From many positions, where the fewest weights win, down to none, where the cheapest products do.
    weights, fixed, plan = min(lines)
    envelope: list[tuple[float, Plan]] = []
    while True:
        crossings = [((fixed - f) / (w - weights), f, w, p) for w, f, p in lines if f < fixed and w > weights]
        if not crossings:
            return (*envelope, (0.0, plan))
        start, f, w, p = max(crossings, key=lambda crossing: (crossing[0], -crossing[1]))
        envelope.append((start, plan))
        fixed, weights, plan = f, w, p
