"""Outputs are compared in training mode where a graph holds there only, and no statistics change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxexpand
from fxexpand.running.evaluation import evaluating
from fxexpand.running.outputs import outputs_of
from tests.compare import assert_same
from tests.networks import assert_untouched, snapshot

EXACT = 1e-10


class Switched(nn.Module):
    """Another function in training mode, with a sum to fold in both."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        v: Tensor = F.dropout(self.norm(x), 0.5, self.training)
        v = self.a(v) + v
        return torch.tanh(v * 2) if self.training else v


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
def test_outputs_are_compared_in_the_mode_of_the_graph(norm: bool, training: bool, batch: int) -> None:
    model = Switched(norm).double().train(training)
    x, before = torch.randn(batch, 3, dtype=torch.float64), snapshot(model)
    small: Any = fxexpand.fuse(model, x)
    assert_untouched(model, before)
    assert [row.site for row in fxexpand.report(small).changed] == ["a"]
    if not (norm and training and batch == 1):
        for each, expected in zip(outputs_of(small, x, True), outputs_of(model, x, True), strict=True):
            assert_same(each, expected, EXACT)


def test_a_wrong_graph_in_training_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxexpand.passes.fusions.fold_error", lambda *_: 0.0)
    monkeypatch.setattr(
        "fxexpand.passes.fusions.cast", lambda kernel, dtype: kernel.__class__(kernel.weight * 2)
    )
    with pytest.raises(fxexpand.VerificationError, match="outputs changed"):
        fxexpand.fuse(Switched(norm=False).double(), torch.randn(4, 3, dtype=torch.float64))


class Adaptive(nn.Module):
    """Takes the statistics of the batch, and keeps a mean of them, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return F.batch_norm(y, self.get_buffer("mean"), self.get_buffer("var"), training=True)


@pytest.mark.parametrize("change", [fxexpand.fuse, lambda model, x: fxexpand.expand(model, example_inputs=x)])
def test_statistics_that_a_kernel_writes_unseen_are_restored(change: Any) -> None:
    model, x = Adaptive(), torch.randn(2, 3, 6, 5)
    before = snapshot(model)
    change(model, x)
    with evaluating(model):
        model(x)
        assert bool(model.get_buffer("mean").any())
    assert_untouched(model, before)
