"""Rank measures of matrices and kernels, from their singular values.

With singular values ``s_i`` and ``p_i = s_i / sum(s)``, the spectral entropy is ``-sum(p_i ln p_i)`` (nats)
and the effective rank its exponential: ``r`` equal singular values have effective rank ``r``.

Every measure takes a matrix ``(out, in)``, a kernel ``(out, in/groups, *k)``, or with ``batched=True`` a
batch ``(*batch, out, in)``; it computes in float64 on the device of the tensor and is differentiable. The
gradient of a singular value is ``u vᵀ``: it has no differences of singular values, so it is finite where they
repeat or vanish (there it is one of the sub-gradients).

Source: O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
M. Huh et al., "The Low-Rank Simplicity Bias in Deep Networks", TMLR 2023, plot the entropy itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor

from fxexpand.errors import SelectionError, UnusableWeightError

Kind = Literal["roy", "entropy", "stable"]
Unfolding = Literal["channel", "spatial"]


class MatrixOptions(TypedDict, total=False):
    """How a tensor is read as matrices: the keyword arguments of ``effective_rank``."""

    groups: int
    batched: bool
    unfolding: Unfolding


def effective_rank(
    matrix: Tensor,
    kind: Kind = "roy",
    *,
    groups: int = 1,
    batched: bool = False,
    unfolding: Unfolding = "channel",
) -> Tensor:
    """The effective rank of a matrix or kernel, as a differentiable float64 scalar.

    Args:
        matrix: ``(out, in)``, or a kernel ``(out, in/groups, *k)``.
        kind: ``"roy"`` (exponential of the spectral entropy), ``"entropy"`` (in nats) or ``"stable"``
            (``||W||_F^2 / ||W||_2^2``).
        groups: of a grouped kernel. Its map is block-diagonal, with the singular values of all blocks.
        batched: take ``matrix`` as a batch ``(*batch, out, in)``; the result has shape ``(*batch,)``.
        unfolding: how a kernel becomes a matrix, see ``unfold``.

    A zero matrix has rank 0 of either kind and entropy 0. The result does not depend on the scale of the
    matrix.

    Raises:
        UnusableWeightError: for NaN, Inf, or a tensor without values (meta device).
        SelectionError: for an unknown option, fewer than two dimensions or groups that do not divide ``out``.
    """
    spectrum = scaled_spectrum(matrix, groups=groups, batched=batched, unfolding=unfolding)[0]
    if kind not in MEASURES:
        raise SelectionError(f"kind={kind!r}: choose 'roy', 'entropy' or 'stable'.")
    return MEASURES[kind](spectrum)


def spectral_entropy(matrix: Tensor, **options: Unpack[MatrixOptions]) -> Tensor:
    """The entropy in nats of the normalised singular values; see ``effective_rank``."""
    return effective_rank(matrix, "entropy", **options)


def stable_rank(matrix: Tensor, **options: Unpack[MatrixOptions]) -> Tensor:
    """``||W||_F^2 / ||W||_2^2``, insensitive to small singular values; see ``effective_rank``."""
    return effective_rank(matrix, "stable", **options)


def nuclear_norm(matrix: Tensor, **options: Unpack[MatrixOptions]) -> Tensor:
    """The sum of the singular values, in the unit of the matrix; see ``effective_rank``."""
    spectrum, scale = scaled_spectrum(matrix, **options)
    return spectrum.sum(-1) * scale


def numerical_rank(
    matrix: Tensor, tolerance: float | None = None, **options: Unpack[MatrixOptions]
) -> Tensor:
    """The number of singular values above ``tolerance`` times the largest, as int64 (no gradient).

    Args:
        tolerance: by default ``max(rows, columns)`` times the rounding unit of the matrix's own dtype: a
            bound of a zero singular value after its entries are rounded. For a half-precision dtype, one
            unit: the bound would exceed the largest singular value of a wide layer, and independent rounding
            errors turn a zero into at most 0.6 units, for any shape.

    Source: G. Golub and C. Van Loan, "Matrix Computations", section 5.4.1.
    """
    if tolerance is None:
        tolerance = rounding_unit(_blocks(matrix, **options))
    if not 0.0 <= tolerance < 1.0:
        raise SelectionError(f"numerical rank: tolerance={tolerance}: choose 0 or more, but below 1.")
    with torch.no_grad():
        return numerical_of(scaled_spectrum(matrix, **options)[0], tolerance)


def energy_rank(matrix: Tensor, energy: float = 0.9, **options: Unpack[MatrixOptions]) -> Tensor:
    """The fewest singular values whose squares sum to ``energy`` of all squares, as int64 (no gradient).

    The best approximation of that rank has a relative Frobenius error of at most ``sqrt(1 - energy)``.
    """
    if not 0.0 < energy <= 1.0:
        raise SelectionError(f"energy rank: energy={energy}: choose a share above 0 and up to 1.")
    with torch.no_grad():
        return energy_of(scaled_spectrum(matrix, **options)[0], energy)


def singular_values(matrix: Tensor, **options: Unpack[MatrixOptions]) -> Tensor:
    """The singular values in float64, ``(*batch, n)``, largest first; for a grouped kernel, of all blocks."""
    spectrum, scale = scaled_spectrum(matrix, **options)
    return spectrum * scale.unsqueeze(-1)


def unfold(kernel: Tensor, unfolding: Unfolding = "channel", *, groups: int = 1) -> Tensor:
    """A kernel ``(out, in/groups, *k)`` as matrices ``(groups, rows, columns)``, one per group.

    ``"channel"``: ``(out, in * k...)``, the matrix whose rank r splits it into a k x k and a 1 x 1 layer.
    ``"spatial"``: ``(in * k_1, out * k_2...)``, which splits it into a k x 1 and a 1 x k layer. For a matrix
    and for one spatial dimension it is the transpose of the first, with the same singular values.

    Source: Y. Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020.
    """
    if unfolding not in get_args(Unfolding):
        raise SelectionError(f"unfolding={unfolding!r}: choose from {', '.join(get_args(Unfolding))}.")
    _require_matrix(kernel)
    if groups < 1 or kernel.shape[0] % groups:
        raise SelectionError(f"effective rank: groups={groups} does not divide out={kernel.shape[0]}.")
    out, inner = kernel.shape[0] // groups, kernel.shape[1]
    if unfolding == "channel" or kernel.ndim == 2:
        return kernel.reshape(groups, out, prod(kernel.shape[1:]))
    blocks = kernel.reshape(groups, out, inner, kernel.shape[2], prod(kernel.shape[3:]))
    return blocks.permute(0, 2, 3, 1, 4).reshape(groups, inner * kernel.shape[2], -1)


def scaled_spectrum(
    matrix: Tensor, *, groups: int = 1, batched: bool = False, unfolding: Unfolding = "channel"
) -> tuple[Tensor, Tensor]:
    """``(s, scale)``, float64 ``(*batch, n)`` and ``(*batch,)``: the singular values are ``s * scale``.

    ``scale`` is the largest absolute entry (1 for a zero matrix), a constant to autograd: neither squares nor
    sums of ``s`` overflow or vanish for any unit of the matrix. ``s`` is sorted, largest first.

    Raises: see ``effective_rank``.
    """
    blocks = _blocks(matrix, groups=groups, batched=batched, unfolding=unfolding)
    if matrix.is_meta:
        raise UnusableWeightError("is on the meta device and has no values. Materialise the model first.")
    if not bool(torch.isfinite(matrix).all()):
        raise UnusableWeightError("holds NaN or Inf. Load a sound checkpoint, or exclude it.")
    wide = blocks if matrix.device.type != "mps" else blocks.cpu()  # MPS has no float64
    wide = wide.to(torch.complex128 if matrix.is_complex() else torch.float64)
    # On a view of pairs, as |a + ib| overflows where a and b are near the largest number.
    plain = torch.view_as_real(wide.detach()).flatten(-2) if wide.is_complex() else wide.detach()
    scale = plain.abs().amax((-2, -1)) if batched else plain.abs().amax()
    scale = torch.where(scale > 0, scale, 1.0)
    values: Tensor = torch.linalg.svdvals(wide / scale[..., None, None])
    if not batched:
        values = values.flatten()
        values = values.sort(descending=True).values if groups > 1 else values
    return values, scale


def _blocks(
    matrix: Tensor, *, groups: int = 1, batched: bool = False, unfolding: Unfolding = "channel"
) -> Tensor:
    """The matrices ``(*batch, rows, columns)`` of a tensor."""
    if batched and groups != 1:
        raise SelectionError("effective rank: groups are for a single kernel, batched is for plain matrices.")
    if batched and unfolding != "channel":
        raise SelectionError("effective rank: unfoldings are for a single kernel, batched is for matrices.")
    if not batched:
        return unfold(matrix, unfolding, groups=groups)
    _require_matrix(matrix)
    return matrix


def entropy_of(spectrum: Tensor) -> Tensor:
    """The entropy in nats of singular values ``(*batch, n)``."""
    total = spectrum.sum(-1, keepdim=True)
    share = spectrum / torch.where(total > 0, total, 1.0)
    # 0 ln 0 = 0, in the gradient too: a 1 in place of the 0 has no entropy.
    return -(share * torch.where(share > 0, share, 1.0).log()).sum(-1)


def roy_of(spectrum: Tensor) -> Tensor:
    """The exponential of the entropy, 0 where all singular values are 0."""
    return torch.where(spectrum.sum(-1) > 0, entropy_of(spectrum).exp(), 0.0)


def stable_of(spectrum: Tensor) -> Tensor:
    """The sum of squares over the largest square, 0 where all singular values are 0."""
    largest = spectrum.amax(-1, keepdim=True)
    return (spectrum / torch.where(largest > 0, largest, 1.0)).square().sum(-1)


MEASURES: dict[Kind, Callable[[Tensor], Tensor]] = {"roy": roy_of, "entropy": entropy_of, "stable": stable_of}


def summary_of(spectrum: Tensor) -> dict[str, float]:
    """The measures that every report has, by their names there."""
    names: dict[str, Kind] = {"effective_rank": "roy", "entropy": "entropy", "stable_rank": "stable"}
    return {name: float(MEASURES[kind](spectrum)) for name, kind in names.items()}


def numerical_of(spectrum: Tensor, tolerance: float) -> Tensor:
    """The number of singular values above ``tolerance`` times the largest."""
    return (spectrum > tolerance * spectrum.amax(-1, keepdim=True)).sum(-1)


def energy_of(spectrum: Tensor, energy: float) -> Tensor:
    """The fewest singular values, largest first, whose squares sum to ``energy`` of all squares."""
    squares = spectrum.square()
    total = squares.sum(-1, keepdim=True)
    # Less by the rounding of the sum, so that energy=1 can be reached.
    wanted = energy * total * (1 - spectrum.shape[-1] * torch.finfo(spectrum.dtype).eps)
    count = (squares.cumsum(-1) < wanted).sum(-1) + 1
    return torch.where(total.squeeze(-1) > 0, count.clamp(max=spectrum.shape[-1]), 0)


def _require_matrix(matrix: Tensor) -> None:
    if matrix.ndim < 2:
        raise SelectionError(f"effective rank of shape {tuple(matrix.shape)}: give at least two dimensions.")
    if 0 in matrix.shape:
        raise SelectionError(f"effective rank of an empty tensor of shape {tuple(matrix.shape)}.")


def rounding_unit(matrices: Tensor) -> float:
    """The default tolerance of ``numerical_rank`` for ``(*batch, rows, columns)``."""
    floating = matrices.is_floating_point() or matrices.is_complex()
    unit = torch.finfo(matrices.dtype).eps if floating else torch.finfo(torch.float64).eps
    if unit > torch.finfo(torch.float32).eps:
        # Independent errors, uniform within half a unit of each entry: a matrix of norm up to
        # (√m + √n) u rms / √12, and s_1 is at least √max(m, n) rms.
        return unit
    return min(max(matrices.shape[-2:]) * unit, math.nextafter(1.0, 0.0))
