"""Effective rank against numpy's SVD and against matrices whose rank is known."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.lowrank import effective_rank, rank_report, spectral_entropy, stable_rank


def numpy_ranks(matrix: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """(effective rank, entropy, stable rank) straight from the definitions."""
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    p = s / s.sum()
    p = p[p > 0]
    entropy = float(-(p * np.log(p)).sum())
    frobenius, largest = np.linalg.norm(matrix, "fro"), np.linalg.norm(matrix, 2)
    return math.exp(entropy), entropy, float(frobenius**2 / largest**2)


def ranks(matrix: Tensor, groups: int = 1) -> tuple[float, float, float]:
    return (
        float(effective_rank(matrix, groups=groups)),
        float(spectral_entropy(matrix, groups=groups)),
        float(stable_rank(matrix, groups=groups)),
    )


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_the_definitions(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = numpy_ranks(matrix.numpy())
    assert ranks(matrix) == pytest.approx(expected, rel=1e-12)
    assert ranks(matrix.T) == pytest.approx(expected, rel=1e-10)
    assert ranks(-3e6 * matrix) == pytest.approx(expected, rel=1e-10)  # free of scale
    assert 1.0 - 1e-12 <= expected[0] <= min(rows, columns) * (1 + 1e-12)


def test_a_deviation_of_a_tenth_of_a_percent_shows() -> None:
    matrix = torch.randn(6, 4, dtype=torch.float64)
    bent = matrix.clone()
    bent[0] *= 1.001
    assert float(effective_rank(bent)) != pytest.approx(float(effective_rank(matrix)), rel=1e-7)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_equal_singular_values_count(rank: int) -> None:
    values = torch.zeros(7)
    values[:rank] = 0.25
    u, v = (torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0] for _ in range(2))
    matrix = u @ torch.diag(values.double()) @ v
    assert ranks(matrix) == pytest.approx((rank, math.log(rank), rank), rel=1e-9, abs=1e-9)


def test_known_spectrum() -> None:
    p = np.array([0.5, 0.25, 0.25])
    entropy = 1.5 * math.log(2)
    assert ranks(torch.diag(torch.tensor(p * 8))) == pytest.approx(
        (2**1.5, entropy, (0.25 + 2 * 0.0625) / 0.25), rel=1e-12
    )


def test_huh_et_al_at_depth_one_and_two() -> None:
    """Mean entropy of products of 16 x 16 Gaussian matrices: 2.54 and 2.35 in their first figure."""
    factors = torch.randn(2, 300, 16, 16)
    assert float(spectral_entropy(factors[0], batched=True).mean()) == pytest.approx(2.54, abs=0.02)
    assert float(spectral_entropy(factors[0] @ factors[1], batched=True).mean()) == pytest.approx(
        2.35, abs=0.02
    )


def test_a_kernel_is_read_as_out_by_the_rest() -> None:
    kernel = torch.randn(5, 3, 2, 4)
    assert ranks(kernel) == pytest.approx(numpy_ranks(kernel.numpy().reshape(5, 24)), rel=1e-6)


def test_a_grouped_kernel_is_block_diagonal() -> None:
    kernel = torch.randn(6, 2, 3, 1, dtype=torch.float64)
    whole = np.zeros((6, 18))
    for group in range(3):
        whole[2 * group : 2 * group + 2, 6 * group : 6 * group + 6] = kernel[
            2 * group : 2 * group + 2
        ].reshape(2, 6)
    assert ranks(kernel, groups=3) == pytest.approx(numpy_ranks(whole), rel=1e-12)
    assert ranks(kernel, groups=3)[0] != pytest.approx(ranks(kernel)[0], rel=1e-3)


def test_a_batch_is_a_matrix_at_a_time() -> None:
    batch = torch.randn(2, 3, 4, 5)
    batch[1, 2] = 0
    got = effective_rank(batch, batched=True)
    assert got.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert float(got[i, j]) == pytest.approx(float(effective_rank(batch[i, j])), rel=1e-12)


def test_a_zero_matrix_has_rank_zero() -> None:
    assert ranks(torch.zeros(3, 4)) == (0.0, 0.0, 0.0)


def test_half_precision_is_widened_first() -> None:
    matrix = torch.randn(8, 5).to(torch.bfloat16)
    assert effective_rank(matrix).dtype == torch.float64
    assert ranks(matrix) == pytest.approx(numpy_ranks(matrix.double().numpy()), rel=1e-12)


def test_the_gradient_exists_even_at_low_rank() -> None:
    matrix = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(effective_rank, (matrix,))
    low = torch.diag(torch.tensor([2.0, 1.0, 0.0])).requires_grad_()
    (gradient,) = torch.autograd.grad(effective_rank(low), low)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("hole", [float("nan"), float("inf")])
def test_a_matrix_with_holes_is_an_error(hole: float) -> None:
    matrix = torch.randn(3, 3)
    matrix[1, 2] = hole
    with pytest.raises(UnusableWeightError, match="NaN or Inf"):
        effective_rank(matrix)


def test_other_errors() -> None:
    with pytest.raises(SelectionError, match="kind='best'"):
        effective_rank(torch.randn(2, 2), "best")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="two dimensions"):
        effective_rank(torch.randn(2))
    with pytest.raises(SelectionError, match="groups=2 does not divide"):
        effective_rank(torch.randn(3, 2), groups=2)
    with pytest.raises(SelectionError, match="batched"):
        effective_rank(torch.randn(2, 3, 2), groups=2, batched=True)
    with pytest.raises(SelectionError, match="empty"):
        effective_rank(torch.randn(0, 2))
    with pytest.raises(UnusableWeightError, match="meta"):
        effective_rank(torch.empty(2, 2, device="meta"))


class LowRank(nn.Module):
    """A stand-in for an expanded layer: no subclass of Linear, its weight a product of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 5)

    @property
    def weight(self) -> Tensor:
        return self.up.weight @ self.down.weight


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([weight[:1], torch.zeros_like(weight[1:])])


