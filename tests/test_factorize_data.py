"""Approximation by data and in l_p, against approximation of the weight by least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxexpand import SelectionError, cuts, factorize
from fxexpand.lowrank.cuts import SCHEMES, Scheme
from tests.compare import assert_different, assert_same
from tests.factored import rows_of


def test_calibration_approximates_outputs_instead_of_weights() -> None:
    """On inputs of low rank the outputs are kept, which least squares on the weight does not do."""
    for layer, x in (
        (nn.Linear(24, 16), torch.randn(200, 3) @ torch.randn(3, 24)),
        (nn.Linear(16, 24), torch.randn(200, 3) @ torch.randn(3, 16)),
        (nn.Conv2d(8, 12, 1), torch.einsum("bkhw,kc->bchw", torch.randn(4, 3, 6, 6), torch.randn(3, 8))),
    ):
        model, x = nn.Sequential(layer).double(), x.double()
        by_data = factorize(model, x, rank=3, calibration=[x])
        by_weight = factorize(model, x, rank=3)
        assert_same(by_data(x), model(x), 1e-6)
        assert_different(by_weight(x), model(x), 1e-2)
        assert rows_of(by_data)["0"].data_error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("groups", [1, 2])
def test_by_data_is_the_best_there_is(scheme: Scheme, groups: int) -> None:
    model: Any = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=groups, bias=False)).double()
    x = torch.randn(6, 8, 7, 7, dtype=torch.float64) * torch.logspace(0, -2, 8).reshape(1, -1, 1, 1)
    by_data = factorize(model, x, rank=2, calibration=[x], scheme=scheme)
    by_weight = factorize(model, x, rank=2, scheme=scheme)

    def error(small: nn.Module) -> float:
        return float(((small(x) - model(x)).norm() / model(x).norm()).detach())

    assert error(by_data) < error(by_weight)
    predicted = rows_of(by_data)["0"].data_error
    if scheme == "channel":  # spatially, columns of taps are taken as unrelated
        assert predicted == pytest.approx(error(by_data), rel=1e-6)


def test_calibration_of_a_table_weighs_tokens_as_often_as_they_come() -> None:
    model: Any = nn.Sequential(nn.Embedding(60, 12).double())
    often = torch.arange(4).repeat(1, 500)
    by_data = factorize(model, rank=4, calibration=[often])
    assert_same(by_data(often), model(often), 0.3)
    assert_different(factorize(model, rank=4)(often), model(often), 0.3)


def test_lp_ignores_outlier_rows() -> None:
    weight = torch.randn(200, 3) @ torch.randn(3, 24)
    clean = weight.clone()
    weight[:3] += 20 * torch.randn(3, 24)
    model: Any = nn.Sequential(nn.Linear(24, 200, bias=False), nn.Conv2d(9, 9, 3))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    errors = {}
    for method in ("svd", "lp"):
        small: Any = factorize(model, rank=4, method=method)
        errors[method] = float((small[0].weight.detach() - clean)[3:].abs().sum() / clean[3:].abs().sum())
    assert errors["lp"] < 0.5 * errors["svd"]
    assert "Linear and Embedding" in rows_of(small)["1"].reason


@pytest.mark.parametrize("batches", [1, 7])
def test_a_threshold_by_data_is_of_the_mean_over_positions(batches: int) -> None:
    """More data is no more energy: the ranks depend on what the inputs are, not on how many there are."""
    x = torch.randn(50, 24, dtype=torch.float64) * torch.logspace(0, -2, 24, dtype=torch.float64)
    image = torch.randn(3, 8, 6, 6, dtype=torch.float64) * torch.logspace(0, -2, 8).reshape(-1, 1, 1)
    layer: Any
    for layer, inputs in ((nn.Linear(24, 16), x), (nn.Linear(24, 40), x), (nn.Conv2d(8, 12, 3), image)):
        model: Any = nn.Sequential(layer).double()
        with torch.no_grad():
            y = layer(inputs) - layer.bias.reshape(-1, *[1] * (inputs.ndim - 2))
            rows = y.movedim(1, 0).flatten(1)
            values = torch.linalg.eigvalsh(rows @ rows.T / rows.shape[1]).clamp(min=0.0).sqrt()
        between = float(values[-5:-3].mean())
        by_data = factorize(model, threshold=between, calibration=[inputs] * batches, scheme="channel")
        assert cuts(by_data)["0"].rank == 4


def test_a_table_by_data_has_a_threshold_too() -> None:
    model: Any = nn.Sequential(nn.Embedding(60, 12).double())
    tokens = torch.arange(60).repeat(1, 20)
    ranks = [cuts(factorize(model, threshold=0.9, calibration=[tokens] * k))["0"].rank for k in (1, 9)]
    values = torch.linalg.svdvals(model[0].weight.detach()) / 60**0.5
    assert ranks == [int((values > 0.9).sum())] * 2


def test_a_calibration_is_a_list_of_batches() -> None:
    """A tensor would be taken apart into inputs without a batch, a dict into its keys."""
    model, x = nn.Sequential(nn.Linear(9, 9)), torch.randn(4, 9)
    bad: Any
    for bad, message in (
        (x, r"calibration: got a Tensor, one batch: give a list of batches, \[batch\]"),
        ({"input": x}, r"calibration: got a dict, one batch: give a list of batches, \[batch\]"),
        ([x, [x, x]], r"calibration: batch 1: got list; give a tensor, a tuple"),
    ):
        with pytest.raises(SelectionError, match=message):
            factorize(model, rank=2, calibration=bad)
    with_dict = factorize(model, rank=2, calibration=({"input": x},)).state_dict()
    expected = factorize(model, rank=2, calibration=[x]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in with_dict.items())
