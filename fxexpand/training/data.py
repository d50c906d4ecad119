"""Images and labels to train on: scikit-learn's digits, and data sets that are on the disk already.

Nothing is downloaded. Images are ``(channels, height, width)``, standardised with the statistics named below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.zoo import required

# Per channel (red, green, blue), of the training images scaled to [0, 1].
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False)
class Data:
    """A training set and a test set of ``(image, label)`` pairs; labels are below ``classes``."""

    name: str
    train: Dataset[tuple[Any, ...]]
    test: Dataset[tuple[Any, ...]]
    classes: int

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of training and of test images."""
        return _length(self.train), _length(self.test)


class Batches(Protocol):
    """Batches of images and labels; iterating once more gives the next epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


def digits(seed: int = 0, train_size: int = 600) -> Data:
    """The 1797 handwritten digits that come with scikit-learn: ``(1, 8, 8)`` images of 10 classes.

    A split drawn with ``seed`` that keeps the share of every class; all images are standardised with the
    mean and the standard deviation of the training images.

    Raises: SelectionError: fewer than 10 images on either side, or more than there are.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    if not 10 <= train_size <= len(labels) - 10:
        raise SelectionError(f"train_size={train_size}: choose from 10 to {len(labels) - 10} digits.")
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, train_size=train_size, stratify=labels, random_state=seed
    )
    mean, deviation = x_train.mean(), x_train.std()

    def side(x: Any, y: Any) -> TensorDataset:
        standardised = torch.from_numpy((x - mean) / deviation).float()
        return TensorDataset(standardised.view(-1, 1, 8, 8), torch.from_numpy(y).long())

    return Data("scikit-learn digits", side(x_train, y_train), side(x_test, y_test), classes=10)


def cifar(root: str | Path, classes: Literal[10, 100] = 10) -> Data:
    """CIFAR-10 or CIFAR-100 in ``root``, in the python version that torchvision reads: ``(3, 32, 32)``.

    That version holds pickles. torchvision reads only the published files: it compares their MD5 sums first,
    so a file that somebody else wrote is refused before it is opened.
    Training images are flipped and shifted by up to 4 pixels at random.

    Raises:
        SelectionError: ``root`` holds no intact copy, or ``classes`` is neither 10 nor 100.
        FxExpandError: torchvision is not installed.
    """
    vision = required("torchvision")
    t = vision.transforms
    if classes not in (10, 100):
        raise SelectionError(f"cifar: classes={classes}: choose 10 or 100.")
    kind, statistics = (
        (vision.datasets.CIFAR10, CIFAR10) if classes == 10 else (vision.datasets.CIFAR100, CIFAR100)
    )
    tail = [t.ToTensor(), t.Normalize(*statistics)]
    head = [t.RandomCrop(32, padding=4), t.RandomHorizontalFlip()]
    try:
        train = kind(root, train=True, download=False, transform=t.Compose(head + tail))
        test = kind(root, train=False, download=False, transform=t.Compose(tail))
    except RuntimeError as error:
        raise SelectionError(
            f"{root}: no intact copy of CIFAR-{classes} (python version). "
            f"Unpack the published archive there, so that {Path(root) / kind.base_folder} exists."
        ) from error
    return Data(f"CIFAR-{classes}", train, test, classes)


def image_folders(root: str | Path, size: int = 224) -> Data:
    """ImageNet or any data set laid out like it: ``root/train/<class>/*`` and ``root/val/<class>/*``.

    Training images are cropped at random (8 % to 100 % of the area) and flipped; test images are resized to
    ``size * 256 / 224`` and cropped in the middle, as everywhere in the literature.

    Raises:
        SelectionError: a folder or an image is missing, or the two sides have different classes.
        FxExpandError: torchvision is not installed. Later, where an image cannot be read, its name.
    """
    vision = required("torchvision")
    t = vision.transforms
    tail = [t.ToTensor(), t.Normalize(*IMAGENET)]
    head = {
        "train": [t.RandomResizedCrop(size), t.RandomHorizontalFlip()],
        "val": [t.Resize(round(size * 256 / 224)), t.CenterCrop(size)],
    }
    try:
        train, test = (
            vision.datasets.ImageFolder(Path(root) / side, t.Compose(head[side] + tail), loader=_image)
            for side in ("train", "val")
        )
    except FileNotFoundError as error:
        raise SelectionError(f"{root}: not laid out as train/<class>/* and val/<class>/*: {error}") from error
    if train.classes != test.classes:
        name = sorted(set(train.classes) ^ set(test.classes))[0]
        raise SelectionError(f"{root}: train and val differ in classes; {name!r} is on one side only.")
    return Data(Path(root).resolve().name, train, test, len(train.classes))


