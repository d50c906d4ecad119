"""Low-rank approximation as a projection: the best rank-r matrix is the matrix itself, projected.

With left singular vectors ``U`` of ``M``, the best rank-r approximation in the Frobenius norm is
``U_r U_r^T M`` (equally ``M V_r V_r^T``), with squared error ``sum_{i>r} s_i^2`` (Eckart, Young). If inputs u
of second moment ``S = E[u u^T]`` are what matters, ``E|Mu - M'u|^2`` is smallest for the eigenvectors U of
``M S M^T``, with the sum of the dropped eigenvalues as error: the whitened SVD, without an inverse.

The eigenvectors of a small symmetric matrix, computed in float64, are therefore enough, at a third of the
time of an SVD of a large matrix. Singular values below 1e-8 of the largest count as zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from fxexpand.errors import SelectionError
from fxexpand.recipes.factors import gram

COLUMNS = 4096  # number of columns that are in float64 at a time
ROUNDING = 1e-12  # bound of the error of an energy, a sum over all singular values


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A matrix ``(g, m, n)``, one per group, and the directions that approximate it best.

    Attributes:
        matrix: the matrix to approximate.
        squares: ``(g, k)``, float64, decreasing: the shares of the directions in the squared norm of all
            groups together; they sum to 1, or to 0 for a zero matrix.
        basis: ``(g, m or n, k)``, orthonormal columns, float64.
        side: ``"left"`` if the basis is that of the columns of the matrix, ``"right"`` if of its rows.
        scale: the norm; ``squares`` are relative to its square.
        by_data: the norm is that of outputs on given inputs, not that of the weight.
    """

    matrix: Tensor
    squares: Tensor
    basis: Tensor
    side: Literal["left", "right"]
    scale: float
    by_data: bool = False

    @property
    def full(self) -> int:
        """The largest rank."""
        return min(self.matrix.shape[-2:])

    @property
    def errors(self) -> Tensor:
        """``(full + 1,)``: relative squared error at each rank from 0 on; never increasing."""
        tails = self.squares.sum(0).flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])[: self.full + 1].clamp(min=0.0)

    def rank_for(self, energy: float) -> int:
        """The smallest rank, at least 1, that keeps this share of the squared norm."""
        kept = self.errors <= 1.0 - energy + ROUNDING
        return max(1, int(kept.to(torch.int8).argmax()))

    def singular_values(self) -> Tensor:
        """``(g, k)`` in the units of the matrix (of its outputs, if weighted by data)."""
        return self.squares.clamp(min=0.0).sqrt() * self.scale

    def effective_rank(self) -> float:
        """``fxexpand.effective_rank`` of the matrix, from the singular values at hand."""
        values = self.singular_values().flatten()
        share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return float(torch.special.entr(share).sum().exp()) / len(self.squares)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``left (g, m, r)`` and ``right (g, r, n)`` in float64; the columns of one weigh as much as the rows
        of the other, which suits further training."""
        basis = self.basis[..., :rank]
        if self.side == "left":
            left, right = basis, _product(basis.mT, self.matrix)
            norms = self._balance(right, -1)
            return left * norms.unsqueeze(-2), right / norms.unsqueeze(-1)
        left, right = _product(basis.mT, self.matrix.mT).mT, basis.mT
        norms = self._balance(left, -2)
        return left / norms.unsqueeze(-2), right * norms.unsqueeze(-1)

    def _balance(self, factor: Tensor, dim: int) -> Tensor:
        """Square roots of the norms along ``dim``, 1 for zeros; computed in a unit without overflow."""
        unit = self.scale or 1.0
        norms = (factor / unit).norm(dim=dim)
        roots: Tensor = torch.where(norms > 0, norms.sqrt(), torch.ones_like(norms)) * unit**0.5
        return roots

    def projected(self, rank: int) -> Tensor:
        """The approximation, in float64."""
        left, right = self.factors(rank)
        return left @ right


def spectrum(matrix: Tensor, moment: Tensor | None = None) -> Spectrum:
    """The best directions for ``matrix (g, m, n)`` in the Frobenius norm, or for given inputs.

    Args:
        moment: second moment of the inputs ``(g, n, n)`` or, where m <= n, of the outputs ``(g, m, m)``, in
            float64; see ``moment_side``. Positive semi-definite up to rounding.
    """
    matrix = matrix.detach()
    rows, columns = matrix.shape[-2:]
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    unit = largest or 1.0
    side: Literal["left", "right"] = "left" if rows <= columns else "right"
    if moment is None:
        wide = matrix if side == "left" else matrix.mT
        moment = matrix.new_zeros((*wide.shape[:-1], wide.shape[-2]), dtype=torch.float64)
        for block in torch.split(wide, COLUMNS, -1):
            moment += gram(block.to(torch.float64) / unit)  # huge and tiny values keep in range
        return decomposed(matrix, moment, side, unit)
    if moment_side(matrix) == "outputs":
        return replace(decomposed(matrix, moment / unit**2, "left", unit), by_data=True)
    # U = M S^1/2 v / s: for m > n, no (m, m) matrix is needed.
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2) @ vectors.mT
    outputs = _product(root, matrix.mT / unit).mT  # (g, m, n), for whitened inputs
    right = decomposed(matrix, gram(outputs.mT), "right", unit)
    basis = torch.linalg.qr(outputs @ right.basis).Q  # columns in the order of the eigenvalues
    return Spectrum(matrix, right.squares, basis, "left", right.scale, by_data=True)


def table_spectrum(matrix: Tensor, counts: Tensor) -> Spectrum:
    """The best directions for the rows of a table ``(1, tokens, d)``, weighted by ``counts (tokens,)``."""
    unit = float(matrix.abs().max()) or 1.0
    rows = matrix[0].to(torch.float64) / unit
    moment = (rows * (counts / counts.sum()).unsqueeze(1)).mT @ rows
    return replace(decomposed(matrix, moment.unsqueeze(0), "right", unit), by_data=True)


def moment_side(matrix: Tensor) -> Literal["inputs", "outputs"]:
    """The second moment that ``spectrum`` takes for this matrix: the smaller one."""
    return "outputs" if matrix.shape[-2] <= matrix.shape[-1] else "inputs"


def rank_of_share(share: float, full: int) -> int:
    """``share`` of the full rank, at least 1.

    Raises: SelectionError: the share is not in (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise SelectionError(
            f"rank={share}: a share of the full rank lies in (0, 1]; give an int for a rank."
        )
    return max(1, min(full, ceil(share * full - 1e-9)))


def decomposed(matrix: Tensor, moment: Tensor, side: Literal["left", "right"], unit: float) -> Spectrum:
    """The eigenvectors of ``moment`` as directions; the moment is that of the matrix over ``unit``."""
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(-1).clamp(min=0.0), vectors.flip(-1)
    full = min(matrix.shape[-2:])
    total = float(values.sum())
    squares = values / total if total else torch.zeros_like(values)
    return Spectrum(matrix, squares[..., :full], vectors[..., :full], side, total**0.5 * unit)


def _product(left: Tensor, matrix: Tensor) -> Tensor:
    """``left @ matrix`` in float64, some columns of the matrix at a time."""
    blocks = [left @ block.to(torch.float64) for block in torch.split(matrix, COLUMNS, -1)]
    return torch.cat(blocks, -1)
