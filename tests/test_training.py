"""Training: the loop against one written out by hand, and what it measures against first principles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.lowrank import effective_rank
from fxexpand.training.data import Batches, batches
from fxexpand.training.loop import accuracy, fit, logits
from fxexpand.training.options import Schedule
from tests.compare import assert_same


def blobs(count: int = 60) -> TensorDataset:
    labels = torch.arange(count) % 3
    centres = torch.tensor([[2.0, 0, 0, 1], [0, 2, 0, 1], [0, 0, 2, 1]])
    return TensorDataset(centres[labels] + 0.3 * torch.randn(count, 4), labels)


class Network(nn.Module):
    """Two Linear layers with a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.norm(self.first(x))))
        return result


def sides() -> tuple[TensorDataset, Batches, Batches]:
    data = blobs()
    return data, batches(data, 16, seed=1), batches(blobs(31), 10)


def test_the_steps_are_those_of_adam_on_the_cross_entropy_along_a_cosine() -> None:
    data, train, test = sides()
    model, twin = Network(), Network()
    twin.load_state_dict(model.state_dict())
    history = fit(model, train, test, Schedule(epochs=2, batch_size=16, lr=0.01, rank_every=3))

    optimizer = torch.optim.Adam(twin.parameters(), 0.01)
    losses = []
    again = batches(data, 16, seed=1)
    for step, (images, labels) in enumerate([*again, *again]):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + math.cos(math.pi * step / 8)) / 2
        loss = cross_entropy(twin(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append((float(loss.detach()), len(labels)))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(ours.detach(), theirs.detach(), 1e-5)
    for epoch in range(2):
        part = losses[4 * epoch : 4 * epoch + 4]
        assert math.isclose(history.loss[epoch], sum(v * n for v, n in part) / 60, rel_tol=1e-5)
    assert history.epoch_steps == (4, 8)
    assert history.rank_steps == (0, 3, 6, 8)


def test_ranks_are_those_of_the_weights_and_accuracy_counts() -> None:
    _, train, test = sides()
    model = Network()
    calls: list[int] = []
    start = float(effective_rank(model.first.weight.detach()))
    history = fit(
        model, train, test, Schedule(epochs=25, batch_size=16, lr=0.02), on_step=lambda: calls.append(1)
    )
    assert len(calls) == 100 == history.epoch_steps[-1]
    assert list(history.ranks) == ["first", "last"]
    assert history.ranks["first"][0] == start
    assert history.ranks["first"][-1] == float(effective_rank(model.first.weight.detach()))
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
    model = Network()
    model.first.requires_grad_(False)
    before = model.first.weight.clone()
    fit(model, train, test, Schedule(epochs=1))
    assert torch.equal(model.first.weight, before)
    with pytest.raises(FxExpandError, match=r"the loss is (nan|inf) after 4 steps. Lower lr=1e\+30"):
        fit(Network(), train, test, Schedule(epochs=2, lr=1e30))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epochs": 0}, "epochs=0"), ({"batch_size": 0}, "batch_size=0"), ({"lr": math.nan}, "lr=nan")],
)
def test_a_schedule_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Schedule(**options)  # type: ignore[arg-type]
