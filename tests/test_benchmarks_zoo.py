"""The sweep over the zoo, on tiny networks: what a row holds, what makes it fail, what survives a kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import evidence
from benchmarks.journey import elsewhere, train, training_state
from benchmarks.processes import DIED, FULL, LATE, rows_of
from benchmarks.shorten import shorten
from benchmarks.zoo import row as zoo_row
from benchmarks.zoo import sweep as zoo
from benchmarks.zoo.cases import LARGE
from benchmarks.zoo.models import Entry
from benchmarks.zoo.names import chosen, file_of, in_order, quick
from benchmarks.zoo.summary import summary
from benchmarks.zoo.vision import vision
from fxexpand import expand, fuse

TINY = Entry("timm", "test_vit")


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return zoo_row.measure(TINY)


def test_a_good_network_is_a_good_row(row: dict[str, Any]) -> None:
    assert row["failures"] == [] and row["traced"] == "whole"
    assert row["sites"] >= row["covered"] == row["weights"] > 20
    for key in ("expand_error", "train_error", "also_error", "round_trip_error", "fuse_error"):
        assert 0 < row[key] <= 1e-10, key
    assert row["flops"][0] == row["flops"][1] > 0 and row["nodes"][1] <= row["nodes"][0]
    assert len(row["losses"]) == 3


def test_each_promise_can_fail(row: dict[str, Any]) -> None:
    broken: dict[str, Any] = {
        "expand_error": 1e-9,
        "train_error": float("nan"),
        "also_error": 1e-9,
        "round_trip_error": 1e-9,
        "fuse_error": 1e-9,
        "losses": [float("nan")],
        "missed": ["head.weight"],
        "same_class": False,
        "same_state": False,
        "same_flops": False,
        "alive": False,
        "flops": [1, 2],
        "nodes": [1, 2],
    }
    for key, value in broken.items():
        assert len(zoo_row.failures({**row, key: value})) == 1, key


@pytest.mark.parametrize("step", ["expand", "fuse"])
def test_a_step_that_changes_the_network_is_a_failure(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = {"expand": expand, "fuse": fuse}[step]

    def slightly_wrong(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        result: nn.Module = real(model, *args, **options)
        with torch.no_grad():
            next(p for name, p in result.named_parameters() if "mlp.fc1" in name).mul_(1.001)
        return result

    monkeypatch.setattr(zoo_row, step, slightly_wrong)
    found = zoo_row.measure(TINY)["failures"]
    assert any(
        failure.startswith("expand: error" if step == "expand" else "fuse: error") for failure in found
    )


def test_a_layer_without_a_site_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def partly(model: nn.Module, recipe: Any, **options: Any) -> nn.Module:
        return expand(model, recipe, select=lambda name, _: name != "head", **options)

    monkeypatch.setattr(zoo_row, "expand", partly)
    row = zoo_row.measure(TINY)
    assert row["missed"] == ["head.weight"] and row["covered"] == row["weights"] - 1
    assert row["failures"] == ["neither changed nor refused: head.weight"]


class Switching(nn.Module):
    """Reads its training flag, drops, and keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.aux = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.drop(self.norm(x))
        return [y, self.aux(y)] if self.training else [y]


def test_the_training_state_tells_a_frozen_network_apart() -> None:
    model, x = Switching().eval(), torch.randn(6, 4)
    found = training_state(model, x)
    assert len(found) == 2 + 3 and int(found[-1]) == 1
    assert not model.training and int(model.norm.num_batches_tracked or 0) == 0
    assert all(torch.equal(a, b) for a, b in zip(found, training_state(model, x), strict=True))
    model.drop.p = 0.0
    assert not torch.equal(training_state(model, x)[0], found[0])


