"""The rank of features: the number of directions that the embeddings of a set of inputs use.

Source: M. Huh et al., "The Low-Rank Simplicity Bias in Deep Networks", TMLR 2023. Their text calls the kernel
a Gram matrix; their later figures show values of the cosine distance.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.lowrank.measures import MEASURES, Kind

FeatureKernel = Literal["gram", "cosine", "cosine_distance"]


def kernel_rank(
    features: Tensor,
    kind: FeatureKernel = "gram",
    *,
    centered: bool = False,
    measure: Kind = "roy",
    batched: bool = False,
) -> Tensor:
    """The rank of the kernel matrix of ``n`` points, in float64; differentiable.

    With rows ``f_i``, ``c_ij = <f_i, f_j> / (|f_i| |f_j|)`` and ``H = I - 11ᵀ/n``:

    ``"gram"`` is ``K_ij = <f_i, f_j>``, ``"cosine"`` is ``c_ij`` and ``"cosine_distance"`` is ``1 - c_ij``;
    ``centered`` takes ``H K H``: for the Gram matrix, this subtracts the mean from the features; the two
    cosine kernels then differ by their sign alone.

    Args:
        features: ``(n, ...)``; each point is flattened. A zero row has cosine 0 with all rows.
        measure: ``"roy"``, ``"entropy"`` or ``"stable"``, see ``effective_rank``. It is computed from the
            singular values of K; for the Gram matrix, these are the squares of those of the features.
        batched: take ``features`` as ``(batch, n, dimensions)``; the result has shape ``(batch,)``.

    Raises:
        SelectionError: an unknown option, no points or no dimensions.
        UnusableWeightError: NaN, Inf or no values.
    """
    if measure not in MEASURES:
        raise SelectionError(f"measure={measure!r}: choose from {', '.join(MEASURES)}.")
    return MEASURES[measure](kernel_spectrum(features, kind, centered=centered, batched=batched))


def kernel_spectrum(
    features: Tensor, kind: FeatureKernel = "gram", *, centered: bool = False, batched: bool = False
) -> Tensor:
    """The singular values that ``kernel_rank`` measures, up to a factor: ``(k,)`` or ``(batch, k)``.

    Raises: see ``kernel_rank``.
    """
    if kind not in get_args(FeatureKernel):
        raise SelectionError(f"kind={kind!r}: choose from {', '.join(get_args(FeatureKernel))}.")
    if features.ndim < 2 or (batched and features.ndim != 3) or 0 in features.shape:
        wanted = "(batch, points, dimensions)" if batched else "(points, dimensions)"
        raise SelectionError(f"features of shape {tuple(features.shape)}: give {wanted}, none of them 0.")
    if features.is_meta or not bool(torch.isfinite(features).all()):
        raise UnusableWeightError("features: hold NaN or Inf, or no values. No rank is defined for them.")
    wide = torch.complex128 if features.is_complex() else torch.float64
    points = (features if features.device.type != "mps" else features.cpu()).to(wide)
    points = points if batched else points.flatten(1).unsqueeze(0)
    largest = points.detach().abs().amax((-2, -1), keepdim=True)
    points = points / torch.where(largest > 0, largest, 1.0)  # so that no square overflows
    spectrum = _spectrum(points, kind, centered)
    return spectrum if batched else spectrum.squeeze(0)


def _spectrum(points: Tensor, kind: FeatureKernel, centered: bool) -> Tensor:
    """The singular values of the kernels of ``(batch, n, dimensions)``."""
    if kind != "gram":
        length = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
        # After the division by the largest entry, as the norm of a row of tiny entries is denormal, or 0.
        points = points / torch.where(length > 0, length, 1.0)
    if kind != "cosine_distance" or centered:
        if centered:
            points = points - points.mean(-2, keepdim=True)
        # The smaller of the two matrices with these eigenvalues takes a fraction of the time of an SVD.
        small = points @ points.mH if points.shape[-2] <= points.shape[-1] else points.mH @ points
        return torch.linalg.eigvalsh(small).abs()  # type: ignore[no-any-return]
    n, dimensions = points.shape[-2:]
    ones = points.new_ones((*points.shape[:-1], 1))
    if dimensions + 1 < n and not points.requires_grad:
        # 11ᵀ - F Fᴴ = M J Mᴴ with M = [1 F] = Q R: its eigenvalues other than 0 are those of R J Rᴴ, a matrix
        # of side dimensions + 1. (The gradient of QR needs full rank, so this is without gradients only.)
        triangle = torch.linalg.qr(torch.cat([ones, points], -1), mode="r").R
        sign = torch.cat([points.new_ones(1), -points.new_ones(dimensions)])
        kernel = (triangle * sign) @ triangle.mH
    else:
        kernel = ones @ ones.mT - points @ points.mH
    eigenvalues: Tensor = torch.linalg.eigvalsh(kernel)
    return eigenvalues.abs()
