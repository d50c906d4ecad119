"""Low-rank approximation in l_p, 1 <= p <= 2: less sensitive to outlier rows than the SVD.

For a matrix ``A (n, d)``, n >= d, the norm ``x -> |Ax|_p`` is replaced by an ellipsoid's,
``|D V^T x|_2 <= |Ax|_p <= c |D V^T x|_2``, and the k directions of the largest entries of D are kept. With
``U = A (D V^T)^-1`` that is ``A_k = U D_k V^T = A V_k V_k^T``: a projection of the rows. For p = 2 the
ellipsoid is exact, c = 1, and ``A_k`` is the truncated SVD.

There are two ellipsoids. That of the Lewis weights has ``c = d^(1/p - 1/2)``, which is optimal in general,
and takes a few products of the size of A. The Löwner ellipsoid has the least volume around the body
``{x: |Ax|_p <= 1}``, c <= sqrt(d); it is computed by cuts, for small d.

Source: Tukan, Maalouf, Weksler and Feldman, "No Fine-Tuning, No Cry" (Sensors 21(16):5599, 2021; arXiv
2009.05647). Lewis weights: Cohen and Peng (arXiv 1412.0588); Löwner by cuts through the centre's
neighbourhood: Grötschel, Lovász and Schrijver, "Geometric Algorithms", section 4.6.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.lowrank.projection import COLUMNS, Spectrum, decomposed

Body: TypeAlias = Literal["lewis", "lowner"]
BODIES: tuple[Body, ...] = get_args(Body)
LEWIS_ROUNDS = 50  # at most; each multiplies the error of the logarithms by 1 - p/2
LEWIS_SETTLED = 1e-4  # change of the logarithm of a weight; it is also the relative error of the bounds
SINGULAR = 1e-6  # smallest diagonal entry of a Cholesky factor, relative to the largest
LOWNER_SLACK = 0.05  # relative excess over the factor sqrt(d); the volume that a cut removes depends on it
LOWNER_UP_TO = 64  # number of columns; beyond it the cuts take minutes


def lp_spectrum(matrix: Tensor, p: float = 1.0, body: Body = "lewis") -> Spectrum:
    """The directions that approximate ``matrix (1, m, n)`` in l_p, with its longer side as rows.

    ``squares`` are those of D, the norm in the ellipsoid; ranks by energy refer to them.

    Raises: SelectionError: p is not in [1, 2], an unknown body, or a matrix too large for the body.
    """
    if not 1.0 <= p <= 2.0:
        raise SelectionError(f"p={p}: choose a norm from p=1 to p=2 (the SVD).")
    if body not in BODIES:
        raise SelectionError(f"body={body!r}: choose from {', '.join(BODIES)}.")
    matrix = matrix.detach()
    side: Literal["left", "right"] = "right" if matrix.shape[-2] >= matrix.shape[-1] else "left"
    tall = matrix[0] if side == "right" else matrix[0].mT
    if body == "lowner" and tall.shape[1] > LOWNER_UP_TO:
        raise SelectionError(
            f"body='lowner' is for at most {LOWNER_UP_TO} columns, not {tall.shape[1]}. Take 'lewis'."
        )
    unit = float(tall.abs().max()) or 1.0
    form = lewis_form(tall, p, unit) if body == "lewis" else lowner_form(tall, p, unit)
    return decomposed(matrix, form.unsqueeze(0), side, unit)


def lewis_form(tall: Tensor, p: float, unit: float = 1.0) -> Tensor:
    """``M (d, d)`` with ``|M^1/2 x|_2 <= |Ax / unit|_p <= d^(1/p - 1/2) |M^1/2 x|_2``, in float64.

    ``M = A^T diag(w^(1 - 2/p)) A`` for the weights ``w_i = (a_i^T M^-1 a_i)^(p/2)``, by iteration. Rows of
    zeros, and directions in which A is zero, are left out. For rank-deficient A the weights are those within
    its row space.
    """
    weights = tall.new_ones(len(tall), dtype=torch.float64)
    exponent = 1.0 - 2.0 / p
    form = _weighted_gram(tall, weights, unit)
    if p == 2.0:
        return form
    for _ in range(LEWIS_ROUNDS):
        # w <- w^(1 - p/2) lambda^(p/2) with the leverages lambda of the reweighted rows: a contraction.
        quadratic = _quadratic(tall, form, unit)
        before, weights = weights, quadratic.clamp(min=0.0) ** (p / 2)
        some = weights > 0
        scale = torch.where(some, weights.clamp(min=1e-300) ** exponent, torch.zeros_like(weights))
        form = _weighted_gram(tall, scale, unit)
        moved = (weights[some] / before[some].clamp(min=1e-300)).log().abs()
        if not len(moved) or float(moved.max()) < LEWIS_SETTLED:
            break
    return form


def lowner_form(tall: Tensor, p: float, unit: float = 1.0) -> Tensor:
    """``M (d, d)`` with ``|M^1/2 x|_2 <= |Ax / unit|_p <= (1 + slack) sqrt(d) |M^1/2 x|_2``, in float64.

    The first ellipsoid is ``|Ax|_2 <= 1``, as ``|Ax|_2 <= |Ax|_p``. If a point x of the ellipsoid has
    ``|Ax|_p`` above the bound, the slab ``|g^T x| <= 1`` of a sub-gradient g contains the body, and the
    ellipsoid of least volume around the part in the slab is the next one. The points are local maxima of
    ``|Ax|_p`` on the ellipsoid, reached from its axes; the upper inequality is proved at these points, the
    lower one everywhere.
    """
    wide = tall.to(torch.float64) / unit
    values, basis = torch.linalg.eigh(wide.mT @ wide)
    kept = values > values[-1:].clamp(min=1e-300) * 1e-14
    basis = basis[:, kept]
    if not basis.shape[1]:
        return torch.zeros_like(values).diag()
    inside = wide @ basis / values[kept].sqrt()  # coordinates in which the start is the unit ball
    d = inside.shape[1]
    shape = torch.eye(d, dtype=torch.float64, device=wide.device)
    bound = (1.0 + LOWNER_SLACK) * d**0.5
    for _ in range(200 * d * d):
        worst, gradient = _steepest(inside, p, shape) if d > 1 else (0.0, None)
        if worst <= bound or gradient is None:
            break
        along = shape @ gradient / worst  # |along| = 1 in the ellipsoid, whose radius along g is `worst`
        depth = 1.0 / worst**2
        axis = torch.outer(along, along)
        shape = d * (1.0 - depth) / (d - 1) * (shape - axis) + d * depth * axis
    else:
        raise FxExpandError(f"l_p: no Löwner ellipsoid after {200 * d * d} cuts. Take body='lewis'.")
    root = basis * values[kept].sqrt()
    form: Tensor = root @ torch.linalg.inv(shape) @ root.mT
    return (form + form.mT) / 2


def lp_error(matrix: Tensor, approximation: Tensor, p: float) -> float:
    """``|A - A_k|_p / |A|_p`` over all entries; 0 for equal matrices."""
    largest = float(matrix.abs().max()) or 1.0
    apart = ((matrix - approximation).abs().to(torch.float64) / largest).pow(p).sum()
    whole = (matrix.abs().to(torch.float64) / largest).pow(p).sum()
    return float(apart / whole) ** (1.0 / p) if float(whole) else float(apart > 0)


def _steepest(inside: Tensor, p: float, shape: Tensor) -> tuple[float, Tensor | None]:
    """The largest ``sqrt(g^T G g)`` over the sub-gradients g of the norm at local maxima, with its g."""
    values, vectors = torch.linalg.eigh(shape)
    points = vectors * values.clamp(min=0.0).sqrt()
    for _ in range(5):  # x <- G g / sqrt(g^T G g) never lowers a convex function
        images = inside @ points
        norms = images.abs().pow(p).sum(0).pow(1.0 / p)
        slopes = images.sign() * (images.abs() / norms).pow(p - 1.0) if p > 1.0 else images.sign()
        gradients = inside.mT @ slopes
        through = shape @ gradients
        radii = (gradients * through).sum(0).clamp(min=1e-300).sqrt()
        points = through / radii
    best = int(radii.argmax())
    return float(radii[best]), gradients[:, best]


def _weighted_gram(tall: Tensor, weights: Tensor, unit: float) -> Tensor:
    gram = tall.new_zeros((tall.shape[1], tall.shape[1]), dtype=torch.float64)
    for rows, block in zip(torch.split(tall, COLUMNS), torch.split(weights, COLUMNS), strict=True):
        wide = rows.to(torch.float64) / unit
        gram += (wide * block.unsqueeze(1)).mT @ wide
    return gram


def _quadratic(tall: Tensor, form: Tensor, unit: float) -> Tensor:
    """``a_i^T M^-1 a_i`` of every row, with the pseudo-inverse where M is singular."""
    factor, failed = torch.linalg.cholesky_ex(form)
    spread = factor.diagonal().abs()
    if int(failed) or float(spread.min()) <= SINGULAR * float(spread.max()):
        inverse = torch.linalg.pinv(form, rtol=SINGULAR**2, hermitian=True)
    else:
        inverse = torch.cholesky_inverse(factor)
    blocks = (rows.to(torch.float64) / unit for rows in torch.split(tall, COLUMNS))
    return torch.cat([((wide @ inverse) * wide).sum(1) for wide in blocks])
