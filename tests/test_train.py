"""``fxexpand train``: what it writes and prints, its options, and its errors: one line and an exit code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from typer.testing import CliRunner, Result

from fxexpand.cli import app
from fxexpand.lowrank import rank_report
from fxexpand.recipes import Chain, MobileOne, Recipe, RepVGG
from fxexpand.running.evaluation import evaluating
from fxexpand.surgery.expand import expand
from fxexpand.training import train as job
from fxexpand.training.data import Data, Order, loader
from fxexpand.training.demo import Digits
from fxexpand.training.options import Settings
from fxexpand.training.runs import LOG, WEIGHTS, Epoch, Outcome
from fxexpand.zoo import load_weights
from tests.compare import assert_same
from tests.images import write_cifar
from tests.test_data import write_folders

QUICK = ("--epochs", "1", "--batch-size", "300", "--recipe", "Chain(depth=2, width=1)")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, words)])


class Tiny(nn.Module):
    """An image of any size to ten classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return logits


def five() -> nn.Module:
    return Tiny(5)


def two() -> nn.Module:
    return Tiny(2)


def test_it_writes_the_fused_weights_a_log_and_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("--out", "run", *QUICK, "--ema", "0.5")
    assert result.exit_code == 0, result.stderr
    assert max(len(line) for line in result.output.splitlines()) <= 80
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and [line["step"] for line in lines] == [0, 4]
    assert lines[0]["loss"] is None and 0 < lines[1]["loss"] < 3
    assert list(lines[1]["ranks"]) == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    fresh = Digits()
    fresh.load_state_dict(load_file(tmp_path / "run" / WEIGHTS), strict=True)
    for row in rank_report(fresh).rows:  # of the average; the log has those of the network itself
        assert (
            abs(row.effective_rank - lines[1]["ranks"][row.name.removesuffix(".weight")])
            < 0.05 * row.full_rank
        )
    assert f"{lines[1]['accuracy']:.2f}" in result.stdout and "of the averaged weights" in result.stdout
    assert [line[:9] for line in result.stderr.splitlines()][-2:] == ["epoch   0", "epoch   1"]
    again = run("--out", "run", *QUICK, "--ema", "0.5", "--resume", "--json")
    found = json.loads(again.stdout)
    assert found["resumed"] == 4 and found["epochs"] == lines and found["fused_error"] < 1e-5


