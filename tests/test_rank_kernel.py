"""The rank of features against kernels written out in numpy."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.lowrank.features import FeatureKernel, kernel_rank


def entropy(kernel: Any) -> float:
    s = np.linalg.svd(kernel, compute_uv=False)
    p = s / s.sum()
    p = p[p > 1e-300]
    return float(-(p * np.log(p)).sum())


def written_out(features: Any, kind: str, centered: bool) -> Any:
    kernel = features @ features.conj().T
    if kind != "gram":
        length = np.linalg.norm(features, axis=1)
        kernel = kernel / np.outer(length, length)
    if kind == "cosine_distance":
        kernel = 1.0 - kernel
    if centered:
        away = np.eye(len(features)) - 1.0 / len(features)
        kernel = away @ kernel @ away
    return kernel


@pytest.mark.parametrize("kind", get_args(FeatureKernel))
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 5), (9, 2, 3)])
def test_kernels_written_out(kind: FeatureKernel, centered: bool, shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, dtype=torch.float64) + 0.3
    expected = entropy(written_out(features.flatten(1).numpy(), kind, centered))
    found = kernel_rank(features, kind, centered=centered, measure="entropy")
    assert float(found) == pytest.approx(expected, abs=1e-9)
    assert float(kernel_rank(features, kind, centered=centered)) == pytest.approx(np.exp(expected), rel=1e-9)
    # The form that gradients pass through is another one: it must agree.
    tracked = kernel_rank(features.requires_grad_(), kind, centered=centered, measure="entropy")
    assert float(tracked.detach()) == pytest.approx(expected, abs=1e-9)


def test_stable_rank_of_a_gram_matrix() -> None:
    features = torch.randn(7, 4, dtype=torch.float64)
    s = np.linalg.svd(features.numpy() @ features.numpy().T, compute_uv=False)
    assert float(kernel_rank(features, measure="stable")) == pytest.approx((s**2).sum() / s[0] ** 2)


@pytest.mark.parametrize("kind", get_args(FeatureKernel))
def test_batches_scale_and_gradients(kind: FeatureKernel) -> None:
    batch = torch.randn(3, 8, 4, dtype=torch.float64)
    found = kernel_rank(batch, kind, batched=True)
    assert found.tolist() == pytest.approx([float(kernel_rank(one, kind)) for one in batch], rel=1e-9)
    for unit in (1e-200, 1e200):
        assert float(kernel_rank(unit * batch[0], kind)) == pytest.approx(float(found[0]), rel=1e-9)
    few = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: kernel_rank(f, kind), (few,))


@pytest.mark.parametrize("kind", get_args(FeatureKernel))
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_complex_features(kind: FeatureKernel, centered: bool, shape: tuple[int, ...]) -> None:
    """Of a Fourier layer: the imaginary part counts, in a Hermitian kernel."""
    features = torch.randn(shape, dtype=torch.complex128) + 0.3
    expected = entropy(written_out(features.numpy(), kind, centered))
    found = kernel_rank(features.requires_grad_(), kind, centered=centered, measure="entropy")
    assert float(found.detach()) == pytest.approx(expected, abs=1e-9)
    assert float(kernel_rank(features.detach(), kind, centered=centered)) == pytest.approx(np.exp(expected))
    found.backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None and bool(torch.isfinite(features.grad).all())


def test_the_cosine_does_not_see_lengths_but_the_gram_matrix_does() -> None:
    features = torch.randn(6, 4, dtype=torch.float64)
    longer = features * torch.tensor([1.0, 9.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    assert float(kernel_rank(longer, "cosine")) == pytest.approx(float(kernel_rank(features, "cosine")))
    assert float(kernel_rank(longer)) < float(kernel_rank(features)) - 0.1


def test_degenerate_features() -> None:
    same = torch.ones(4, 3)
    assert float(kernel_rank(same)) == pytest.approx(1.0, abs=1e-6)
    assert float(kernel_rank(same, centered=True)) == 0.0
    assert float(kernel_rank(torch.zeros(4, 3))) == 0.0
    row = torch.randn(4, 3, dtype=torch.float64)
    row[2] = 0
    assert bool(torch.isfinite(kernel_rank(row, "cosine")))  # a zero row: cosine 0
    assert float(kernel_rank(torch.randn(1, 3))) == pytest.approx(1.0)
    for wrong in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 0)):
        with pytest.raises(SelectionError, match="points"):
            kernel_rank(wrong)
    with pytest.raises(SelectionError, match="batch, points"):
        kernel_rank(torch.zeros(3, 2), batched=True)
    with pytest.raises(UnusableWeightError, match="NaN"):
        kernel_rank(torch.tensor([[float("nan")], [1.0]]))
    with pytest.raises(SelectionError, match="kind='rbf'"):
        kernel_rank(torch.ones(2, 2), "rbf")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="measure='trace'"):
        kernel_rank(torch.ones(2, 2), measure="trace")  # type: ignore[arg-type]
