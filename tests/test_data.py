"""Data: the digits against scikit-learn's own arrays; the loaders on small data sets written here."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fxexpand.errors import SelectionError
from fxexpand.training.data import CIFAR10, Data, batches, cifar, digits, image_folders
from tests.compare import assert_same
from tests.images import write_cifar


def tensors(dataset: object) -> tuple[Tensor, ...]:
    assert isinstance(dataset, TensorDataset)
    return dataset.tensors


def test_digits_are_split_without_loss_and_standardised_by_the_training_images() -> None:
    data = digits(seed=3, train_size=500)
    (x, y), (x_test, y_test) = tensors(data.train), tensors(data.test)
    assert data.sizes == (500, 1297) and data.classes == 10
    assert x.shape == (500, 1, 8, 8) and x_test.shape == (1297, 1, 8, 8)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert abs(float(x.mean())) < 1e-6 and abs(float(x.std(correction=0)) - 1) < 1e-5

    images, labels = load_digits(return_X_y=True)
    # The standardisation is undone by the darkest and the brightest level, 0 and 16.
    joined = torch.cat([x, x_test]).flatten(1).double()
    low, high = float(joined.min()), float(joined.max())
    restored = ((joined - low) / (high - low) * 16).round().to(torch.int64)
    rows = {(*row, int(label)) for row, label in zip(restored.tolist(), torch.cat([y, y_test]), strict=True)}
    wanted = {
        (*row, int(label)) for row, label in zip(images.astype(int).tolist(), labels.tolist(), strict=True)
    }
    assert rows == {tuple(row) for row in wanted}


def test_digits_keep_the_share_of_each_class_and_depend_on_the_seed_alone() -> None:
    counts = torch.bincount(tensors(digits(0, 600).train)[1], minlength=10)
    everything = torch.from_numpy(np.bincount(load_digits().target))
    assert bool(((counts - everything * 600 / 1797).abs() <= 1).all())
    one, two, other = (tensors(digits(seed, 600).train)[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("size", [9, 1788])
def test_a_side_without_images_is_refused(size: int) -> None:
    with pytest.raises(SelectionError, match=f"train_size={size}: choose from 10 to 1787"):
        digits(0, size)


def test_batches_hold_every_image_once_and_a_seed_fixes_the_order_of_each_epoch() -> None:
    dataset = TensorDataset(torch.arange(23.0), torch.arange(23))
    one, two = batches(dataset, 5, seed=7), batches(dataset, 5, seed=7)
    epochs = [[labels.tolist() for _, labels in one] for _ in range(2)]
    assert epochs == [[labels.tolist() for _, labels in two] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert [len(labels) for labels in epochs[0]] == [5, 5, 5, 5, 3] and len(one) == 5
    assert sorted(label for labels in epochs[1] for label in labels) == list(range(23))
    plain = [(x.tolist(), y.tolist()) for x, y in batches(dataset, 10)]
    assert [label for _, y in plain for label in y] == list(range(23))
    assert all(x == y for x, y in plain)
    with pytest.raises(SelectionError, match="batch size 0"):
        batches(dataset, 0)


def test_cifar_is_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_cifar(tmp_path, monkeypatch)
    data = cifar(tmp_path)
    assert (data.name, data.sizes, data.classes) == ("CIFAR-10", (20, 4), 10)
    x, y = next(iter(batches(data.test, 4)))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in CIFAR10)
    expected = (torch.from_numpy(images[20:]).view(4, 3, 32, 32).float() / 255 - mean) / deviation
    assert_same(x, expected, 1e-6)
    assert y.tolist() == [5, 1, 2, 3]
    assert [tuple(x.shape) for x, _ in batches(data.train, 20, seed=0)] == [(20, 3, 32, 32)]


def test_a_changed_cifar_file_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(SelectionError, match="no intact copy of CIFAR-10"):
        cifar(tmp_path)
    assert not trap.exists()


def test_cifar_knows_two_sizes_and_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="choose 10 or 100"):
        cifar(tmp_path, 20)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="cifar-100-python exists"):
        cifar(tmp_path, 100)


def write_folders(root: Path, classes: dict[str, list[str]]) -> None:
    from PIL import Image

    for side, names in classes.items():
        for i, name in enumerate(names):
            folder = root / side / name
            folder.mkdir(parents=True)
            Image.new("RGB", (40, 30), (20 * i, 100, 200)).save(folder / "one.png")


def test_image_folders_are_resized_and_standardised(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    data = image_folders(tmp_path, size=16)
    assert (data.name, data.sizes, data.classes) == (tmp_path.name, (2, 2), 2)
    loader = batches(data.test, 2)
    assert isinstance(loader, DataLoader)
    x, y = next(iter(loader))
    assert x.shape == (2, 3, 16, 16) and y.tolist() == [0, 1]
    colours = torch.tensor([[0.0, 100, 200], [20, 100, 200]]) / 255
    wanted = (colours - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225))
    assert_same(x, wanted[:, :, None, None].expand_as(x), 1e-5)


def test_image_folders_must_agree(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "horse"]})
    with pytest.raises(SelectionError, match="differ in classes; 'dog' is on one side only"):
        image_folders(tmp_path)
    with pytest.raises(SelectionError, match="not laid out as train"):
        image_folders(tmp_path / "nowhere")


def test_data_without_a_length_is_an_error() -> None:
    class Stream(torch.utils.data.IterableDataset[tuple[Any, ...]]):
        def __iter__(self) -> Iterator[tuple[Any, ...]]:
            return iter(())

    with pytest.raises(SelectionError, match="Stream: a data set without a length"):
        _ = Data("stream", Stream(), Stream(), 2).sizes
