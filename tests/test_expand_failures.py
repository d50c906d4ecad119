"""A failure at any point of ``expand`` and ``fuse`` leaves the network bit for bit as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand import Chain, UnusableWeightError, expand
from fxexpand.layers.expanded import Expanded
from fxexpand.passes import expand as expanding
from tests.compare import assert_same
from tests.networks import ConvNet, assert_untouched, snapshot
from tests.test_hard_cases import X


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_that_changes_nothing(value: float) -> None:
    model = ConvNet()
    with torch.no_grad():
        model.dilated.weight[1, 2, 0, 1] = value
    before = snapshot(model)
    with pytest.raises(UnusableWeightError, match=r"^dilated\.weight \(Conv2d 12->6 .*NaN or Inf"):
        expand(model, inplace=True)
    assert_untouched(model, before)
    big = expand(model, select=lambda name, _: name != "dilated")
    assert not isinstance(big.dilated, Expanded) and isinstance(big.stem, Expanded)


def test_a_failure_at_any_point_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(
        nn.Linear(6, 5), nn.MultiheadAttention(5, 1), nn.Linear(5, 4), nn.LSTM(4, 3)
    ).double()
    before = snapshot(model)
    original: Any = vars(expanding)["expand_weight"]
    calls: list[int] = []

    def failing(*args: Any) -> None:
        calls.append(1)
        original(*args)
        if len(calls) == 2:
            raise MemoryError("no room")

    monkeypatch.setattr(expanding, "expand_weight", failing)
    with pytest.raises(MemoryError):
        expand(model, inplace=True)
    assert len(calls) == 2
    assert_untouched(model, before)
    monkeypatch.undo()
    y = torch.randn(2, 4, dtype=torch.float64)
    expected = model[3](y)[0]
    assert_same(expand(model, inplace=True)[3](y)[0], expected, rel=1e-10)


def test_outputs_that_change_are_an_error_that_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    before = snapshot(model)

    def wrong(self: Chain, *args: Any, **options: Any) -> list[Tensor]:
        return [weight * 1.001 for weight in original(self, *args, **options)]

    original = Chain._preserving
    monkeypatch.setattr(Chain, "_preserving", wrong)
    with pytest.raises(
        fxexpand.VerificationError, match=r"^0: the rewritten site differs by a relative 0\.003"
    ):
        expand(model, inplace=True)
    monkeypatch.setattr(expanding, "require_small", lambda error, *_: error)
    with pytest.raises(fxexpand.VerificationError, match="outputs changed"):
        expand(model, inplace=True, example_inputs=X)
    assert_untouched(model, before)
