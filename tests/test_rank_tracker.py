"""Spectra over training: what is recorded, that memory is bounded, and the hooks of two trainers."""

from __future__ import annotations

import json
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand import expand
from fxexpand.errors import FxExpandError, SelectionError, UnusableWeightError
from fxexpand.lowrank.measures import effective_rank, singular_values
from fxexpand.lowrank.tracker import RankTracker
from fxexpand.recipes import Chain


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def weight(model: nn.Module, place: int) -> Tensor:
    return model.get_parameter(f"{place}.weight").detach()


def shrink(model: nn.Sequential) -> None:
    with torch.no_grad():
        weight(model, 0)[1:] *= 0.9


def test_what_is_recorded() -> None:
    model = net()
    first = float(effective_rank(weight(model, 0)))
    tracker = RankTracker(model, every=3)
    state = torch.random.get_rng_state()
    for _ in range(7):
        shrink(model)
        tracker()
    assert torch.equal(state, torch.random.get_rng_state())
    assert [step for step, _ in tracker.records] == [0, 3, 6]
    ranks = tracker.ranks()
    assert list(ranks) == ["0.weight", "2.weight"]
    assert ranks["0.weight"][0] == pytest.approx(first, rel=1e-9)
    assert ranks["0.weight"][2] < ranks["0.weight"][1] < first
    exact = singular_values(weight(model, 2))
    kept = tracker.records[-1][1]["2.weight"]
    assert kept.values == pytest.approx((exact / exact[0]).tolist())
    tracker.record()
    tracker.record()
    assert [step for step, _ in tracker.records] == [0, 3, 6, 7]


def test_memory_is_bounded_and_the_whole_training_is_kept() -> None:
    tracker = RankTracker(net(), every=1, max_records=8, max_values=3)
    for _ in range(1000):
        tracker()
    steps = [step for step, _ in tracker.records]
    assert len(steps) <= 8 and steps[0] == 0 and steps[-1] >= 1000 - tracker.every
    gaps = {b - a for a, b in pairwise(steps)}
    assert gaps == {tracker.every}
    kept = tracker.records[0][1]["0.weight"]
    assert kept.indices == (1, 3, 5) and len(kept.values) == 3 and kept.values[0] == 1.0


@pytest.mark.parametrize("most", range(2, 9))
def test_the_last_record_is_kept_whatever_the_number_of_records(most: int) -> None:
    """When the records are full, it is the trained weights that would be dropped."""
    for steps in range(40):
        tracker = RankTracker(net(), every=1, max_records=most)
        for _ in range(steps):
            tracker()
            assert len(tracker.records) <= most
        tracker.record()
        assert len(tracker.records) <= most and tracker.records[-1][0] == tracker.step == steps


def test_what_is_written_takes_one_pass_over_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks for each weight anew would be quadratic in the number of layers."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(30)))
    tracker, passes, ranks = RankTracker(model), [], RankTracker.ranks

    def counted(self: RankTracker) -> dict[str, list[float]]:
        passes.append(self)
        return ranks(self)

    monkeypatch.setattr(RankTracker, "ranks", counted)
    assert len(tracker.to_dict()["weights"]) == 30
    assert len(passes) == 1


def test_selection_and_expanded_models() -> None:
    big = expand(net(), Chain(depth=2, width=1))
    tracker = RankTracker(big, select=lambda name: name.startswith("2"))
    assert list(tracker.ranks()) == ["2.weight"]
    assert all(parameter.grad is None for parameter in big.parameters())


def test_errors() -> None:
    for option in ("every", "max_records", "max_values"):
        with pytest.raises(SelectionError, match=rf"{option}=0"):
            RankTracker(net(), **{option: 0})  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="no selected weight"):
        RankTracker(net(), select=lambda name: False)
    model = net()
    tracker = RankTracker(model, every=1)
    nn.init.constant_(weight(model, 2), float("nan"))
    with pytest.raises(UnusableWeightError, match=r"step 1: 2\.weight \(Linear\)"):
        tracker()


def test_a_layer_that_is_taken_out_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    tracker = RankTracker(model, every=1)
    model.pop(1)
    with pytest.raises(SelectionError, match=r"step 1: 1\.weight is no longer in the model"):
        tracker()
    assert len(tracker.ranks()["1.weight"]) == 1  # what was recorded can still be written


def test_a_zero_weight_is_recorded() -> None:
    model = net()
    nn.init.zeros_(weight(model, 0))
    found = RankTracker(model).records[0][1]["0.weight"]
    assert found.effective_rank == 0.0 and set(found.values) == {0.0}


def test_files(tmp_path: Path) -> None:
    model = net()
    tracker = RankTracker(model, every=1)
    for _ in range(4):
        shrink(model)
        tracker()
    written = tracker.write(tmp_path / "new")
    assert [path.name for path in written] == ["ranks.json", "ranks.svg", "spectra.svg"]
    assert all(path.stat().st_size > 500 for path in written)
    content = json.loads(written[0].read_text())
    assert content["steps"] == [0, 1, 2, 3, 4]
    assert content["weights"]["0.weight"]["effective_rank"] == tracker.ranks()["0.weight"]


def test_the_hook_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

    model = net()
    tracker = RankTracker(model, every=2)
    handler: Any = CallbackHandler(  # type: ignore[no-untyped-call]
        [tracker.transformers_callback(tmp_path)], model, None, None, None
    )
    state = TrainerState(is_world_process_zero=True)
    arguments = types.SimpleNamespace()
    handler.on_train_begin(arguments, state, TrainerControl())
    for step in (1, 2, 3, 4, 5):
        state.global_step = step
        handler.on_step_end(arguments, state, TrainerControl())
    handler.on_train_end(arguments, state, TrainerControl())
    assert [step for step, _ in tracker.records] == [0, 2, 4, 5]
    assert (tmp_path / "spectra.svg").exists()
    state = TrainerState(is_world_process_zero=False, global_step=9)
    handler.on_step_end(arguments, state, TrainerControl())
    assert tracker.records[-1][0] == 5  # other processes leave it to the first


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_the_hook_of_lightning(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against the part of Lightning's interface that the hook uses, as it need not be installed."""

    class Callback:
        pass

    for other in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, other, None)
    part: Any = types.ModuleType(name)
    part.Callback = Callback
    monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
    monkeypatch.setitem(sys.modules, name, part)
    tracker = RankTracker(net(), every=2)
    callback: Any = tracker.lightning_callback(tmp_path)
    assert issubclass(type(callback), Callback)
    for step in (1, 2, 3):
        trainer = types.SimpleNamespace(is_global_zero=True, global_step=step)
        callback.on_train_batch_end(trainer, None, outputs=None, batch=None, batch_idx=0)
    callback.on_train_end(trainer, None)
    assert [step for step, _ in tracker.records] == [0, 2, 3] and (tmp_path / "ranks.svg").exists()


def test_a_trainer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = RankTracker(net())
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FxExpandError, match="lightning is not installed"):
        tracker.lightning_callback()
    with pytest.raises(FxExpandError, match="transformers is not installed"):
        tracker.transformers_callback()
