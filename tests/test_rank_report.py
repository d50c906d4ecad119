"""What a report says of features, of a model before and after, and of sketched weights; and its plot."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fxexpand import expand
from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.lowrank import RankReport, RankTracker, rank_report
from fxexpand.lowrank.features import kernel_rank
from fxexpand.lowrank.measures import Unfolding, effective_rank, energy_rank, nuclear_norm, numerical_rank
from fxexpand.lowrank.rank_plots import plot_report
from fxexpand.recipes import Chain, RepVGG
from tests.networks import Writer


class Net(nn.Module):
    """A convolution, a dropout, a recurrent layer whose features have the batch first, and a reused head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.drop = nn.Dropout(0.9)
        self.gru = nn.GRU(9, 5, batch_first=True)
        self.head = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.conv(x)).flatten(2)
        y = self.gru(y)[0].flatten(1)
        y = self.head(self.head(y))
        assert isinstance(y, Tensor)
        return y


def rank_one(model: Net) -> Net:
    with torch.no_grad():
        model.conv.weight.copy_(model.conv.weight[:1].expand(4, 1, 3, 3))
        nn.init.zeros_(model.conv.bias)  # type: ignore[arg-type]
    return model


def test_features_are_those_of_each_layer_in_evaluation_mode() -> None:
    model, x = Net(), torch.randn(6, 1, 5, 5)
    report = rank_report(model, x)
    assert [(f.name, f.kind, f.points, f.dimensions) for f in report.features] == [
        ("conv", "Conv2d", 6, 36),
        ("gru", "GRU", 6, 20),
        ("head", "Linear", 6, 20),
    ]
    assert model.training and not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        values = model.conv(x)
    [conv, _, head] = report.features
    assert conv.effective_rank == pytest.approx(float(kernel_rank(values)))
    assert conv.entropy == pytest.approx(float(kernel_rank(values, measure="entropy")))
    assert conv.stable_rank == pytest.approx(float(kernel_rank(values, measure="stable")))
    assert conv.cosine_distance == pytest.approx(float(kernel_rank(values, "cosine_distance")))
    with torch.no_grad():
        first = model.head(model.gru(values.flatten(2))[0].flatten(1))
    assert head.effective_rank == pytest.approx(float(kernel_rank(first)), rel=1e-5)  # not the second call
    centered = rank_report(model, x, centered=True).features[0]
    assert centered.effective_rank == pytest.approx(float(kernel_rank(values, centered=True)))
    assert json.loads(json.dumps(report.to_dict()))["features"][0]["points"] == 6
    assert "features of" in str(report) and "before" not in str(report)


def test_the_rows_hold_every_measure() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    weight = model.get_parameter("0.weight").detach()
    for unfolding in get_args(Unfolding):
        [row] = rank_report(model, unfolding=unfolding).rows
        assert row.full_rank == (5 if unfolding == "channel" else 9)
        assert row.effective_rank == pytest.approx(float(effective_rank(weight, unfolding=unfolding)))
        assert row.numerical_rank == int(numerical_rank(weight, unfolding=unfolding))
        assert row.energy_rank == int(energy_rank(weight, 0.99, unfolding=unfolding))
        assert row.nuclear_norm == pytest.approx(float(nuclear_norm(weight, unfolding=unfolding)))


def test_before_and_after() -> None:
    before = Net()
    after = Net()
    after.load_state_dict(before.state_dict())
    x = torch.randn(6, 1, 5, 5)
    report = rank_report(rank_one(after), x, before=before)
    conv, features = report.rows[0], report.features[0]
    assert conv.before == pytest.approx(rank_report(before).rows[0].effective_rank)
    assert conv.effective_rank == pytest.approx(1.0, abs=1e-5)
    assert conv.before is not None and conv.before > 2
    assert features.before is not None and features.before > features.effective_rank
    text = str(report)
    assert text.count("before") == 2 and f"{conv.before:.2f}" in text


def test_an_expanded_model_has_the_rows_of_the_original() -> None:
    model = Net()
    big = expand(model, Chain(depth=2, width=1))
    report = rank_report(big, torch.randn(6, 1, 5, 5), before=model)
    assert [row.name for row in report.rows] == [row.name for row in rank_report(model).rows]
    assert all(row.before == pytest.approx(row.effective_rank, rel=1e-5) for row in report.rows)
    assert [f.name for f in report.features] == ["conv", "gru", "head"]
    assert all(f.before == pytest.approx(f.effective_rank, rel=1e-4) for f in report.features)


def test_a_sketched_weight_has_bounds_that_hold() -> None:
    low = nn.Linear(300, 200)
    with torch.no_grad():
        low.weight.copy_(torch.randn(200, 4) @ torch.randn(4, 300))
    model = nn.Sequential(low, nn.Linear(200, 10))
    exact = rank_report(model).rows
    [first, second] = rank_report(model, sketched=8).rows
    assert first.bounds is not None and second.bounds is None
    assert first.bounds[0] <= exact[0].effective_rank <= first.bounds[1]
    assert first.full_rank == 200 and second == exact[1]
    assert f"{first.bounds[0]:.2f}..{first.bounds[1]:.2f}" in str(rank_report(model, sketched=8))


