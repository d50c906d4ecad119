"""factorize as it is used: structures built again, ranks as numpy has them, inputs and random state kept."""

from __future__ import annotations

from contextlib import suppress
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxexpand
from fxexpand import SelectionError, TrainedRankPruning, count_flops, cuts
from fxexpand.lowrank.cuts import Cut
from tests.compare import assert_same
from tests.factored import rows_of
from tests.networks import Language, Writer

factorize: Any = fxexpand.factorize  # its options of the wrong types are what is tested, too


class Twice(nn.Module):
    """Two Linear layers of one weight; each has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).relu())
        return result


def vectors() -> Tensor:
    return torch.randn(2, 16)


def tokens() -> Tensor:
    return torch.randint(0, 11, (2, 5))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(Twice, vectors), (Language, tokens), (lambda: nn.Sequential(nn.Embedding(40, 12)), tokens)],
    ids=["tied layers", "tied table", "table"],
)
def test_the_structure_of_shared_weights_can_be_built_again(make: Any, inputs: Any) -> None:
    """The keys of ``cuts`` are layers, the weight they share is a site of its own."""
    small, x = factorize(make(), rank=2), inputs()
    assert len(cuts(small)) >= 1
    again = factorize(make(), rank=cuts(small))
    assert cuts(again) == cuts(small)
    again.load_state_dict(small.state_dict())
    assert_same(again(x), small(x), 0.0)


def test_two_ranks_for_one_weight_are_an_error() -> None:
    assert cuts(factorize(Twice(), rank={"second": 2}))["first"].rank == 2
    with pytest.raises(SelectionError, match=r"first: 2, second: 3: they are one weight"):
        factorize(Twice(), rank={"first": 2, "second": 3})


def test_a_cut_that_saved_at_the_measured_sizes_is_built_again_without_them() -> None:
    """At 4 x 4 and a padding of 2 a spatial cut costs less than at the sizes that are guessed."""
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2)), torch.randn(1, 8, 4, 4)
    small = factorize(model, x, rank=14)
    assert cuts(small) == {"0": Cut("spatial", 14)}
    assert count_flops(small, x).total < count_flops(model, x).total
    again = factorize(model, rank=cuts(small), strict=True)
    assert list(again.state_dict()) == list(small.state_dict())
    # What sizes have no say in is refused all the same, and so is what was measured.
    assert not cuts(factorize(model, rank={"0": 14}))
    assert not cuts(factorize(nn.Sequential(nn.Linear(9, 9)), rank={"0": ("channel", 9)}))
    assert not cuts(factorize(model, torch.randn(1, 8, 32, 32), rank=cuts(small)))


@pytest.mark.parametrize("bad", [0, -1, 0.5, True, "x", ("channel", 0), ("channel", 0.5), ("depth", 2), ()])
def test_a_mapping_holds_ranks_of_1_or_more(bad: Any) -> None:
    with pytest.raises(SelectionError, match=r"rank: 0: .*give a rank of 1 or more"):
        factorize(nn.Sequential(nn.Linear(9, 9)), rank={"0": bad})
    with pytest.raises(SelectionError, match="no layer of that name"):
        factorize(nn.Sequential(nn.Linear(9, 9)), rank=MappingProxyType({"1": 2}))


@pytest.mark.parametrize("name", ["flops", "params"])
def test_a_share_is_at_most_1_and_a_number_may_be_numpys(name: str) -> None:
    """Half of a count is a float: as a share it would be met by any model, and nothing would be cut."""
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(1, 32)
    for bad in (1500.0, 1.01, float("inf"), float("nan"), True, "0.5"):
        with pytest.raises(SelectionError, match=rf"{name}={bad}: give a share .*\(0, 1\], or a number"):
            factorize(model, x, **{name: bad})
    expected = cuts(factorize(model, x, **{name: 1500}))
    assert expected and cuts(factorize(model, x, **{name: np.int64(1500)})) == expected
    assert cuts(factorize(model, rank=np.int64(3)))["0"].rank == 3
    for wrong in (True, [3]):
        with pytest.raises(SelectionError, match=r"choose an int, a share, a mapping"):
            factorize(model, rank=wrong)


@pytest.mark.parametrize("options", [{"rank": 4}, {"latency": 0.9}], ids=str)
def test_inputs_and_random_state_are_as_before(options: dict[str, float]) -> None:
    model, x = nn.Sequential(Writer(), nn.Linear(64, 2048)), torch.randn(64, 64)
    before, state = x.clone(), torch.get_rng_state()
    with suppress(SelectionError):  # so small a model may miss a budget of time
        factorize(model, x, **options)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("hook", ["prune", "weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_that_a_hook_computes_is_not_projected(hook: str) -> None:
    model: Any = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    if hook == "prune":
        prune.l1_unstructured(model[1], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    else:
        nn.utils.weight_norm(model[1])
    assert TrainedRankPruning(model).names == ["2"]
    small = factorize(model, rank=2)
    assert rows_of(small)["1"].action == "refused" and list(cuts(small)) == ["0", "2", "3"]


class Masked(nn.Module):
    """Scores of which some are -inf, and complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.linear(x)
        return scores.masked_fill(torch.eye(8, dtype=torch.bool), float("-inf")), torch.fft.fft(scores)


