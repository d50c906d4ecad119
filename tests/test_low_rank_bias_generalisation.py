"""Many trainings at once are those one by one, and what the comparison of arms is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import evidence
from benchmarks.training import generalisation, image_schedules
from benchmarks.training.generalisation import ARMS, TASKS, TRIALS, Arm
from benchmarks.training.replicas import Replicas, Setting, Split
from fxexpand import Chain, expand
from fxexpand.lowrank.measures import nuclear_norm
from fxexpand.training.data import Data


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return expand(model, Chain(depth=2, width=1), init="matched", form="collapsed")


def square(outputs: Tensor, wanted: Tensor) -> Tensor:
    each: Tensor = (outputs - wanted).square().mean((1, 2))
    return each


def penalty(weight: Tensor) -> Tensor:
    return nuclear_norm(weight, batched=True)


SETTINGS = [Setting(0, 0.1), Setting(1, 0.05, strength=0.01), Setting(0, 0.02, decay=0.1)]


def test_replicas_are_trained_as_they_would_be_alone() -> None:
    data = Split(torch.randn(3, 10, 4), torch.randn(3, 10, 2))
    together = Replicas(build, SETTINGS)
    together.fit(data, square, steps=5, batch=6, penalty=penalty)
    for place, setting in enumerate(SETTINGS):
        model = build(setting.seed)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": setting.decay},
            {"params": vectors},
        ]
        optimiser = torch.optim.SGD(groups, lr=setting.rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 5)
        generator = torch.Generator().manual_seed(setting.seed)
        for _ in range(5):
            rows = torch.randperm(10, generator=generator)[:6]
            loss = (model(data.x[place, rows]) - data.y[place, rows]).square().mean()
            cost: Any = sum(nuclear_norm(p) for p in model.parameters() if p.ndim == 2)
            optimiser.zero_grad()
            torch.autograd.backward([loss + setting.strength * cost])
            optimiser.step()
            schedule.step()
        trained = together.trained()[place]
        for (name, a), (_, b) in zip(trained.named_parameters(), model.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)
        torch.testing.assert_close(together.outputs(data.x)[place], trained(data.x[place]))


def test_a_replica_that_diverges_does_not_spoil_the_others() -> None:
    data = Split(torch.randn(1, 10, 4).expand(2, -1, -1), torch.randn(1, 10, 2).expand(2, -1, -1))
    both = Replicas(build, [Setting(0, 0.1), Setting(0, 1e9)])
    both.fit(data, square, steps=6, batch=6, penalty=penalty)
    alone = Replicas(build, [Setting(0, 0.1)])
    alone.fit(Split(data.x[:1], data.y[:1]), square, steps=6, batch=6, penalty=penalty)
    assert both.dead.tolist() == [False, True]
    torch.testing.assert_close(both.outputs(data.x)[:1], alone.outputs(data.x[:1]))
    assert not bool(both.outputs(data.x)[1].any())


def test_every_arm_has_the_same_budget() -> None:
    for task in TASKS:
        for arm in ARMS:
            assert len(set(arm.trials(task.rates))) == TRIALS
    assert not set(generalisation.TUNING) & set(generalisation.SEEDS)
    assert len(generalisation.SEEDS) >= 10


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_data_of_a_task(task: generalisation.Task) -> None:
    train, validation, test = task.data(3)
    again = task.data(3)[0]
    assert torch.equal(train.x, again.x) and not torch.equal(train.x, task.data(4)[0].x)
    assert train.x.shape[1] <= 100 and test.x.shape[1] >= 1000
    flat = [split.x.flatten(2)[0] for split in (train, validation, test)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        # Some digits occur twice in the data set; a shared split would share most.
        assert (torch.cdist(flat[a], flat[b]) < 1e-6).any(1).double().mean() < 0.05


def test_a_low_rank_map_has_the_rank_it_says() -> None:
    for rank in (3, 32):
        _, _, test = generalisation.linear_data(rank, 0)
        assert int(torch.linalg.matrix_rank(test.y[0], rtol=1e-4)) == rank
        assert float(test.y.square().mean()) == pytest.approx(1.0, rel=0.25)


def test_a_row_and_its_table() -> None:
    task = TASKS[1]
    rows = [
        generalisation.measure(task, arm, 8, (100,), tuple(range(6)))
        for arm in (Arm("plain"), Arm("Chain(depth=2)", Chain(depth=2, width=1)))
    ]
    for row in rows:
        assert len(row["test"]) == len(row["train"]) == len(row["rank_share"]) == 6
        assert row["tuning"].index(max(row["tuning"])) == [
            r for r, *_ in Arm("plain").trials(task.rates)
        ].index(row["rate"])
    better = {**rows[1], "test": [v + 5.0 for v in rows[0]["test"]]}
    mixed = {**rows[1], "test": [v + (-1) ** i for i, v in enumerate(rows[0]["test"])]}
    text = generalisation.summary([rows[0], better])
    assert "better" in text and "+5.00 (+5.00..+5.00)" in text
    assert "no difference shown" in generalisation.summary([rows[0], mixed])


def test_the_published_table_is_that_of_the_saved_results() -> None:
    path = evidence.FOLDER / "results" / "generalisation.json"
    assert path.exists(), "run python -m benchmarks.generalisation"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {(row["task"], row["arm"]) for row in rows} == {(t.name, a.name) for t in TASKS for a in ARMS}
    assert generalisation.summary(rows) in generalisation.README.read_text(encoding="utf-8")


def test_images_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The long schedules in short, on images in place of CIFAR."""
    images = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    data: Any = Data("CIFAR-10", images, images, 3)
    monkeypatch.setattr(image_schedules, "load", lambda name, root: data)
    monkeypatch.setattr(image_schedules, "DEPTHS", (1, 2))
    monkeypatch.setattr(image_schedules, "DECAYS", (0.0,))
    out = tmp_path / "out.json"
    arguments = ["--data", "cifar10", "--root", str(tmp_path), "--out", str(out), "--epochs", "3"]
    arguments += ["--seeds", "1", "--model", "timm:test_resnet", "--batch", "4", "--device", "cpu"]
    assert generalisation.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["plain, decay 0", "Chain(depth=2, width=1), decay 0"]
    assert all(0 <= row["test"] <= 100 and 0 < row["rank_share"] <= 1 for row in rows)
    assert "Chain(depth=2, width=1)" in capsys.readouterr().out
    monkeypatch.setattr(image_schedules, "train", lambda *_: pytest.fail("run again"))
    assert generalisation.main(arguments) == 0
