"""Initial weights of a chain: factors of a given matrix, or random ones.

Matrices are batched: ``(groups, out, in)``, one block per group of a grouped kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError

# Singular values below this share of the largest are spread unevenly over the factors; see balanced_factors.
FLOOR = 1e-3
MIRRORS = 16
BLOCK = 256  # rows below which a product is not worth splitting


def balanced_factors(
    matrix: Tensor, hidden: int | Sequence[int], depth: int, generator: torch.Generator | None = None
) -> list[Tensor]:
    """``depth`` factors with the product ``matrix``, first factor first, in the dtype of ``matrix``.

    With the singular value decomposition ``W = U S V^T``: ``W_1 = Q_1 S^(1/d) V^T``,
    ``W_j = Q_j S^(1/d) Q_(j-1)^T``, ``W_d = U S^(1/d) Q_(d-1)^T`` with random ``Q_j`` of orthonormal columns.
    The factors are balanced, ``W_(j+1)^T W_(j+1) = W_j W_j^T``, as Arora et al. assume at the start, and
    every hidden unit is in use.

    In a direction in which ``W`` vanishes all factors would be zero, a saddle that no gradient leaves. In
    such directions (below ``FLOOR`` of the largest value) all factors but one outer factor keep the size of
    the floor, and the outer factor takes the rest, as a zero-initialised adapter does.

    Only the smaller orthogonal matrix is computed, from the smaller Gram matrix; the other side is ``U^T W``
    itself, so the product is exact whatever the accuracy of the singular values.

    Args:
        matrix: ``(groups, out, in)``.
        hidden: width between the factors, per group; or a list of the ``depth - 1`` widths.

    Raises: InexactError: ``hidden`` is below the rank of the matrix, so no such factors exist.

    Source: S. Arora, N. Cohen, E. Hazan, "On the Optimization of Deep Networks", ICML 2018.
    """
    if depth == 1:
        return [matrix.detach().clone()]
    widths = [hidden] * (depth - 1) if isinstance(hidden, int) else list(hidden)
    groups, out, inner = matrix.shape
    precise = matrix.dtype == torch.float64
    wide = matrix.detach().to(torch.float64 if precise else torch.float32)
    largest = _magnitude(wide)
    unit = wide if largest == 1.0 else wide / largest  # squares neither overflow nor vanish
    tall = out > inner
    basis, rest, values = _decomposed(unit.mT if tall else unit)
    top, narrow = float(values.amax()), min(widths)
    if narrow < values.shape[-1]:
        lost = float(values[:, narrow:].amax())
        if lost > (1e-10 if precise else 1e-5) * top:
            raise InexactError(
                f"a hidden width of {narrow * groups} is below the rank of the weight "
                f"({min(out, inner) * groups} at most), so init='preserve' is impossible. "
                "Use a larger width, or init='matched'."
            )
        basis, rest, values = basis[..., :narrow], rest[:, :narrow], values[:, :narrow]
    size = torch.clamp(values, min=FLOOR * top if top > 0 else 1.0)
    scale = largest ** (1.0 / depth)
    share = size.pow(1.0 / depth) * scale  # (groups, rank): the singular values of each factor
    remaining = scale / size.pow((depth - 1) / depth)
    turns = [Turn(groups, width, share.shape[-1], wide, generator) for width in widths]
    if tall:
        first = turns[0].on_rows(basis.mT, share)
        last = turns[-1].on_columns(rest.mT, remaining)
    else:
        first = turns[0].on_rows(rest, remaining)
        last = turns[-1].on_columns(basis, share)
    middle = [after.around(share, before) for before, after in itertools.pairwise(turns)]
    return [factor.to(matrix.dtype) for factor in (first, *middle, last)]


def _magnitude(matrix: Tensor) -> float:
    """The largest absolute value, or 1.0 where squares of the values are in range as they are."""
    largest = max(abs(float(value)) for value in torch.aminmax(matrix))
    return 1.0 if largest == 0.0 or 1e-6 < largest < 1e6 else largest


def _decomposed(side: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal ``U``, ``U^T side`` and the singular values, by falling value.

    ``side`` is ``(groups, rank, columns)``, ``U`` is ``(groups, rank, rank)``.
    """
    basis = _eigenvectors(gram(side)).flip(-1)
    basis = 1.5 * basis - 0.5 * basis @ gram(basis.mT)  # a Newton-Schulz step: orthonormal to the last bit
    rest = basis.mT @ side
    return basis, rest, torch.linalg.vector_norm(rest, dim=-1)