def test_the_error_of_the_outputs_is_measured_where_they_are_numbers() -> None:
    model, x = Masked(), torch.randn(8, 8)
    small = factorize(model, x, rank=3)
    lost = whole = 0.0
    with torch.no_grad():
        for before, after in zip(model(x), small(x), strict=True):
            kept = before.isfinite()
            lost += float((after - before)[kept].abs().square().sum())
            whole += float(before[kept].abs().square().sum())
    found: Any = fxexpand.report(small)
    assert found.output_error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)


def test_a_calibration_without_numbers_is_an_error() -> None:
    """None of these may pass for a calibration: the weights alone would decide, and nothing would say so."""
    model, x = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9)), torch.randn(20, 9)
    used_up = iter([x])
    list(used_up)
    nothing: Any
    for nothing in ([], used_up):
        with pytest.raises(SelectionError, match="calibration: no batches"):
            factorize(model, rank=2, calibration=nothing)
    for value in (float("nan"), float("inf")):
        with pytest.raises(SelectionError, match="calibration: the inputs of 0 hold NaN or Inf"):
            factorize(model, rank=2, calibration=[x, torch.full((1, 9), value)])
    expected = factorize(model, rank=2, calibration=[x]).state_dict()
    with_empty = factorize(model, rank=2, calibration=[x, x[:0]]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in with_empty.items())


def test_a_lazy_layer_is_refused_and_the_others_are_factored() -> None:
    model = nn.Sequential(nn.LazyLinear(9), nn.Linear(9, 9))
    for options in ({"rank": 2}, {"params": 50}):
        small = factorize(model, **options)
        assert "lazy" in rows_of(small)["0"].reason and list(cuts(small)) == ["1"]


def test_a_weight_is_not_assigned_beside_the_factors() -> None:
    """It would be kept, saved, and never read."""
    model = factorize(nn.Sequential(nn.Linear(9, 9)), rank=2)
    for name in ("weight", "bias"):
        for value in (nn.Parameter(torch.zeros(9, 9)), None):
            with pytest.raises(AttributeError, match=f"FactorizedLinear.{name} is that of the factors"):
                setattr(model[0], name, value)
    assert list(model.state_dict()) == ["0.0.weight", "0.1.weight", "0.1.bias"]


def test_a_checkpoint_with_nan_is_an_error_that_names_it() -> None:
    model = nn.Sequential(nn.Linear(9, 9))
    small, broken = factorize(model, rank=2), dict(model.state_dict())
    broken["0.weight"] = broken["0.weight"] * float("nan")
    with pytest.raises(RuntimeError, match=r"0\.weight holds NaN or Inf: it cannot be factored"):
        small.load_state_dict(broken)