def test_a_model_is_reported_layer_by_layer() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 3),
            "norm": nn.LayerNorm((2, 3)),
            "grouped": nn.Conv2d(4, 6, 3, groups=2),
            "up": nn.ConvTranspose1d(4, 6, 3, groups=2),
            "embedding": nn.Embedding(9, 4),
            "expanded": LowRank(),
            "parametrized": nn.Linear(4, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "apart": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            "recurrent": nn.GRU(3, 2),
        }
    )
    parametrize.register_parametrization(model["parametrized"], "weight", Halved())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = rank_report(model)
    rows = {row.name: row for row in report.rows}
    assert [(row.name, row.kind, row.shape, row.full_rank) for row in report.rows] == [
        ("linear.weight", "Linear", (3, 4), 3),
        ("grouped.weight", "Conv2d", (6, 2, 3, 3), 6),
        ("up.weight", "ConvTranspose1d", (6, 2, 3), 6),
        ("embedding.weight", "Embedding", (9, 4), 4),
        ("expanded.weight", "LowRank", (5, 6), 5),
        ("parametrized.weight", "Linear", (3, 4), 3),
        ("attention.in_proj_weight[q]", "MultiheadAttention", (4, 4), 4),
        ("attention.in_proj_weight[k]", "MultiheadAttention", (4, 4), 4),
        ("attention.in_proj_weight[v]", "MultiheadAttention", (4, 4), 4),
        ("attention.out_proj.weight", "NonDynamicallyQuantizableLinear", (4, 4), 4),
        ("apart.q_proj_weight", "MultiheadAttention", (4, 4), 4),
        ("apart.k_proj_weight", "MultiheadAttention", (4, 3), 3),
        ("apart.v_proj_weight", "MultiheadAttention", (4, 5), 4),
        ("apart.out_proj.weight", "NonDynamicallyQuantizableLinear", (4, 4), 4),
        ("recurrent.weight_ih_l0", "GRU", (6, 3), 3),
        ("recurrent.weight_hh_l0", "GRU", (6, 2), 2),
    ]
    assert rows["expanded.weight"].effective_rank <= 2.0 + 1e-5
    assert rows["parametrized.weight"].effective_rank == pytest.approx(1.0, abs=1e-9)

    # A transposed kernel maps its (in, taps) to out: undo torch's (in, out/groups, k) group by group.
    up = model["up"]
    assert isinstance(up, nn.ConvTranspose1d)
    stored = up.weight.detach().numpy()
    whole = np.zeros((6, 12))
    for group in range(2):
        block = stored[2 * group : 2 * group + 2]
        whole[3 * group : 3 * group + 3, 6 * group : 6 * group + 6] = np.moveaxis(block, 1, 0).reshape(3, 6)
    row = rows["up.weight"]
    assert (row.effective_rank, row.entropy, row.stable_rank) == pytest.approx(numpy_ranks(whole), rel=1e-6)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "expanded.weight" in str(report) and "5x6" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["weights"][0]["shape"] == [3, 4]


def test_a_single_layer_and_a_zero_weight() -> None:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    (row,) = rank_report(layer).rows
    assert (row.name, row.effective_rank, row.entropy, row.stable_rank) == ("weight", 0.0, 0.0, 0.0)


def test_a_broken_weight_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    with torch.no_grad():
        nn.init.constant_(model.get_parameter("1.weight"), float("nan"))
    with pytest.raises(UnusableWeightError, match=r"1\.weight \(Conv1d\): holds NaN or Inf"):
        rank_report(model)