def gram(matrix: Tensor) -> Tensor:
    """``matrix @ matrix.mT`` for ``(groups, rows, columns)``, at about half the cost.

    The result is symmetric, so only its lower half is multiplied out, in blocks of at least ``BLOCK`` rows.
    """
    rows = matrix.shape[1]
    if rows <= BLOCK:
        return matrix @ matrix.mT
    upper, lower = matrix[:, : rows // 2], matrix[:, rows // 2 :]
    corner = lower @ upper.mT
    return torch.cat([torch.cat([gram(upper), corner.mT], -1), torch.cat([corner, gram(lower)], -1)], 1)


def _eigenvectors(symmetric: Tensor) -> Tensor:
    """Eigenvectors as columns, by rising eigenvalue.

    Small matrices take one thread of the CPU: LAPACK's threads meet at every column, and where another
    process has a core each meeting waits for the scheduler (25 times slower, measured on two busy cores).
    """
    threads = torch.get_num_threads()
    try:
        if symmetric.shape[-1] <= 1024:
            torch.set_num_threads(1)
        vectors: Tensor = torch.linalg.eigh(symmetric)[1]
    finally:
        torch.set_num_threads(threads)
    return vectors


class Turn:
    """A random matrix ``Q (groups, rows, columns)`` with orthonormal columns, in implicit form.

    ``Q`` has the first columns, with random signs, of the reflection ``I - 2 V V^T``, where ``V`` has up to
    ``MIRRORS`` random orthonormal columns. It mixes all rows, at a fraction of the cost of a dense product.
    """

    def __init__(
        self, groups: int, rows: int, columns: int, like: Tensor, generator: torch.Generator | None
    ) -> None:
        device = generator.device if generator is not None else torch.device("cpu")
        mirrors = min(MIRRORS, max(1, rows // 4))
        normal = torch.randn(groups, rows, mirrors, dtype=like.dtype, generator=generator, device=device)
        self.mirrors = torch.linalg.qr(normal)[0].to(like.device)
        coins = torch.randint(0, 2, (groups, columns), generator=generator, device=device)
        self.signs = (2 * coins - 1).to(like.device, like.dtype)
        self.rows = rows

    def on_rows(self, matrix: Tensor, diagonal: Tensor | float = 1.0) -> Tensor:
        """``Q @ diag(diagonal) @ matrix``, from ``(groups, columns, n)`` to ``(groups, rows, n)``."""
        signed, columns = matrix * (diagonal * self.signs).unsqueeze(-1), matrix.shape[1]
        result: Tensor = self.mirrors @ (-2.0 * self.mirrors[:, :columns].mT @ signed)
        result[:, :columns] += signed
        return result

    def on_columns(self, matrix: Tensor, diagonal: Tensor | float = 1.0) -> Tensor:
        """``matrix @ diag(diagonal) @ Q.mT``, from ``(groups, n, columns)`` to ``(groups, n, rows)``."""
        signed, columns = matrix * (diagonal * self.signs).unsqueeze(1), matrix.shape[2]
        result: Tensor = (signed @ (-2.0 * self.mirrors[:, :columns])) @ self.mirrors.mT
        result[..., :columns] += signed
        return result

    def around(self, diagonal: Tensor, other: Turn) -> Tensor:
        """``Q @ diag(diagonal) @ other.mT``, ``(groups, rows, other rows)``, an update of low rank.

        ``(I - 2 V V^T) D (I - 2 U U^T) = D - 2 V (V^T D) + (4 V (V^T D U) - 2 D U) U^T`` where ``D``
        holds the signed diagonal.
        """
        columns = diagonal.shape[1]
        signed = (diagonal * self.signs * other.signs).unsqueeze(-1)
        left = self.mirrors.new_zeros(*other.mirrors.shape[:2], self.mirrors.shape[2])  # D^T V
        left[:, :columns] = signed * self.mirrors[:, :columns]
        right = other.mirrors.new_zeros(*self.mirrors.shape[:2], other.mirrors.shape[2])  # D U
        right[:, :columns] = signed * other.mirrors[:, :columns]
        inner = 4.0 * self.mirrors @ (left.mT @ other.mirrors) - 2.0 * right
        result = torch.cat([-2.0 * self.mirrors, inner], -1) @ torch.cat([left, other.mirrors], -1).mT
        torch.diagonal(result, dim1=1, dim2=2)[:, :columns] += signed.squeeze(-1)
        return result


def kaiming_factors(
    shapes: Sequence[tuple[int, ...]], mode: str, like: Tensor, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Kaiming-normal factors as Huh et al. draw them, whose product keeps the variance of one layer.

    The last factor has gain sqrt(2), the others gain 1.

    Args:
        shapes: shapes ``(out, in/groups, *k)`` of the weights, first factor first.
        mode: ``"fan_out"`` (convolutions) or ``"fan_in"`` (Linear).
        like: tensor that gives dtype and device.

    Source: K. He et al., ICCV 2015; the gains are those of the code released by Huh et al.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    factors = []
    for i, shape in enumerate(shapes):
        slope = 0.0 if i == len(shapes) - 1 else 1.0
        factor = torch.empty(shape, dtype=torch.float32, device=device)
        nn.init.kaiming_normal_(factor, a=slope, mode=mode, generator=generator)  # type: ignore[arg-type]
        factors.append(factor.to(like.device, like.dtype))
    return factors
