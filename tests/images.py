"""Data sets of images as they lie on disk, with a few random ones in them."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    """A CIFAR-10 with four images a file; torchvision is told their MD5 sums, as it knows the real ones."""
    from torchvision.datasets import CIFAR10 as Reader

    folder = root / Reader.base_folder
    folder.mkdir()
    images = np.random.randint(0, 256, (24, 3072), dtype=np.uint8)
    sums = {}
    for i in range(6):
        name = f"data_batch_{i + 1}" if i < 5 else "test_batch"
        content = {"data": images[4 * i : 4 * i + 4], "labels": [i, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    meta = pickle.dumps({"label_names": [str(i) for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(
        Reader, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(Reader, "test_list", [["test_batch", sums["test_batch"]]])
    known = {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(Reader, "meta", known)
    return images
