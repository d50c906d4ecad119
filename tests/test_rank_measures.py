"""The measures of fxexpand.rank.spectra: invariances, known spectra, gradients, and degenerate matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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
    unfold,
)

SMOOTH: list[Callable[..., Tensor]] = [effective_rank, spectral_entropy, stable_rank, nuclear_norm]
COUNTING: list[Callable[..., Tensor]] = [numerical_rank, energy_rank]
sizes = st.integers(1, 8)
seeds = st.integers(0, 2**31 - 1)


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, size: int) -> Tensor:
    q: Tensor = torch.linalg.qr(gaussian(seed, size, size)).Q
    return q


def with_spectrum(values: list[float], rows: int, columns: int, seed: int = 0) -> Tensor:
    middle = torch.zeros(rows, columns, dtype=torch.float64)
    middle[range(len(values)), range(len(values))] = torch.tensor(values, dtype=torch.float64)
    turned: Tensor = rotation(seed, rows) @ middle @ rotation(seed + 1, columns)
    return turned


@given(sizes, sizes, seeds, st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_scale_rotation_and_permutation(rows: int, columns: int, seed: int, scale: float) -> None:
    matrix = gaussian(seed, rows, columns)
    turned = rotation(seed + 1, rows) @ matrix @ rotation(seed + 2, columns)
    shuffled = matrix[torch.randperm(rows)][:, torch.randperm(columns)]
    for measure in SMOOTH + COUNTING:
        expected = float(measure(matrix))
        assert float(measure(turned)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert float(measure(shuffled)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert float(measure(matrix.T)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        power = scale if measure is nuclear_norm else 1.0
        assert float(measure(-scale * matrix)) == pytest.approx(power * expected, rel=1e-9, abs=1e-9)


@given(sizes, sizes, seeds)
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_measures(rows: int, columns: int, seed: int) -> None:
    """Stable rank <= effective rank <= numerical rank, for the stable rank of the *energy*."""
    matrix = gaussian(seed, rows, columns)
    full = min(rows, columns)
    assert 1 - 1e-9 <= float(stable_rank(matrix)) <= float(effective_rank(matrix)) + 1e-9
    assert float(effective_rank(matrix)) <= int(numerical_rank(matrix, 0.0)) + 1e-9 <= full + 1e-9
    shares = [int(energy_rank(matrix, share)) for share in (0.1, 0.5, 0.9, 1.0)]
    assert shares == sorted(shares) and shares[0] >= 1 and shares[-1] <= full


def test_known_spectrum() -> None:
    matrix = with_spectrum([4.0, 3.0, 0.5, 1e-9], 6, 5)
    assert float(nuclear_norm(matrix)) == pytest.approx(7.5, rel=1e-8)
    assert int(numerical_rank(matrix, 1e-6)) == 3
    assert int(numerical_rank(matrix)) == 4  # 1e-9 is more than rounding in float64,
    assert int(numerical_rank(matrix.float())) == 3  # but not in float32
    # Squares 16, 9, 0.25: shares 0.634, 0.990, 1.
    assert [int(energy_rank(matrix, e)) for e in (0.6, 0.64, 0.98, 0.995)] == [1, 2, 2, 3]
    assert singular_values(matrix).tolist() == pytest.approx([4.0, 3.0, 0.5, 1e-9, 0.0], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(64, 512), (300, 260), (8, 4096)])
def test_what_rounding_to_half_precision_adds_is_no_rank(dtype: torch.dtype, rows: int, columns: int) -> None:
    low = (gaussian(1, rows, 5) @ gaussian(2, 5, columns)).to(dtype)
    assert int(numerical_rank(low)) == 5 < int(numerical_rank(low, 0.0))
    if rows < columns / 4:  # the smallest singular value is far from zero
        assert int(numerical_rank(gaussian(3, rows, columns).to(dtype))) == rows


def test_both_unfoldings_of_a_kernel() -> None:
    kernel = gaussian(0, 6, 2, 3, 4)
    stored: Any = kernel.numpy()
    channel, spatial = unfold(kernel, "channel", groups=3), unfold(kernel, "spatial", groups=3)
    assert channel.shape == (3, 2, 24) and spatial.shape == (3, 6, 8)
    for group in range(3):
        block = stored[2 * group : 2 * group + 2]
        assert np.array_equal(channel[group].numpy(), block.reshape(2, 24))
        # Rows (in, k_1), columns (out, k_2), as TRP's VH decomposition has it.
        assert np.array_equal(spatial[group].numpy(), block.transpose(1, 2, 0, 3).reshape(6, 8))
    expected = np.concatenate([np.linalg.svd(m.numpy(), compute_uv=False) for m in spatial])
    found = singular_values(kernel, groups=3, unfolding="spatial")
    assert found.tolist() == pytest.approx(sorted(expected, reverse=True), rel=1e-12)


def test_a_separable_kernel_has_spatial_rank_one() -> None:
    column, row = gaussian(0, 5, 3), gaussian(1, 4, 3)
    kernel = torch.einsum("ci,oj->ocij", column, row)
    assert int(numerical_rank(kernel, 1e-9, unfolding="spatial")) == 1
    assert int(numerical_rank(kernel, 1e-9)) > 1


def test_a_spatial_unfolding_of_a_matrix_or_of_one_dimension_is_its_transpose() -> None:
    for shape in ((4, 3), (4, 3, 5)):
        weight = gaussian(0, *shape)
        a, b = (singular_values(weight, unfolding=kind) for kind in ("channel", "spatial"))
        assert a.tolist() == pytest.approx(b.tolist(), rel=1e-12)


@pytest.mark.parametrize("measure", SMOOTH)
def test_gradients_are_right_and_finite_where_singular_values_repeat_or_vanish(
    measure: Callable[..., Tensor],
) -> None:
    smooth = gaussian(0, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(measure, (smooth,))
    batch = gaussian(0, 2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: measure(m, batched=True), (batch,))
    for special in (
        torch.eye(4, dtype=torch.float64),
        torch.zeros(4, 3, dtype=torch.float64),
        with_spectrum([1.0, 1.0, 1.0], 5, 4),
        with_spectrum([2.0], 5, 4),
        torch.ones(1, 1, dtype=torch.float64),
        1e-200 * gaussian(1, 3, 3),
    ):
        matrix = special.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(measure(matrix), matrix)
        assert bool(torch.isfinite(gradient).all()), special


def test_the_gradient_of_the_nuclear_norm_is_u_v() -> None:
    matrix = gaussian(0, 5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(matrix), matrix)
    u, _, v = torch.linalg.svd(matrix.detach(), full_matrices=False)
    torch.testing.assert_close(gradient, u @ v)


def test_descending_the_effective_rank_lowers_it() -> None:
    matrix = gaussian(0, 6, 6).float().requires_grad_()
    optimiser = torch.optim.Adam([matrix], 0.02)
    first = float(effective_rank(matrix.detach()))
    for _ in range(200):
        optimiser.zero_grad()
        torch.autograd.backward([effective_rank(matrix)])
        optimiser.step()
    assert bool(matrix.isfinite().all()) and float(effective_rank(matrix.detach())) < 0.5 * first


@pytest.mark.parametrize("unit", [1e-300, 1e-30, 1e150, 1e300])
def test_the_unit_does_not_overflow(unit: float) -> None:
    matrix = gaussian(0, 4, 3)
    for measure in SMOOTH + COUNTING:
        power = unit if measure is nuclear_norm else 1.0
        assert float(measure(unit * matrix)) == pytest.approx(power * float(measure(matrix)), rel=1e-9)


def test_degenerate_matrices() -> None:
    zero = torch.zeros(3, 4)
    assert [float(m(zero)) for m in SMOOTH + COUNTING] == [0.0] * 6
    one = torch.tensor([[-3.0]])
    assert [float(m(one)) for m in (effective_rank, stable_rank, numerical_rank, energy_rank)] == [1.0] * 4
    assert float(nuclear_norm(one)) == 3.0 and float(spectral_entropy(one)) == 0.0
    for measure in SMOOTH + COUNTING:
        with pytest.raises(UnusableWeightError, match="NaN or Inf"):
            measure(torch.tensor([[float("nan"), 1.0]]))
        with pytest.raises(SelectionError, match="empty"):
            measure(torch.zeros(0, 3))
        with pytest.raises(UnusableWeightError, match="meta"):
            measure(torch.zeros(2, 3, device="meta"))
        with pytest.raises(SelectionError, match="two dimensions"):
            measure(torch.zeros(3))


def test_options_out_of_range() -> None:
    matrix = torch.eye(3)
    for energy in (0.0, 1.5):
        with pytest.raises(SelectionError, match="energy"):
            energy_rank(matrix, energy)
    for tolerance in (-0.1, 1.0):
        with pytest.raises(SelectionError, match="tolerance"):
            numerical_rank(matrix, tolerance)
    with pytest.raises(SelectionError, match="unfolding='rows'"):
        nuclear_norm(matrix, unfolding="rows")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="single kernel"):
        nuclear_norm(torch.zeros(2, 3, 3), batched=True, unfolding="spatial")


def test_complex_matrices() -> None:
    matrix = torch.complex(gaussian(0, 4, 3), gaussian(1, 4, 3))
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert singular_values(matrix).tolist() == pytest.approx(expected, rel=1e-12)
    assert float(nuclear_norm(matrix)) == pytest.approx(expected.sum(), rel=1e-12)


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    matrix = gaussian(0, 20, 30)
    for measure in SMOOTH + COUNTING:
        found = measure(matrix.cuda())
        assert found.is_cuda and float(found) == pytest.approx(float(measure(matrix)), rel=1e-9)
    there = matrix.cuda().requires_grad_()
    (gradient,) = torch.autograd.grad(effective_rank(there), there)
    assert bool(gradient.isfinite().all())
