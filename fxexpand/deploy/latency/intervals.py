"""Medians with confidence intervals that assume nothing about the distribution of timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, comb, log2
from statistics import median

from fxexpand.errors import SelectionError


@dataclass(frozen=True)
class Interval:
    """A median and its confidence interval."""

    median: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside."""
        return not self.low <= value <= self.high


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval:
    """The sample median and an order-statistic interval for the true one.

    The number of ``n`` independent samples below the true median is Binomial(n, 1/2): the ``k``-th smallest
    and ``k``-th largest enclose it with probability ``1 - 2 P(Bin < k)``; the largest ``k`` that suffices is
    taken.

    Raises: SelectionError: too few samples for the confidence (0.95 needs 6).

    Source: H. A. David and H. N. Nagaraja, "Order Statistics", section 7.1.
    """
    if not 0.0 < confidence < 1.0:
        raise SelectionError(f"confidence={confidence}: choose a value between 0 and 1.")
    n = len(samples)
    outside, k = 0.0, 0
    while k < n // 2 and 2 * (outside + comb(n, k) / 2**n) <= 1.0 - confidence:
        outside += comb(n, k) / 2**n
        k += 1
    if k == 0:
        enough = ceil(1 - log2(1 - confidence))
        raise SelectionError(
            f"{n} samples cannot give a {confidence:.4g} interval. Take {enough} rounds or more."
        )
    ordered = sorted(samples)
    return Interval(median(ordered), ordered[k - 1], ordered[n - k])