def test_training_takes_several_outputs_and_notices_what_does_not_train() -> None:
    losses = train(Switching(), torch.randn(6, 4))
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    idle = nn.Sequential(nn.Linear(4, 4))
    for name in "abc":
        idle.register_parameter(name, nn.Parameter(torch.zeros(1)))  # more parameters stay than move
    assert math.isnan(train(idle, torch.randn(6, 4))[0])


def test_other_inputs_have_the_same_form() -> None:
    picture = torch.arange(6.0).reshape(1, 2, 3)
    flipped: Any = elsewhere(([picture], {"boxes": 1}))
    assert torch.equal(flipped[0][0], picture.flip(-1)) and flipped[1] == {"boxes": 1}
    assert torch.equal(elsewhere({"x": picture})["x"], picture.flip(-1))  # type: ignore[index, call-overload]


def test_shortening_cuts_runs_of_equal_blocks_only() -> None:
    def block(width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU())

    head = nn.Linear(4, 2)
    model = nn.Sequential(nn.Linear(4, 4), block(), block(), block(), nn.ReLU(), nn.ReLU(), block(), head)
    assert shorten(model, 2) == (2, 3)
    assert len(model) == 7 and model[-1] is head and list(model._modules) == [str(i) for i in range(7)]
    assert model(torch.randn(3, 4)).shape == (3, 2)
    assert shorten(nn.ModuleList([block(4), block(5), block(4)]), 1) == (0, 0)
    counted = nn.Sequential(OrderedDict((f"block_{i}", block(4)) for i in range(1, 5)))
    assert shorten(counted, 2) == (2, 4) and list(counted._modules) == ["block_1", "block_2"]
    named = nn.Sequential(OrderedDict(inner=block(4), outer=block(4)))
    assert shorten(named, 1) == (0, 0)


def test_large_networks_are_short_and_small_ones_whole() -> None:
    small, large = TINY.case(), Entry("timm", "vit_base_patch16_224").case()
    assert small.cut == "" and small.size == "64"
    kept, total = map(int, large.cut.split("/"))
    assert total == 12 and kept in (1, 2)
    with torch.device("meta"):
        model = large.build()
    assert sum(p.numel() for p in model.parameters()) <= LARGE


@pytest.mark.parametrize(
    "name",
    ["vgg11", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "raft_small", "r3d_18", "fcn_resnet50"],
)
def test_networks_of_torchvision_get_inputs_of_their_kind(name: str) -> None:
    case = vision(name)
    if name == "vgg11":
        with torch.device("meta"):
            assert sum(p.numel() for p in case.build().parameters()) < LARGE
    elif name == "raft_small":
        assert set(case.inputs) == {"image1", "image2", "num_flow_updates"}
    elif "rcnn" in name:
        assert len(case.inputs) == 1 and isinstance(case.training, tuple)
        targets = case.training[1]
        assert ("masks" if "mask" in name else "keypoints") in targets[0]
        assert all(torch.is_tensor(value) for value in targets[0].values())
    else:
        assert isinstance(case.inputs, Tensor) and case.inputs.ndim == (5 if name == "r3d_18" else 4)


def _row(item: str) -> dict[str, Any]:
    if item == "dies":
        os._exit(1)
    if item == "hangs":
        time.sleep(600)
    if item == "fills":
        torch.ones(10**9, dtype=torch.float64)
    if item == "raises":
        raise ValueError("no such thing")
    return {"name": item, "failures": []}


def test_what_goes_wrong_in_a_process_is_a_row() -> None:
    items = ["good", "dies", "fills", "raises", "hangs", "last"]
    found = {row["name"]: row for row in rows_of(_row, items, jobs=1, timeout=4.0, memory=2.0)}
    assert found["good"]["failures"] == found["last"]["failures"] == []
    assert found["dies"]["failures"] == [DIED] and found["hangs"]["failures"] == [LATE]
    assert found["fills"]["failures"] == [FULL]
    assert found["raises"]["failures"] == ["ValueError: no such thing"]
    assert all(row["seconds"] >= 0 for row in found.values())


