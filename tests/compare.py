"""The one comparison every test uses: the largest deviation relative to the largest expected value."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``max|actual - expected| / max|expected|`` in float64; inf for a NaN or an Inf without a twin."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: got {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    wide = torch.complex128 if expected.is_complex() or actual.is_complex() else torch.float64
    a, b = actual.detach().cpu().to(wide), expected.detach().cpu().to(wide)
    if b.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return 0.0 if torch.equal(a, b) else float("inf")
    scale = float(b.abs().max())
    deviation = float((a - b).abs().max())
    return deviation / scale if scale else (0.0 if deviation == 0.0 else float("inf"))


def assert_same(actual: Tensor, expected: Tensor, rel: float) -> None:
    """Assert equal shape and dtype, and a relative error of at most ``rel``."""
    assert actual.dtype == expected.dtype, f"dtypes differ: got {actual.dtype}, expected {expected.dtype}"
    error = relative_error(actual, expected)
    assert error <= rel, (
        f"relative error {error:.3g} is above {rel:.3g} "
        f"(shape {tuple(expected.shape)}, largest expected value {float(expected.abs().max()):.3g})"
    )


def assert_different(actual: Tensor, expected: Tensor, rel: float) -> None:
    """Assert a relative error above ``rel``: shows that a tolerance can fail."""
    error = relative_error(actual, expected)
    assert error > rel, f"relative error {error:.3g} is within {rel:.3g}: this comparison cannot fail"
