"""Low rank in l_p: the ellipsoids' bounds, p = 2 is the SVD, invariances, and outlier rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxexpand.errors import SelectionError
from fxexpand.lowrank.lp import LOWNER_SLACK, LOWNER_UP_TO, lewis_form, lowner_form, lp_error, lp_spectrum
from fxexpand.lowrank.projection import spectrum
from tests.compare import assert_different, assert_same


def with_outliers(rows: int = 300, columns: int = 12, size: float = 30.0) -> Tensor:
    matrix = torch.randn(rows, 3, dtype=torch.float64) @ torch.randn(3, columns, dtype=torch.float64)
    matrix += 0.05 * torch.randn(rows, columns, dtype=torch.float64)
    matrix[:6] += size * torch.randn(6, columns, dtype=torch.float64)
    return matrix


def ratios(matrix: Tensor, form: Tensor, p: float) -> Tensor:
    """``|Ax|_p / |M^1/2 x|_2`` in random directions, along the axes of M, and climbing to the largest."""
    d = matrix.shape[1]
    x = torch.cat([torch.randn(d, 2000, dtype=torch.float64), torch.linalg.eigh(form).eigenvectors], 1)
    inverse = torch.linalg.inv(form)
    found = []
    for _ in range(10):
        images = matrix @ x
        norms = images.abs().pow(p).sum(0).pow(1 / p)
        found.append(norms / (x * (form @ x)).sum(0).sqrt())
        x = inverse @ (matrix.mT @ (images.sign() * (images.abs() / norms).pow(p - 1)))
    return torch.cat(found)


@pytest.mark.parametrize("p", [1.0, 1.2, 1.5, 2.0])
def test_the_lewis_ellipsoid_is_as_near_as_stated(p: float) -> None:
    matrix = with_outliers()
    got = ratios(matrix, lewis_form(matrix, p), p)
    limit = matrix.shape[1] ** (1 / p - 0.5)
    assert float(got.min()) >= 1 - 1e-3 and float(got.max()) <= limit * (1 + 1e-3)
    if p == 1.0:  # a form that is 0.1 % larger is caught where the bound is met, as it is by a diagonal
        diagonal = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
        wide = ratios(diagonal, lewis_form(diagonal, p), p)
        assert float(wide.min()) == pytest.approx(1.0, abs=1e-2)
        assert float(wide.max()) <= 5**0.5 * (1 + 1e-3)
        assert float(ratios(diagonal, 1.1 * lewis_form(diagonal, p), p).min()) < 1 - 1e-3


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_the_lowner_ellipsoid_is_as_near_as_stated(p: float) -> None:
    matrix = with_outliers()
    got = ratios(matrix, lowner_form(matrix, p), p)
    limit = (1 + LOWNER_SLACK) * matrix.shape[1] ** 0.5
    assert float(got.min()) >= 1 - 1e-9 and float(got.max()) <= limit * 1.05  # found by local search


def test_cutting_makes_the_ellipsoid_smaller() -> None:
    """The start is |Ax|_2 <= |Ax|_1; a matrix of two unlike halves is cut."""
    matrix = torch.cat(
        [torch.eye(8, dtype=torch.float64).repeat(50, 1), 40 * torch.randn(3, 8, dtype=torch.float64)]
    )
    form = lowner_form(matrix, 1.0)
    assert float(torch.logdet(form)) > float(torch.logdet(matrix.mT @ matrix)) + 1.0


@pytest.mark.parametrize("body", ["lewis", "lowner"])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_p_2_is_the_truncated_svd(body: str, shape: tuple[int, int]) -> None:
    matrix = torch.randn(1, *shape, dtype=torch.float64)
    for rank in (1, 5, 12):
        got = lp_spectrum(matrix, 2.0, body).projected(rank)  # type: ignore[arg-type]
        assert_same(got, spectrum(matrix).projected(rank), 1e-8)


@pytest.mark.parametrize("body", ["lewis", "lowner"])
def test_outlier_rows_cost_the_svd_more(body: str) -> None:
    matrix = with_outliers(size=20.0)
    one = lp_spectrum(matrix[None], 1.0, body).projected(3)[0]  # type: ignore[arg-type]
    two = spectrum(matrix[None]).projected(3)[0]
    assert lp_error(matrix, one, 1.0) < 0.75 * lp_error(matrix, two, 1.0)
    assert lp_error(matrix, one, 2.0) > lp_error(matrix, two, 2.0)  # where the SVD is the best there is


def test_scale_rotation_and_permutation_change_nothing() -> None:
    matrix = with_outliers(60, 8)
    expected = lp_spectrum(matrix[None], 1.0).projected(3)[0]
    for scale in (1e-200, 1e200):
        assert_same(lp_spectrum(matrix[None] * scale, 1.0).projected(3)[0] / scale, expected, 1e-6)
    order = torch.randperm(60)
    assert_same(lp_spectrum(matrix[None, order], 1.0).projected(3)[0], expected[order], 1e-6)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert_same(lp_spectrum((matrix @ turn)[None], 1.0).projected(3)[0], expected @ turn, 1e-6)
    assert_different(spectrum(matrix[None]).projected(3)[0], expected, 1e-3)


@pytest.mark.parametrize("body", ["lewis", "lowner"])
def test_degenerate_matrices(body: str) -> None:
    low = torch.randn(30, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    assert_same(lp_spectrum(low[None], 1.0, body).projected(2)[0], low, 1e-6)  # type: ignore[arg-type]
    low[3:] = 0.0
    assert_same(lp_spectrum(low[None], 1.0, body).projected(2)[0], low, 1e-6)  # type: ignore[arg-type]
    for matrix in (torch.zeros(1, 5, 3), torch.ones(1, 1, 1)):
        got = lp_spectrum(matrix, 1.0, body).projected(1)  # type: ignore[arg-type]
        assert_same(got, matrix.double(), 1e-12)


def test_what_is_out_of_range_is_refused() -> None:
    matrix = torch.randn(1, LOWNER_UP_TO + 2, LOWNER_UP_TO + 1)
    for p in (0.5, 2.5, float("nan")):
        with pytest.raises(SelectionError, match="choose a norm"):
            lp_spectrum(matrix, p)
    with pytest.raises(SelectionError, match="choose from lewis, lowner"):
        lp_spectrum(matrix, 1.0, "john")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="at most 64 columns"):
        lp_spectrum(matrix, 1.0, "lowner")


def test_the_error_counts_every_entry() -> None:
    matrix = torch.tensor([[3.0, -4.0]])
    assert lp_error(matrix, torch.zeros(1, 2), 1.0) == 1.0
    assert lp_error(matrix, torch.tensor([[3.0, 0.0]]), 1.0) == pytest.approx(4 / 7)
    assert lp_error(matrix, torch.tensor([[0.0, -4.0]]), 2.0) == pytest.approx(0.6)
    assert lp_error(torch.zeros(2, 2), torch.zeros(2, 2), 1.0) == 0.0


def test_wide_tables_take_the_lewis_form() -> None:
    """768 columns, as in BERT, in seconds."""
    matrix = torch.randn(800, 20) @ torch.randn(20, 768) + 0.01 * torch.randn(800, 768)
    assert lp_error(matrix, lp_spectrum(matrix[None], 1.0).projected(20)[0], 1.0) < 0.02