def test_a_killed_sweep_goes_on(
    row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def rows(measure: Any, entries: Any, **options: Any) -> Any:
        assert options["jobs"] == 1 and options["memory"] == 2.0
        for entry in entries:
            asked.append(str(entry))
            yield {**row, "name": str(entry), "failures": ["broken"] if "resnet" in str(entry) else []}

    monkeypatch.setattr(zoo, "rows_of", rows)
    out = tmp_path / "zoo.jsonl"
    options = ["--out", str(out), "--workers", "1", "--memory", "2"]
    assert zoo.main(["test_vit", "timm:test_resnet", *options]) == 1
    assert sorted(zoo.read(out)[1]) == ["timm:test_resnet", "timm:test_vit"]
    assert not zoo.journal_of(out).exists()
    zoo.journal_of(out).write_text('{"name": "timm:test_convn')  # killed while it wrote
    assert zoo.main(["test_vit", "test_resnet", "test_convnext", *options]) == 1
    assert asked == ["timm:test_vit", "timm:test_resnet", "timm:test_convnext"]
    assert zoo.main(["test_vit", *options]) == 0 and len(asked) == 3
    zoo.main(["test_vit", "test_resnet", "--failed", *options])
    assert zoo.main(["--failed", *options]) == 1  # all that failed
    assert asked[3:] == ["timm:test_resnet", "timm:test_resnet"]
    about, written = zoo.read(out)
    assert about["version"] == 1 and about["machine"]["torch"] == str(torch.__version__)
    assert sorted(written) == ["timm:test_convnext", "timm:test_resnet", "timm:test_vit"]
    assert [json.loads(line).get("name") for line in out.read_text().splitlines()[1:]] == sorted(written)
    assert "3 of 98 files" in capsys.readouterr().out


def test_written_rows_are_small(row: dict[str, Any]) -> None:
    line = zoo.slim({**row, "expand_error": 1.23456e-15, "train_error": 0.0})
    assert line["expand_error"] == 1.2e-15 and line["train_error"] == 0.0
    assert not {"losses", "same_class", "alive", "missed"} & line.keys()
    assert len(json.dumps(line)) < 500


def test_the_summary_counts_and_names(row: dict[str, Any]) -> None:
    late = {"name": "timm:test_resnet", "failures": [LATE], "seconds": 600.0}
    wrong = {**row, "name": "timm:test_vit2", "failures": ["fuse: error 2e-03"], "refused": {"a reason": 2}}
    text = summary([row, late, wrong])
    line = next(line.split() for line in text.splitlines() if line.startswith("timm "))
    assert line[:4] == ["timm", "3", str(len(in_order("timm"))), "1"]
    assert line[5] == f"{2 * row['covered']}/{2 * row['weights']}"
    assert "2 of 98 files" in text
    assert any(LATE in line and "timm:test_resnet" in line for line in text.splitlines())
    assert any("a reason" in line and "timm:test_vit2" in line for line in text.splitlines())


def test_the_order_and_the_names() -> None:
    names = [entry.name for entry in in_order("timm")]
    files = [file_of(name) for name in names]
    assert (
        len(set(names)) == len(names) > 1300 and len(set(files[: len(set(files))])) == len(set(files)) >= 98
    )
    assert chosen(["timm:test_vit", "resnet18"])[:2] == [TINY, Entry("timm", "resnet18")]
    assert Entry("torchvision", "resnet18") in chosen(["resnet18"])
    with pytest.raises(LookupError, match="no_such"):
        chosen(["no_such"])
    assert len(quick()) == 60


def test_the_published_table_is_that_of_the_saved_results() -> None:
    about, rows = zoo.read(zoo.OUT)
    page = evidence.README.read_text(encoding="utf-8")
    assert summary(list(rows.values())) in page
    assert evidence.headline(about["machine"]) in page
    assert zoo.OUT.stat().st_size < 400_000
