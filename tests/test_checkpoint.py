"""Checkpoints: whole or not there, read back bit for bit, and nothing in them is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_saver

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.recipes import RepVGG
from fxexpand.surgery.expand import expand
from fxexpand.training import checkpoint
from fxexpand.training.checkpoint import latest, load, restore, save, states, values_of, whole_state
from tests.networks import ConvNet, Language, train_steps

TENSORS = {
    "a": torch.randn(3, 4),
    "scalar": torch.tensor(7),
    "half": torch.randn(5).half(),
    "strided": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "bytes": torch.get_rng_state(),
}


def test_tensors_and_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "new", 12, TENSORS, {"lr": 0.1 + 0.2, "names": ["x"]})
    assert latest(tmp_path / "new") == path and path.name == "step-000000012"
    assert values_of(path) == {"lr": 0.1 + 0.2, "names": ["x"]}
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    assert load(path, found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor) and found[name].stride() == tensor.stride()
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_one_checkpoint_is_kept_and_an_unfinished_one_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 1, TENSORS, {})
    (tmp_path / ".step-000000009.unfinished").mkdir()
    first = latest(tmp_path)
    assert first is not None and first.name == "step-000000001"
    save(tmp_path, 10, TENSORS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000010"]
    save(tmp_path, 10, TENSORS, {"again": 1})
    newest = latest(tmp_path)
    assert newest is not None and values_of(newest) == {"again": 1}
    assert latest(tmp_path / "nowhere") is None


def test_folders_of_the_user_are_neither_read_nor_deleted(tmp_path: Path) -> None:
    save(tmp_path, 2, TENSORS, {"which": "kept"})
    (tmp_path / "step-000000002").rename(tmp_path / "step-000000002-keep")
    for name in ("step-old", "step-9", "step-000000009.backup"):
        (tmp_path / name).mkdir()
    path = save(tmp_path, 3, TENSORS, {})
    assert latest(tmp_path) == path == tmp_path / "step-000000003"
    own = {"step-000000002-keep", "step-old", "step-9", "step-000000009.backup"}
    assert {each.name for each in tmp_path.iterdir()} == own | {"step-000000003"}
    assert values_of(tmp_path / "step-000000002-keep") == {"which": "kept"}
    far = save(tmp_path, 10**9, TENSORS, {})  # of ten digits
    assert latest(tmp_path) == far and save(tmp_path, 4, TENSORS, {}) == latest(tmp_path)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("moment", range(4))
def test_at_any_moment_there_is_a_whole_one(
    step: int, moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before any of the moves; the next one saves again."""
    save(tmp_path, 1, TENSORS, {"which": "old"})
    move, left = Path.rename, [moment]

    def stopping(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return move(path, target)

    monkeypatch.setattr(Path, "rename", stopping)
    with contextlib.suppress(KeyboardInterrupt):
        save(tmp_path, step, TENSORS, {"which": "new"})
    monkeypatch.undo()
    found = latest(tmp_path)
    assert found is not None and values_of(found)["which"] in ("old", "new")
    assert load(found, {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}) == set(TENSORS)
    path = save(tmp_path, step, TENSORS, {"which": "newest"})
    assert list(tmp_path.iterdir()) == [path] and values_of(path) == {"which": "newest"}


def test_values_come_back_as_they_were_or_are_refused_with_their_path(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "numbers": [0.1, 1e300, -0.0, 2**70, True, None, math.inf],
        "text": "é\ud800\x1b",
        "inner": {"": {}, "list": [[]]},
    }
    path = save(tmp_path, 1, {}, {**values, "nan": math.nan})
    found = values_of(path)
    assert math.isnan(found.pop("nan")) and repr(found) == repr(values)
    for value, where in (
        ({"a": [1, (2, 3)]}, r"values\['a'\]\[1\]: not JSON: tuple"),
        ({"a": {"b": {3: 1}}}, r"values\['a'\]\['b'\]\[3\]: not JSON: a key"),
        ({"a": {1, 2}}, r"values\['a'\]: not JSON: set"),
        ({"a": np.float64(1)}, r"values\['a'\]: not JSON: float64"),
    ):
        with pytest.raises(TypeError, match=where):
            save(tmp_path, 2, TENSORS, value)
        assert latest(tmp_path) == path


def test_an_error_while_writing_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, 1, TENSORS, {"which": "old"})
    before = list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="not JSON"):
        save(tmp_path, 2, TENSORS, {"a tensor": torch.ones(1)})
    assert list(tmp_path.iterdir()) == before

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_dict_saver, "save", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, TENSORS, {})
    assert latest(tmp_path) == old
    monkeypatch.undo()
    monkeypatch.setattr("safetensors.torch.save", full)
    for step in (1, 2):
        with pytest.raises(
            FxExpandError, match=rf"step-00000000{step}: was not written: \[Errno 28\] No space"
        ):
            save(tmp_path, step, TENSORS, {})
        assert latest(tmp_path) == old and values_of(str(old)) == {"which": "old"}
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, TENSORS, {})
    assert latest(tmp_path) == old