def test_the_steps_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    labels = torch.arange(40) % 3
    images = torch.randn(40, 3, 5, 5).double() + labels.view(-1, 1, 1, 1)
    data = Data("blobs", TensorDataset(images, labels), TensorDataset(images, labels), 3)
    model = Tiny(3).double()
    twin = expand(model, Chain(3, 2), generator=torch.Generator().manual_seed(0))
    settings = Settings(
        "m", "d", epochs=2, batch_size=8, lr=0.02, warmup=1.0, optimizer="sgd", weight_decay=0.01, clip=0.1
    )
    found = job.train(model, data, Chain(3, 2), settings, tmp_path)
    weights = [p for p in twin.parameters() if p.ndim > 1]
    others = [p for p in twin.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    losses = []
    for step in range(10):
        rate = 0.02 * (step + 1) / 6 if step < 5 else 0.01 * (1 + math.cos(math.pi * (step - 5) / 5))
        for group in optimizer.param_groups:
            group["lr"] = rate
        [rows] = list(Order(40, 8, 0).epoch(step // 5, step % 5))[:1]
        loss = cross_entropy(twin(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        losses.append(float(loss.detach()))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(ours.detach(), theirs.detach(), rel=1e-8)
    logged = [epoch.loss for epoch in found.epochs[1:]]
    for epoch in (0, 1):
        assert math.isclose(logged[epoch] or 0, sum(losses[5 * epoch : 5 * epoch + 5]) / 5, rel_tol=1e-9)
    with evaluating(twin):
        outputs = twin(images)
    assert math.isclose(found.epochs[-1].test_loss, float(cross_entropy(outputs, labels)), rel_tol=1e-6)
    assert math.isclose(found.epochs[-1].accuracy, 100 * int((outputs.argmax(1) == labels).sum()) / 40)


@pytest.mark.parametrize(
    "options",
    [
        ["--recipe", "none", "--optimizer", "sgd", "--lr", "0.1"],
        ["--recipe", "RepVGG", "--select", "conv*", "--amp", "bf16"],
        ["--recipe", "OREPA", "--select", "conv*", "--accumulate", "3", "--clip", "1"],
        ["--init", "kaiming", "--decay-on", "effective", "--weight-decay", "0.1", "--rank-every", "0"],
    ],
    ids=lambda options: " ".join(options[:2]),
)
def test_options(options: list[str], tmp_path: Path) -> None:
    result = run("--out", tmp_path, *QUICK[:4], *options, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["epochs"][1]["test_loss"] < found["epochs"][0]["test_loss"]
    assert found["fused_error"] < 2e-5 and set(found["full_ranks"]) == set(found["epochs"][1]["ranks"])
    assert (found["parameters"][0] > found["parameters"][1]) == ("none" not in options)
    state = load_file(tmp_path / WEIGHTS)
    assert set(state) == set(Digits().state_dict()) or "RepVGG" in options


@pytest.mark.parametrize("recipe", [RepVGG(), MobileOne(), Chain(2, 1, batch_norm=True)], ids=str)
def test_layers_with_biases_and_batch_norms_inside(recipe: Recipe, tmp_path: Path) -> None:
    labels = torch.arange(12) % 5
    images = TensorDataset(torch.randn(12, 3, 5, 5), labels)
    settings = Settings("m", "d", select=("conv",), epochs=2, batch_size=4, save_every=1, ema=0.5)
    data = Data("d", images, images, 5)
    found = job.train(Tiny(5), data, recipe, settings, tmp_path)
    assert found.fused_error < 1e-5 and [epoch.step for epoch in found.epochs] == [0, 3, 6]
    assert job.train(Tiny(5), data, recipe, settings, tmp_path, resume=True).resumed == 6
    Tiny(5).load_state_dict(load_file(tmp_path / WEIGHTS))


class Looked(Tiny):
    """With a table of places and a mask, as windows of attention have them."""

    places: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__(4)
        self.register_buffer("places", torch.arange(40).flip(0))
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        self.table = nn.Parameter(torch.zeros(40, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x) + self.table[self.places][:4].sum(0)
        return logits @ torch.softmax(self.mask, -1)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_an_average_leaves_places_and_masks_as_they_are(decay: float, tmp_path: Path) -> None:
    labels = torch.arange(12) % 4
    images = TensorDataset(torch.randn(12, 3, 5, 5), labels)
    settings = Settings("m", "d", epochs=2, batch_size=3, ema=decay)
    found = job.train(Looked(), Data("d", images, images, 4), None, settings, tmp_path)
    state, fresh = load_file(tmp_path / WEIGHTS), Looked()
    assert torch.equal(state["places"], fresh.places) and torch.equal(state["mask"], fresh.mask)
    assert found.fused_error == 0
    load_weights(fresh, tmp_path / WEIGHTS)


def test_cifar_and_folders_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    small = ("--epochs", "1", "--batch-size", "10", "--json")
    result = run(f"{__name__}:Tiny", "--data", "cifar10", "--root", tmp_path, "--out", tmp_path / "a", *small)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["sizes"] == [20, 4]
    write_folders(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    options = ("--data", "imagenet", "--root", tmp_path, "--out", tmp_path / "b", "--epochs", "1")
    result = run(f"{__name__}:two", *options, "--batch-size", "2", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["sizes"] == [2, 2]


def test_a_library_model_gets_as_many_outputs_as_there_are_classes() -> None:
    from fxexpand.cli.train import _network

    images = torch.randn(2, 3, 32, 32)
    data = Data(
        "four", TensorDataset(images, torch.tensor([0, 1])), TensorDataset(images, torch.tensor([0, 1])), 7
    )
    for name in ("timm:resnet10t", "torchvision:mnasnet0_5", "torchvision:squeezenet1_1"):
        model = _network(name, None, data, 0).eval()
        assert model(images).shape == (2, 7)
    assert torch.equal(*(_network("timm:resnet10t", None, data, 3).fc.weight for _ in range(2)))  # type: ignore


def test_weights_of_other_classes_get_a_new_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fxexpand.cli.train import _network

    images = TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    four, file = Data("four", images, images, 4), tmp_path / "w.pt"
    for name, head in (("timm:resnet10t", "fc"), ("torchvision:mnasnet0_5", "classifier.1")):
        for classes in (1000, 7, 4):
            given = _network(name, None, replace(four, classes=classes), 1)
            torch.save(given.state_dict(), file)
            state = _network(name, file, four, 0).state_dict()
            same = [key for key, value in given.state_dict().items() if torch.equal(state[key], value)]
            heads = set() if classes == 4 else {f"{head}.weight", f"{head}.bias"}
            assert set(state) - set(same) == heads
            assert ("the head is new" in capsys.readouterr().err) == (classes != 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_one_line(workers: int, tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    bad = tmp_path / "train" / "dog" / "bad.png"
    bad.write_bytes(b"not an image")
    options = ("--data", "imagenet", "--root", tmp_path, "--out", tmp_path / "run", "--batch-size", "3")
    result = run(f"{__name__}:two", *options, "--workers", str(workers))
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"fxexpand: {bad}: cannot be read as an image: cannot identify image file")
    assert "Traceback" not in last


def test_an_outcome_fits_eighty_columns() -> None:
    layer = "stages.0.blocks.0.a_module_with_a_name_of_many_words.projection"
    epochs: Any = tuple(
        Epoch(i, 10 * i, 0.5 if i else None, 1.0, 50.0, None, 0.1, {layer: 12.5}, 1.0) for i in range(2)
    )
    found = Outcome(
        Path("runs/x"), Settings("timm:x", "cifar10"), (5, 5), 2, "cuda:0", 10, epochs, {layer: 64},
        (10**6, 10**5), 1e-7, 10, (f"{layer}: not changed: {'a reason ' * 20}",) * 2,
    )  # fmt: skip
    assert max(map(len, str(found).splitlines())) <= 80
    assert "And 1 more." in str(found) and "resumed after step 10" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["settings"]["model"] == "timm:x"


@pytest.mark.slow
def test_a_compiled_run(tmp_path: Path) -> None:
    result = run("--out", tmp_path, *QUICK, "--accumulate", "2", "--compile", "--json")
    assert result.exit_code == 0, result.stderr
    plain = run("--out", tmp_path / "plain", *QUICK, "--json")
    one, other = (json.loads(r.stdout)["epochs"][1]["test_loss"] for r in (result, plain))
    assert abs(one - other) < 0.05 * other


def test_images_that_are_read_at_random_depend_on_their_number_alone() -> None:
    class Random(torch.utils.data.Dataset[tuple[Any, ...]]):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return torch.rand(3), i

    def read(order: list[list[int]], **options: Any) -> dict[int, Tensor]:
        found = loader(Random(), iter(order), **options)
        return {int(i): x for images, labels in found for x, i in zip(images, labels, strict=True)}

    state = torch.get_rng_state()
    one = read([[0, 1, 2], [3, 4]], seed=1, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)
    two = read([[4, 2]], seed=1, epoch=2)
    assert all(torch.equal(one[i], two[i]) for i in (2, 4)) and not torch.equal(one[2], one[4])
    assert not torch.equal(one[2], read([[2]], seed=1, epoch=3)[2])
    assert not torch.equal(one[2], read([[2]], seed=2, epoch=2)[2])


def test_an_order_is_shared_out_without_loss() -> None:
    whole = list(Order(23, 8, seed=3).epoch(1))
    assert [len(part) for part in whole] == [8, 8] and len({*whole[0], *whole[1]}) == 16
    parts = [list(Order(23, 8, 3, rank, 2, 2).epoch(1)) for rank in range(2)]
    assert [len(p) for p in parts[0]] == [2] * 4
    for step in range(2):
        mine = [i for rank in range(2) for part in parts[rank][2 * step : 2 * step + 2] for i in part]
        assert sorted(mine) == sorted(whole[step])
    assert list(Order(23, 8, 3).epoch(1, start=1)) == whole[1:]
    assert list(Order(23, 8, 3).epoch(2)) != whole != list(Order(23, 8, 4).epoch(1))
