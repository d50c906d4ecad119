"""Every interval of a sketch holds the exact value, and is narrow where the matrix has few directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.lowrank.measures import (
    effective_rank,
    energy_rank,
    nuclear_norm,
    numerical_rank,
    singular_values,
    spectral_entropy,
    stable_rank,
)
from fxexpand.lowrank.sketch import Interval, Sketch, sketch


def decaying(rows: int, columns: int, speed: float, seed: int) -> Tensor:
    """Singular values ``exp(-speed i)``, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    count = min(rows, columns)
    matrix: Tensor = u[:, :count] * torch.exp(-speed * torch.arange(count)) @ v[:count]
    return matrix


def holds(interval: Interval, exact: Tensor, scale: float = 1.0) -> bool:
    """With a slack for rounding."""
    slack = 1e-9 * max(1.0, scale)
    return interval.low - slack <= float(exact) <= interval.high + slack


@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.floats(0.0, 3.0),
    st.integers(1, 12),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_every_interval_holds_the_truth(
    rows: int, columns: int, speed: float, count: int, oversampling: int, iterations: int, seed: int
) -> None:
    matrix = 3.0 * decaying(rows, columns, speed, seed)
    found = sketch(
        matrix,
        count,
        oversampling=oversampling,
        iterations=iterations,
        generator=torch.Generator().manual_seed(seed),
    )
    exact = singular_values(matrix)
    every = found.singular_values()
    assert len(every) == len(exact) == found.full_rank
    assert all(holds(interval, value) for interval, value in zip(every, exact, strict=True))
    assert holds(found.nuclear_norm(), nuclear_norm(matrix), 3.0)
    assert holds(found.stable_rank(), stable_rank(matrix), 24.0)
    assert holds(found.entropy(), spectral_entropy(matrix))
    assert holds(found.effective_rank(), effective_rank(matrix), 24.0)
    for energy in (0.5, 0.9):
        assert holds(found.energy_rank(energy), energy_rank(matrix, energy))
    for tolerance in (0.3, 1e-2):
        assert holds(found.numerical_rank(tolerance), numerical_rank(matrix, tolerance))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_all_of_the_energy_is_where_the_exact_measure_has_it(count: int) -> None:
    """A matrix of rank one up to the rounding of float32, of which the squares are below that of float64."""
    for matrix in (torch.randn(30, 1) @ torch.randn(1, 40), torch.eye(20), torch.ones(9, 12)):
        found = sketch(matrix.double(), count)
        for energy in (1e-3, 0.5, 1.0):
            assert holds(found.energy_rank(energy), energy_rank(matrix, energy)), energy


def test_few_directions_and_noise_give_narrow_intervals() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(400, 8, generator=generator) @ torch.randn(8, 300, generator=generator)
    matrix = low.double() + 1e-5 * torch.randn(400, 300, generator=generator)
    found = sketch(matrix, 10, generator=generator)
    for interval, exact, width in (
        (found.effective_rank(), effective_rank(matrix), 0.1),
        (found.stable_rank(), stable_rank(matrix), 1e-6),
        (found.energy_rank(0.999), energy_rank(matrix, 0.999), 0.5),
        (found.numerical_rank(1e-3), numerical_rank(matrix, 1e-3), 0.5),
    ):
        assert holds(interval, exact) and interval.width < width
    assert found.singular_values()[0].width < 1e-6


def test_a_matrix_without_decay_gives_wide_ones_that_hold() -> None:
    matrix = torch.randn(60, 50, dtype=torch.float64)
    found = sketch(matrix, 5, oversampling=0)
    assert holds(found.effective_rank(), effective_rank(matrix)) and found.effective_rank().width > 10


def test_all_directions_are_exact() -> None:
    matrix = torch.randn(30, 7)
    found = sketch(matrix, 7)
    assert found.effective_rank().width < 1e-9
    assert found.effective_rank().low == pytest.approx(float(effective_rank(matrix)), rel=1e-9)


def test_degenerate_matrices() -> None:
    zero = sketch(torch.zeros(5, 4), 2)
    nothing = Interval(0.0, 0.0)
    assert [zero.effective_rank(), zero.entropy(), zero.stable_rank(), zero.nuclear_norm()] == [nothing] * 4
    assert zero.energy_rank(0.9) == nothing
    one = sketch(torch.tensor([[2.0]]), 3)
    assert one.effective_rank().low == pytest.approx(1.0) and one.nuclear_norm().high == pytest.approx(2.0)
    assert sketch(1e300 * torch.eye(3, dtype=torch.float64), 3).stable_rank().low == pytest.approx(3.0)
    with pytest.raises(UnusableWeightError, match="NaN or Inf"):
        sketch(torch.tensor([[float("inf"), 1.0]]), 1)
    with pytest.raises(UnusableWeightError, match="meta"):
        sketch(torch.zeros(2, 2, device="meta"), 1)
    for wrong in (torch.zeros(0, 2), torch.zeros(2), torch.zeros(2, 2, 2)):
        with pytest.raises(SelectionError, match="give a matrix"):
            sketch(wrong, 1)
    with pytest.raises(SelectionError, match="count=0"):
        sketch(torch.eye(2), 0)
    with pytest.raises(SelectionError, match="energy"):
        zero.energy_rank(2.0)
    with pytest.raises(SelectionError, match="tolerance"):
        zero.numerical_rank(1.0)


def test_an_understated_residual_would_be_caught() -> None:
    """The intervals do depend on the residual: without it they miss the truth."""
    matrix = torch.randn(40, 40, dtype=torch.float64)
    found = sketch(matrix, 5, oversampling=0, iterations=0)
    bare = Sketch(found.values, found.full_rank, 0.0, found.scale)
    assert not holds(bare.effective_rank(), effective_rank(matrix))
    assert not holds(bare.stable_rank(), stable_rank(matrix))


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    matrix = decaying(50, 40, 0.5, 0)
    found = sketch(matrix.cuda(), 10)
    assert holds(found.effective_rank(), effective_rank(matrix))
