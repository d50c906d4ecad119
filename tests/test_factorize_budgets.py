"""``factorize`` by energy, rank and budget: FLOPs, parameters and latency of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxexpand
from fxexpand import (
    RefusedError,
    SelectionError,
    count_flops,
    cuts,
    effective_rank,
    factorize,
)
from fxexpand.kernel.modules import kernel_of
from fxexpand.lowrank.cuts import SCHEMES, Cut, matrix_of
from fxexpand.lowrank.factorize_report import FactorizeReport
from tests.factored import of_rank, rows_of
from tests.networks import ConvNet, perturb


def test_never_more_flops() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Linear(6, 6), nn.Linear(1, 1), nn.Conv2d(1, 1, 1)
    )
    x = torch.randn(1, 4, 8, 8)
    small: Any = factorize(model[:2], x, energy=0.9999)
    reasons = {name: row.reason for name, row in rows_of(small).items()}
    assert reasons["0"].startswith("rank") and "times its FLOPs" in reasons["0"]
    assert "of 6 costs" in reasons["1"]
    assert [type(module) for module in small] == [nn.Conv2d, nn.Linear]
    ones = factorize(nn.Sequential(model[2]), rank=1)
    assert rows_of(ones)["0"].reason == "rank 1 of 1 costs 2.00 times its FLOPs"
    with pytest.raises(RefusedError, match="times its FLOPs"):
        factorize(model[:2], x, energy=0.9999, strict=True)


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_energy_keeps_the_share_and_takes_the_cheaper_cut(energy: float) -> None:
    model: Any = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, (1, 7)))
    with torch.no_grad():  # decaying spectra
        for conv in (model[0], model[2]):
            conv.weight.mul_(torch.logspace(0, -2, conv.weight.shape[0]).reshape(-1, 1, 1, 1))
    x = torch.randn(1, 16, 9, 12)
    small: Any = factorize(model, x, energy=energy)
    for name, row in rows_of(small).items():
        options = {}
        for scheme in SCHEMES:
            values = torch.linalg.svdvals(matrix_of(kernel_of(model.get_submodule(name)), scheme)[0].double())
            kept = values.square().cumsum(0) / values.square().sum()
            rank = int((kept < energy).sum()) + 1
            alone = factorize(model, x, rank={name: (scheme, rank)})
            if name in cuts(alone):
                options[scheme] = rows_of(alone)[name].flops_after, rank
        assert row.cut is not None and row.error is not None
        assert row.error**2 <= 1 - energy + 1e-9
        best = min(options, key=lambda scheme: options[scheme])
        assert (row.cut.scheme, row.cut.rank) == (best, options[best][1])


def test_ranks_can_be_given_in_every_way() -> None:
    model: Any = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    assert [c.rank for c in cuts(factorize(model, rank=3)).values()] == [3, 3]
    assert [c.rank for c in cuts(factorize(model, rank=0.2)).values()] == [6, 4]
    assert cuts(factorize(model, rank={"2": 5})) == {"2": Cut("channel", 5)}
    spiky: Any = nn.Sequential(of_rank(nn.Linear(40, 30), 4))
    expected = -(-float(effective_rank(spiky[0].weight.detach())) // 1)
    assert cuts(factorize(spiky, rank="effective"))["0"].rank == expected
    values = torch.linalg.svdvals(model[0].weight.detach())
    got = cuts(factorize(model, threshold=float(values[7] + values[8]) / 2, select="0"))
    assert got == {"0": Cut("channel", 8)}
    trp = factorize(nn.Sequential(of_rank(nn.Linear(40, 30), 4)), method="trp")
    assert cuts(trp)["0"].rank == 4


@pytest.mark.parametrize("budget", [{"flops": 0.5}, {"params": 0.5}, {"flops": 0.9}, {"params": 0.3}])
def test_budgets_are_met_by_the_whole_model(budget: dict[str, float]) -> None:
    model, x = perturb(ConvNet()).eval(), torch.randn(2, 3, 20, 20)
    wide = nn.Sequential(model, nn.ReLU(), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 128))
    small: Any = factorize(wide, x, **budget)  # type: ignore[arg-type]
    [(name, share)] = budget.items()
    counts = {
        "flops": [count_flops(each, x).total for each in (wide, small)],
        "params": [sum(p.numel() for p in each.parameters()) for each in (wide, small)],
    }[name]
    assert counts[1] <= share * counts[0]
    found = fxexpand.report(small)
    assert isinstance(found, FactorizeReport)
    assert found.flops_after == count_flops(small, x).total
    assert found.params_after == sum(p.numel() for p in small.parameters())
    assert small(x).shape == wide(x).shape


def test_a_budget_out_of_reach_says_what_is_reachable() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(SelectionError, match=r"flops=0.1: rank 1 .* still leaves 0.25 "):
        factorize(model, torch.randn(1, 8), flops=0.1)
    absolute = factorize(model, torch.randn(1, 8), flops=128)
    assert count_flops(absolute, torch.randn(1, 8)).total <= 128


@pytest.mark.usefixtures("even_clock")
def test_a_latency_budget_factors_the_slow_layers() -> None:
    model: Any = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 4))
    small: Any = factorize(model, torch.randn(256, 768), latency=0.7)
    assert list(cuts(small)) == ["0"]
