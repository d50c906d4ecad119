"""The two shapes a block is made of, one after the other and a skip around, and how they fold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fxexpand.geometry import Geometry, Tree, association, composition, composition_macs
from fxexpand.kernel import Kernel, add, compose_all, identity
from fxexpand.ops import kernel_of


class Skip(nn.Sequential):
    """``x + f(x)`` where ``f`` is the modules in sequence: a linear residual, foldable like all else."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, *size)`` to the same shape."""
        result: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return result


class LastDimBatchNorm(nn.BatchNorm1d):
    """BatchNorm of the last dimension, as a Linear has its channels; the statistics are over all others."""

    def forward(self, x: Tensor) -> Tensor:
        """``(*, channels)`` to the same shape."""
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def stock(self) -> nn.BatchNorm1d:
        """The same numbers as a stock module, which the operator table knows."""
        norm = nn.BatchNorm1d.__new__(nn.BatchNorm1d)
        norm.__dict__.update(self.__dict__)
        return norm


def fold(module: nn.Module, factors: Sequence[Tensor] | None = None) -> Kernel:
    """The one kernel that computes what ``module`` does, differentiable with respect to its factors.

    Args:
        module: Linear and convolutions, BatchNorm in eval mode, nn.Sequential and Skip of those.
        factors: weights ``(out, in/groups, *k)`` to use in place of the layers' own, in their order.

    Raises: InexactError: BatchNorm in train mode, or another module that is no affine map.
    """
    given = None if factors is None else iter(factors)

    def leaf(layer: nn.Module) -> Kernel:
        if isinstance(layer, LastDimBatchNorm):
            return kernel_of(layer.stock(), rank=0)
        kernel = kernel_of(layer)
        return kernel if given is None else replace(kernel, weight=next(given))

    return _fold(module, leaf)


def has_norm(module: nn.Module) -> bool:
    """Whether a BatchNorm is inside."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that have a kernel of their own, in the order they run."""
    if isinstance(module, nn.Sequential):
        for part in module:
            yield from leaves(part)
    else:
        yield module


def fold_cost(module: nn.Module) -> int:
    """Multiply-adds of one ``fold`` in the order it takes; BatchNorm and skips are not counted."""
    factors = [part for part in leaves(module) if isinstance(part, nn.Linear | _ConvNd)]
    geometries = tuple(kernel_of(factor).geometry for factor in factors)
    tree = association(geometries)
    return 0 if isinstance(tree, str) else _cost(tree, geometries)[0]


def _cost(tree: Tree, geometries: Sequence[Geometry]) -> tuple[int, Geometry]:
    if isinstance(tree, int):
        return 0, geometries[tree]
    (before, inner), (after, outer) = (_cost(part, geometries) for part in tree)
    joined = composition(outer, inner)
    assert not isinstance(joined, str)  # an association holds exact compositions only
    return before + after + composition_macs(outer, inner), joined.result


def _fold(module: nn.Module, leaf: Callable[[nn.Module], Kernel]) -> Kernel:
    if not isinstance(module, nn.Sequential):
        return leaf(module)
    inner = compose_all([_fold(part, leaf) for part in module])
    if not isinstance(module, Skip):
        return inner
    around = identity(inner.out_channels, inner.rank, like=inner.weight, groups=inner.groups)
    return add(around, inner)