def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"model.a": torch.ones(2), "model.b": torch.ones(3)}, {})
    target = {"model.a": torch.zeros(2)}
    with pytest.raises(SelectionError, match=r"of another model: 'model.b' is only there\.$"):
        load(path, target)
    with pytest.raises(SelectionError, match=r"'model.c' is missing there \(1 more names differ\)"):
        load(
            path, {**target, "model.c": torch.zeros(1), "model.b": torch.zeros(3), "model.d": torch.zeros(1)}
        )
    with pytest.raises(SelectionError, match=r"'model.b' is \(3,\) there, and \(4,\) here"):
        load(path, {**target, "model.b": torch.zeros(4)})
    assert float(target["model.a"].sum()) == 0
    assert load(path, target, optional=["model.b"]) == {"model.a"} and float(target["model.a"].sum()) == 2


def test_damaged_files_are_an_error_of_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, 1, TENSORS, {})
    [file] = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SelectionError, match="cannot be read"):
        load(path, dict(TENSORS))
    for text in ("{", "5", "null", '"x"', "[]", "[" * 100_000, "\\ud8"):
        (path / checkpoint.VALUES).write_text(text)
        with pytest.raises(SelectionError, match="not a checkpoint of a training run"):
            values_of(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1, TENSORS, {})
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    for name in (".metadata", "values.pkl", "__0_0.distcp"):
        (path / name).write_bytes(pickle.dumps(Trap()))
    load(path, {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})
    assert not trap.exists()


@pytest.mark.parametrize(
    ("make", "x"), [(ConvNet, torch.randn(2, 3, 10, 7)), (Language, torch.ones(2, 5).long())]
)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_model_and_its_optimizer_go_on_from_where_they_were(
    make: Any, x: torch.Tensor, optimizer: Any, tmp_path: Path
) -> None:
    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = expand(make()).train()
        options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        return model, optimizer(model.parameters(), lr=0.01, weight_decay=0.1, **options)

    def step(model: nn.Module, stepper: torch.optim.Optimizer) -> None:
        stepper.zero_grad()
        model(x).square().mean().backward()
        stepper.step()

    model, stepper = built()
    step(model, stepper)
    step(model, stepper)
    path = save(tmp_path, 2, states(model, stepper), {})
    twin, other = built()
    other.param_groups[0]["lr"] = 0.02  # belongs to the run, not to the checkpoint
    tensors = states(twin, other)
    load(path, tensors)
    restore(tensors, twin, other)
    assert other.param_groups[0]["lr"] == 0.02
    other.param_groups[0]["lr"] = 0.01
    for _ in range(2):
        step(model, stepper)
        step(twin, other)
    ours, theirs = whole_state(twin), whole_state(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads(json.dumps(list(ours))) == list(model.state_dict())


def test_a_layer_with_a_bias_and_batch_norms_inside_goes_on_in_training_mode(tmp_path: Path) -> None:
    """It has no effective bias then, and torch reads the attribute of every name in a state dict."""

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = expand(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), RepVGG()).train()
        model[0].bias = nn.Parameter(torch.ones(4))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    x = torch.randn(4, 3, 5, 5)
    model, stepper = built()
    model(x).square().mean().backward()
    stepper.step()
    found = states(model, stepper)
    assert torch.equal(found["model.0.bias"], model[0]._parameters["bias"])  # type: ignore[index]
    path = save(tmp_path, 1, found, {})
    twin, other = built()
    tensors = states(twin, other)
    load(path, tensors)
    restore(tensors, twin, other)
    assert torch.equal(twin(x), model(x)) and list(whole_state(twin)) == list(model.state_dict())
    twin.eval()
    model.eval()
    assert torch.equal(twin[0].bias, model[0].bias)  # type: ignore[index]  # with what the BatchNorms add
    assert not torch.equal(model[0].bias, model[0]._parameters["bias"])  # type: ignore[index]


def test_a_shared_weight_is_written_once_and_stays_shared(tmp_path: Path) -> None:
    model = Language()
    train_steps(model, torch.ones(2, 5).long())
    found = states(model)
    assert "model.tokens.weight" in found and "model.head.weight" not in found
    path = save(tmp_path, 1, found, {})
    twin = Language()
    tensors = states(twin)
    load(path, tensors)
    restore(tensors, twin)
    assert twin.head.weight is twin.tokens.weight and torch.equal(twin.head.weight, model.head.weight)
