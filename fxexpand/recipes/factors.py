"""Initial weights of a chain: matrices whose product is given, or random ones.

Matrices are batched: ``(groups, out, in)``, one block per group of a grouped kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError

# Singular values below this share of the largest are spread unevenly over the factors; see balanced_factors.
FLOOR = 1e-3


def balanced_factors(
    matrix: Tensor, hidden: int, depth: int, generator: torch.Generator | None = None
) -> list[Tensor]:
    """``depth`` factors with product ``matrix``, first factor first, in the matrix' dtype.

    With the singular value decomposition ``W = U S V^T``: ``W_1 = Q_1 S^(1/d) V^T``,
    ``W_j = Q_j S^(1/d) Q_(j-1)^T``, ``W_d = U S^(1/d) Q_(d-1)^T`` with random ``Q_j`` of orthonormal columns.
    This is balanced, ``W_(j+1)^T W_(j+1) = W_j W_j^T``, the start from which Arora et al. derive the dynamics
    of depth, and every hidden unit is in use.

    A direction in which ``W`` vanishes would leave all factors zero there, a saddle that no gradient leaves.
    In such directions (below ``FLOOR`` of the largest value) all factors but one outer one keep the size of
    the floor, and the outer one takes the rest, as a zero-initialised adapter does.

    Only the orthogonal side of the decomposition is computed (from the smaller Gram matrix, in float64); the
    other side is ``U^T W`` itself, so the product is exact whatever the accuracy of the values.

    Args:
        matrix: ``(groups, out, in)``.
        hidden: width of the factors in between, per group.

    Raises: InexactError: ``hidden`` is below the rank of the matrix, so no such factors exist.

    Source: S. Arora, N. Cohen, E. Hazan, "On the Optimization of Deep Networks", ICML 2018.
    """
    if depth == 1:
        return [matrix.detach().clone()]
    groups, out, inner = matrix.shape
    dtype = matrix.dtype
    wide = matrix.detach().to(torch.float64)
    largest = float(wide.abs().amax()) if wide.numel() else 0.0
    unit = wide / largest if largest > 0 else wide  # squares neither overflow nor vanish
    tall = out > inner
    side = unit.mT if tall else unit  # (groups, rank, longer)
    basis = torch.linalg.eigh(side @ side.mT)[1].flip(-1)  # columns by falling singular value
    rest = basis.mT @ side
    values = torch.linalg.vector_norm(rest, dim=-1)
    if hidden < values.shape[-1]:
        lost = float(values[:, hidden:].amax())
        if lost > 1e-10 * float(values.amax()):
            raise InexactError(
                f"a hidden width of {hidden * groups} is below the rank of the weight "
                f"({min(out, inner) * groups} at most), so init='preserve' is impossible. "
                "Use a larger width, or init='matched'"
            )
        basis, rest, values = basis[..., :hidden], rest[:, :hidden], values[:, :hidden]
    rank = values.shape[-1]
    top = float(values.amax()) if values.numel() else 0.0
    size = torch.clamp(values, min=FLOOR * top if top > 0 else 1.0)
    scale = (largest if largest > 0 else 1.0) ** (1.0 / depth)
    share = size.pow(1.0 / depth) * scale  # (groups, rank): what each factor carries
    remaining = rest / (size.pow((depth - 1) / depth) / scale).unsqueeze(-1)
    turns = [_orthonormal(groups, hidden, rank, wide, generator) for _ in range(depth - 1)]
    if tall:
        first = (turns[0] * share.unsqueeze(1)) @ basis.mT
        last = remaining.mT @ turns[-1].mT
    else:
        first = turns[0] @ remaining
        last = (basis * share.unsqueeze(1)) @ turns[-1].mT
    narrow = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    middle = [
        (after * share.unsqueeze(1)).to(narrow) @ before.to(narrow).mT
        for before, after in itertools.pairwise(turns)
    ]
    return [factor.to(dtype) for factor in (first, *middle, last)]


def _orthonormal(
    groups: int, rows: int, columns: int, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """``(groups, rows, columns)`` with orthonormal columns: a cosine transform, random signs on both sides.

    Dense and incoherent like a random orthogonal matrix, at the price of writing it down.
    """
    i = torch.arange(rows, dtype=torch.float64, device=like.device).unsqueeze(1)
    j = torch.arange(columns, dtype=torch.float64, device=like.device)
    cosines = torch.cos(math.pi / rows * (i + 0.5) * j) * math.sqrt(2.0 / rows)
    cosines[:, :1] *= math.sqrt(0.5)
    left = _signs((groups, rows, 1), like, generator)
    return left * cosines * _signs((groups, 1, columns), like, generator)


def _signs(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else "cpu"
    bits = torch.randint(0, 2, tuple(shape), generator=generator, device=device)
    return (2 * bits - 1).to(like.device, torch.float64)


def kaiming_factors(
    shapes: Sequence[tuple[int, ...]],
    mode: str,
    like: Tensor,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Kaiming-normal factors as Huh et al. draw them: gain 1, and sqrt(2) for the last, so that the product
    keeps the variance of one layer.

    Args:
        shapes: of the weights ``(out, in/groups, *k)``, in order.
        mode: ``"fan_out"`` (convolutions) or ``"fan_in"`` (Linear).
        like: gives dtype and device.

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
