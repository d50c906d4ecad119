"""Training: the loop against one written out by hand, and what it measures against first principles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fxexpand.data import Batches, batches
from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.rank import effective_rank
from fxexpand.training import Schedule, accuracy, fit, logits
from tests.compare import assert_same


def blobs(count: int = 60) -> TensorDataset:
    labels = torch.arange(count) % 3
    centres = torch.tensor([[2.0, 0, 0, 1], [0, 2, 0, 1], [0, 0, 2, 1]])
    return TensorDataset(centres[labels] + 0.3 * torch.randn(count, 4), labels)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def sides() -> tuple[TensorDataset, Batches, Batches]:
    data = blobs()
    return data, batches(data, 16, seed=1), batches(blobs(31), 10)


def test_the_steps_are_those_of_adam_on_the_cross_entropy_along_a_cosine() -> None:
    data, train, test = sides()
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    history = fit(model, train, test, Schedule(epochs=2, batch_size=16, lr=0.01, rank_every=3))

    optimizer = torch.optim.Adam(twin.parameters(), 0.01)
    step, losses = 0, []
    for images, labels in [pair for epoch in batches_of_two_epochs(data) for pair in epoch]:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + math.cos(math.pi * step / 8)) / 2
        loss = cross_entropy(twin(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        losses.append((float(loss.detach()), len(labels)))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(ours.detach(), theirs.detach(), 1e-5)
    for epoch in range(2):
        part = losses[4 * epoch : 4 * epoch + 4]
        assert math.isclose(history.loss[epoch], sum(v * n for v, n in part) / 60, rel_tol=1e-5)
    assert history.epoch_steps == (4, 8)
    assert history.rank_steps == (0, 3, 6, 8)


def batches_of_two_epochs(data: TensorDataset) -> list[list[tuple[Tensor, Tensor]]]:
    again = batches(data, 16, seed=1)
    return [list(again), list(again)]


def test_ranks_are_those_of_the_weights_and_accuracy_counts() -> None:
    _, train, test = sides()
    model = network()
    calls: list[int] = []
    start = float(effective_rank(model[0].weight.detach()))
    history = fit(model, train, test, Schedule(epochs=25, batch_size=16), on_step=lambda: calls.append(1))
    assert len(calls) == 100 == history.epoch_steps[-1]
    assert list(history.ranks) == ["0", "3"]
    assert history.ranks["0"][0] == start
    assert history.ranks["0"][-1] == float(effective_rank(model[0].weight.detach()))
    assert all(len(values) == len(history.rank_steps) for values in history.ranks.values())
    assert history.rank_steps[-1] == 100
    assert history.loss[-1] < 0.5 * history.loss[0] and history.step_ms > 0

    model.eval()
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    with torch.no_grad():
        expected = model(images)
    assert_same(logits(model, test), expected, 1e-6)
    right = int((expected.argmax(1) == labels).sum())
    assert math.isclose(history.test_accuracy[-1], 100 * right / 31)
    assert history.test_accuracy[-1] > 90
    assert math.isclose(history.train_accuracy, accuracy(model, train))


def test_frozen_parameters_stay_and_divergence_is_an_error() -> None:
    _, train, test = sides()
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, train, test, Schedule(epochs=1))
    assert torch.equal(model[0].weight, before)
    with pytest.raises(FxExpandError, match=r"the loss is (nan|inf) after 4 steps. Lower lr=1e\+30"):
        fit(network(), train, test, Schedule(epochs=2, lr=1e30))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epochs": 0}, "epochs=0"), ({"batch_size": 0}, "batch_size=0"), ({"lr": math.nan}, "lr=nan")],
)
def test_a_schedule_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Schedule(**options)  # type: ignore[arg-type]