def test_refused_inputs() -> None:
    model = Net()
    for wrong in (torch.randn(1, 1, 5, 5), torch.tensor(1.0)):
        with pytest.raises(SelectionError, match="two or more"):
            rank_report(model, wrong)
    with pytest.raises(SelectionError, match="sketched=0"):
        rank_report(model, sketched=0)
    with pytest.raises(UnusableWeightError, match=r"conv \(Conv2d\): its outputs hold NaN"):
        rank_report(model, torch.full((2, 1, 5, 5), float("nan")))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots(tmp_path: Path, suffix: str) -> None:
    x = torch.randn(6, 1, 5, 5)
    report = rank_report(rank_one(Net()), x, before=Net())
    path = plot_report(report, tmp_path / f"ranks.{suffix}")
    assert path.stat().st_size > 3000
    again = plot_report(report, tmp_path / f"again.{suffix}")
    assert path.read_bytes() == again.read_bytes()


def test_plots_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="no rows"):
        plot_report(RankReport(()), tmp_path / "a.svg")
    with pytest.raises(SelectionError, match=r"\.svg"):
        plot_report(rank_report(Net()), tmp_path / "a.jpeg")


def test_a_sketch_leaves_the_random_state_and_inputs_stay_as_they_were() -> None:
    model, x = Writer(), torch.randn(3, 64)
    before, state = x.clone(), torch.get_rng_state()
    found = rank_report(model, x, sketched=8)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, before)
    assert found == rank_report(model, x, sketched=8)


@pytest.mark.parametrize("sketched", [None, 4])
def test_the_default_device_is_not_used(sketched: int | None) -> None:
    """Under a default of MPS or of no values at all, measures are made where the weights are."""
    model, x = nn.Sequential(nn.Linear(40, 30)), torch.randn(5, 40)
    expected = rank_report(model, x, sketched=sketched)
    exact = float(effective_rank(model.get_parameter("0.weight").detach()))
    with torch.device("meta"):
        assert rank_report(model, x, sketched=sketched).to_dict() == expected.to_dict()
        assert RankTracker(model).ranks()["0.weight"] == [exact]


def test_a_lazy_layer_is_named() -> None:
    with pytest.raises(UnusableWeightError, match=r"0\.weight \(LazyLinear\): is not initialised yet"):
        rank_report(nn.Sequential(nn.LazyLinear(4)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_empty_layer_is_named() -> None:
    with pytest.raises(SelectionError, match=r"1\.weight \(Linear\): effective rank of an empty tensor"):
        rank_report(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0)))


def test_weights_are_read_in_evaluation_mode() -> None:
    """In training mode a BatchNorm leaves no single weight, and a spectral norm changes as it is read."""
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(9, 9))
    nn.utils.parametrizations.spectral_norm(plain[2])
    model: Any = expand(plain, RepVGG(), select="0").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = rank_report(model)
    tracker = RankTracker(model, every=1)
    tracker()
    assert [row.name for row in found.rows] == list(tracker.ranks()) == ["0.weight", "2.weight"]
    assert tracker.ranks()["0.weight"] == [found.rows[0].effective_rank] * 2
    assert found.rows[0].effective_rank == float(effective_rank(model.eval()[0].weight.detach()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_expanding_adds_no_rows_for_what_was_not_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 5))
    rows = [row.name for row in rank_report(model).rows]
    assert rows == [row.name for row in rank_report(expand(model)).rows] == ["0.weight"]


def test_a_tracker_is_pickled() -> None:
    tracker = RankTracker(nn.Sequential(nn.Linear(4, 4)))
    assert pickle.loads(pickle.dumps(tracker)).records == tracker.records


class Steps(nn.Module):
    """A recurrent cell, called by hand; a layer that gets nothing; and one that has features."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.idle, self.head = nn.LSTMCell(4, 6), nn.Linear(6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x)[0]
        self.idle(y[:, None][:, :0])  # an expert that no token was sent to
        result: Tensor = self.head(y)
        return result


def test_the_weights_of_recurrent_cells_are_reported() -> None:
    model = Steps()
    report = rank_report(model)
    assert [row.name for row in report.rows] == [
        "cell.weight_ih",
        "cell.weight_hh",
        "idle.weight",
        "head.weight",
    ]
    expected = float(effective_rank(model.cell.weight_hh.detach()))
    assert report.rows[1].effective_rank == pytest.approx(expected)
    assert [row.name for row in rank_report(expand(model)).rows] == [row.name for row in report.rows]
    assert list(RankTracker(model).ranks()) == [row.name for row in report.rows]


def test_a_layer_whose_output_is_empty_has_no_features() -> None:
    assert [row.name for row in rank_report(Steps(), torch.randn(5, 4)).features] == ["cell", "head"]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_model_before_may_have_another_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    now, then = (nn.Sequential(nn.Linear(8, 6)).to(dtype) for dtype in dtypes)
    x = torch.randn(5, 8).to(dtypes[0])
    report = rank_report(now, x, before=then)
    expected = rank_report(then, x.to(dtypes[1]))
    assert report.features[0].before == pytest.approx(expected.features[0].effective_rank)
    assert report.rows[0].before == pytest.approx(expected.rows[0].effective_rank)
