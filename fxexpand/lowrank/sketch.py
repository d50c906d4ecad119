"""Rank measures of matrices too big for a full decomposition, each as an interval with the exact value.

``Q`` has orthonormal columns that span the range of ``A Ω`` for a random ``Ω``, and ``B = Qᴴ A``. For any
``Ω``, ``Aᴴ A = Bᴴ B + Rᴴ R`` with the residual ``R = A - Q B``, so with ``t_i`` the singular values of B

    ``t_i² <= s_i²``  and  ``sum(s_i² - t_i²) = ||R||_F²``.

The norm of ``R`` is measured, so the intervals hold for certain, without an assumption on the spectrum or on
``Ω``. They are narrow if few directions hold nearly all of the norm of the matrix, and wide if many do.
(Bounding ``||R||_2`` by random probes, as is usual, would not sharpen them: a probe has the length
``||R||_F`` on average, which is known here.)

Source: N. Halko, P.-G. Martinsson, J. Tropp, "Finding structure with randomness", SIAM Review 2011, algorithm
4.4.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from fxexpand.errors import SelectionError, UnusableWeightError


@dataclass(frozen=True)
class Interval:
    """Bounds of a measure."""

    low: float
    high: float

    @property
    def width(self) -> float:
        """``high - low``."""
        return self.high - self.low


@dataclass(frozen=True)
class Sketch:
    """The largest singular values of a matrix, and a bound of the others.

    Attributes:
        values: ``t_i``, lower bounds of the largest singular values, largest first, divided by ``scale``.
        full_rank: the number of singular values: the smaller side of the matrix.
        residual: ``||R||_F`` divided by ``scale``.
        scale: the largest absolute entry of the matrix.
    """

    values: tuple[float, ...]
    full_rank: int
    residual: float
    scale: float

    def singular_values(self) -> list[Interval]:
        """Bounds of all singular values, largest first; those beyond the sketch have the lower bound 0."""
        found = len(self.values)
        # The first i + 1 of ``s_i² - t_i²`` share the energy of the residual. Beyond the sketch the singular
        # values are sorted, so each is at most the mean of those before it.
        known = [Interval(t * self.scale, self.scale * math.hypot(t, self.residual)) for t in self.values]
        beyond = [self.scale * self.residual / math.sqrt(i + 1) for i in range(self.full_rank - found)]
        return [*known, *(Interval(0.0, high) for high in beyond)]

    def nuclear_norm(self) -> Interval:
        """The sum of the singular values, in the unit of the matrix."""
        known = sum(self.values)
        return Interval(known * self.scale, (known + self._missing()) * self.scale)

    def stable_rank(self) -> Interval:
        """The squared Frobenius norm, which is exact, over the squared largest singular value."""
        total, largest = self._energy(), self.values[0] ** 2
        if total == 0.0:
            return Interval(0.0, 0.0)
        high = total / largest if largest > 0 else float(self.full_rank)
        return Interval(max(1.0, total / (largest + self.residual**2)), min(high, float(self.full_rank)))

    def entropy(self) -> Interval:
        """The spectral entropy in nats.

        The total variation by which the singular values beyond the sketch can change the distribution is at
        most their share in its sum. With ``T`` the total variation between two distributions over ``n``
        values, their entropies differ by at most ``T ln(n - 1) + h(T)``, ``h`` the entropy of a coin.

        Source: K. Audenaert, "A sharp continuity estimate for the von Neumann entropy", J. Phys. A 2007.
        """
        known, n = sum(self.values), self.full_rank
        if self._energy() == 0.0:
            return Interval(0.0, 0.0)
        entropy = -sum(t / known * math.log(t / known) for t in self.values if t > 0) if known > 0 else 0.0
        moved = self._missing() / (known + self._missing())
        if moved >= 1.0 - 1.0 / n:
            return Interval(0.0, math.log(n))
        coin = -sum(p * math.log(p) for p in (moved, 1.0 - moved) if p > 0)
        away = moved * math.log(max(n - 1, 1)) + coin
        return Interval(max(0.0, entropy - away), min(math.log(n), entropy + away))

    def effective_rank(self) -> Interval:
        """The exponential of the entropy (Roy and Vetterli); 0 for a zero matrix."""
        if self._energy() == 0.0:
            return Interval(0.0, 0.0)
        entropy = self.entropy()
        return Interval(math.exp(entropy.low), math.exp(entropy.high))

    def numerical_rank(self, tolerance: float) -> Interval:
        """How many singular values exceed ``tolerance`` times the largest."""
        if not 0.0 <= tolerance < 1.0:
            raise SelectionError(f"numerical rank: tolerance={tolerance}: choose 0 or more, but below 1.")
        every = self.singular_values()
        low = sum(s.low > tolerance * every[0].high for s in every)
        high = sum(s.high > tolerance * every[0].low for s in every)
        return Interval(float(low), float(high))

    def energy_rank(self, energy: float) -> Interval:
        """The fewest singular values whose squares sum to ``energy`` of all squares."""
        if not 0.0 < energy <= 1.0:
            raise SelectionError(f"energy rank: energy={energy}: choose a share above 0 and up to 1.")
        n = self.full_rank
        wanted = energy * self._energy() * (1.0 - n * sys.float_info.epsilon)  # as in ``measures.energy_of``
        if wanted == 0.0:
            return Interval(0.0, 0.0)
        ends = []
        for more in (self.residual**2, 0.0):
            found, known = n, 0.0
            for count in range(1, n + 1):
                known += self.values[count - 1] ** 2 if count <= len(self.values) else 0.0
                if known + more >= wanted:
                    found = count
                    break
            ends.append(float(found))
        return Interval(*ends)

    def _energy(self) -> float:
        return sum(t**2 for t in self.values) + self.residual**2

    def _missing(self) -> float:
        """A bound of ``sum(s_i - t_i)``, by ``s - t <= sqrt(s² - t²)`` and Cauchy and Schwarz."""
        return math.sqrt(self.full_rank) * self.residual


def sketch(
    matrix: Tensor,
    count: int,
    *,
    oversampling: int = 10,
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> Sketch:
    """The ``count`` largest singular values of ``matrix`` at ``O(rows * columns * count)``, and error bounds.

    Args:
        matrix: ``(rows, columns)``; computed in float64 on its own device.
        count: of singular values; all of them where the matrix has no more.
        oversampling: number of further random directions; they sharpen the last values.
        iterations: of the power method; each multiplies by the matrix and its adjoint, to sharpen the range.
        generator: of the random directions, on the device of the matrix.

    Raises:
        SelectionError: not a matrix, or a count below 1.
        UnusableWeightError: NaN, Inf or no values.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise SelectionError(f"sketch of shape {tuple(matrix.shape)}: give a matrix that is not empty.")
    if count < 1 or oversampling < 0 or iterations < 0:
        raise SelectionError(
            f"sketch: count={count}, oversampling={oversampling}, iterations={iterations}: "
            "choose a count of 1 or more and no negative number."
        )
    if matrix.is_meta:
        raise UnusableWeightError("is on the meta device and has no values. Materialise the model first.")
    if not bool(torch.isfinite(matrix).all()):
        raise UnusableWeightError("holds NaN or Inf. Load a sound checkpoint, or exclude it.")
    with torch.no_grad():
        wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
        scale = float(wide.abs().max()) or 1.0
        wide = wide / scale
        full = min(wide.shape)
        width = min(count + oversampling, full)
        shape = (wide.shape[1], width)
        directions = torch.randn(shape, dtype=wide.dtype, device=wide.device, generator=generator)
        basis, _ = torch.linalg.qr(wide @ directions)
        for _ in range(iterations):
            other, _ = torch.linalg.qr(wide.mH @ basis)
            basis, _ = torch.linalg.qr(wide @ other)
        inner = basis.mH @ wide
        values = torch.linalg.svdvals(inner)
        # The norm of the residual: the difference of the two squared norms would lose half of the digits.
        pieces = [
            float(torch.linalg.vector_norm(rows - left @ inner))
            for rows, left in ((wide[i : i + 4096], basis[i : i + 4096]) for i in range(0, len(wide), 4096))
        ]
    return Sketch(values=tuple(values.tolist()), full_rank=full, residual=math.hypot(*pieces), scale=scale)
