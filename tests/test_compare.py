"""The comparison itself must be able to fail."""

from __future__ import annotations

import pytest
import torch

from tests.compare import assert_different, assert_same, relative_error


def test_a_deviation_of_a_tenth_of_a_percent_is_caught() -> None:
    expected = torch.randn(5, 7, dtype=torch.float64)
    assert_same(expected.clone(), expected, rel=0.0)
    assert_different(expected * 1.001, expected, rel=9e-4)
    with pytest.raises(AssertionError, match=r"relative error 0\.001"):
        assert_same(expected * 1.001, expected, rel=9e-4)


@pytest.mark.parametrize("hole", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_an_infinite_error(hole: float) -> None:
    expected = torch.randn(4)
    actual = expected.clone()
    actual[2] = hole
    assert relative_error(actual, expected) == float("inf")
    assert relative_error(expected, actual) == float("inf")


def test_shape_and_dtype_count() -> None:
    x = torch.randn(3, 1)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_same(x, x.T, rel=1.0)
    with pytest.raises(AssertionError, match="dtypes differ"):
        assert_same(x, x.double(), rel=1.0)


def test_zero_expectation() -> None:
    zero = torch.zeros(2)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero + 1e-30, zero) == float("inf")