def _image(path: str) -> Any:
    """The image at ``path``; errors of PIL do not always name the file."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:  # PIL's have no class in common
        raise FxExpandError(f"{path}: cannot be read as an image: {error}") from error


def batches(
    dataset: Dataset[tuple[Any, ...]], size: int, *, seed: int | None = None, workers: int = 0
) -> Batches:
    """``dataset`` in batches of ``size``; the last one may be smaller.

    Args:
        seed: of the order, a new one each epoch; two sets of batches with one seed have the same order in
            each epoch. None keeps the data set's own order.
        workers: processes that read the images; a data set in memory needs none.

    Raises: SelectionError: ``size`` is below 1.
    """
    if size < 1:
        raise SelectionError(f"batch size {size}: choose 1 or more.")
    if isinstance(dataset, TensorDataset):
        images, labels = dataset.tensors
        return InMemory(images, labels, size, seed)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shuffle = seed is not None
    return DataLoader(dataset, size, shuffle=shuffle, generator=generator, num_workers=workers)


class InMemory:
    """Batches cut from two tensors by index: a tenth of the time a DataLoader takes to collate them."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int | None) -> None:
        self.images, self.labels, self.size = images, labels, size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.labels))
        if self.generator is not None:
            order = torch.randperm(len(order), generator=self.generator)
        for rows in torch.split(order.to(self.labels.device), self.size):
            yield self.images[rows], self.labels[rows]


@dataclass(frozen=True)
class Order:
    """The images of each step and process; the seed decides them, for any number of processes.

    A step takes ``batch_size`` images of the epoch's permutation; each process takes its share of them, in
    ``micro_batches`` equal parts. An epoch leaves out the images that do not fill a batch.

    Attributes:
        count: images in the data set.
        rank, world: number of the process, and how many there are.

    Raises: SelectionError: a batch that is larger than the data set, or cannot be shared out equally.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.count:
            raise SelectionError(f"batch size {self.batch_size}: choose from 1 to {self.count} images.")
        parts = self.world * self.micro_batches
        if self.batch_size % parts:
            raise SelectionError(
                f"batch size {self.batch_size}: choose a multiple of {parts}, as there are "
                f"{self.world} x {self.micro_batches} processes and micro-batches."
            )

    @property
    def steps(self) -> int:
        """The number of steps of an epoch."""
        return self.count // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """The numbers of the images of each micro-batch, from step ``start`` on."""
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator)[: self.steps * self.batch_size]
        for step in order.view(self.steps, self.batch_size)[start:]:
            for part in step[self.rank :: self.world].chunk(self.micro_batches):
                yield part.tolist()


def loader(
    dataset: Dataset[tuple[Any, ...]],
    order: Iterable[list[int]],
    *,
    seed: int = 0,
    epoch: int = 0,
    workers: int = 0,
    pinned: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of each list of numbers.

    Random crops and flips depend on ``seed``, ``epoch`` and the number of the image alone: not on the images
    before it, nor on the process that reads it. So a run that is resumed in the middle of an epoch, or on
    another number of processes, sees the same images.

    Args:
        workers: processes that read; a data set in memory needs none.
        pinned: into memory from which a GPU copies without waiting.
    """
    if isinstance(dataset, TensorDataset):
        images, labels = dataset.tensors
        for rows in order:
            yield images[rows], labels[rows]
        return
    yield from DataLoader(
        _Settled(dataset, seed, epoch),
        batch_sampler=list(order),
        num_workers=workers,
        pin_memory=pinned,
        generator=torch.Generator().manual_seed(0),  # the global one is the model's
    )


class _Settled(Dataset[tuple[Any, ...]]):
    """A data set with its own random numbers for each image."""

    def __init__(self, dataset: Dataset[tuple[Any, ...]], seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would reset the generators of all GPUs too.
            torch.default_generator.manual_seed(_mixed(self.seed, self.epoch, number))
            return self.dataset[number]


def _mixed(*numbers: int) -> int:
    """A seed of 63 bits from several numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _length(dataset: Dataset[tuple[Any, ...]]) -> int:
    if not isinstance(dataset, Sized):
        raise SelectionError(f"{type(dataset).__name__}: a data set without a length.")
    return len(dataset)
