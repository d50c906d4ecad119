"""Output files are tried before a command computes for minutes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxexpand.errors import SelectionError

if TYPE_CHECKING:
    from torch import nn


def require_safetensors(path: Path) -> None:
    """Require that weights can be written at ``path``, and that its ending is .safetensors.

    Raises: SelectionError: another ending, or see ``require_writable``.
    """
    if path.suffix != ".safetensors":
        raise SelectionError(f"{path}: name it {path.with_suffix('.safetensors').name}: that is its format.")
    require_writable(path)


def weights_of(model: nn.Module, about: Mapping[str, Any]) -> bytes:
    """The state dict as safetensors; a tensor under two names is written twice.

    Args:
        about: the metadata of the file, each value as JSON.
    """
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    return bytes(save(state, metadata={name: json.dumps(value) for name, value in about.items()}))


def require_writable(path: Path) -> None:
    """Require that a file can be written at ``path``; nothing is left there.

    Raises: SelectionError: its folder does not exist or cannot be written to, or it is a folder itself.
    """
    if path.is_dir():
        raise SelectionError(f"{path}: is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise SelectionError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    if path.exists() and not path.is_file():
        raise SelectionError(f"{path}: is a device. Name a file.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise SelectionError(
            f"{path}: the folder {path.parent} cannot be written to: {error.strerror}."
        ) from None


def require_folder(path: Path) -> None:
    """Require that files can be written into the folder ``path``, which is not made yet.

    Raises: SelectionError: the folder, or the one above it, is a file or cannot be written to.
    """
    above = next(each for each in (path, *path.parents) if each.exists())
    if not above.is_dir():
        raise SelectionError(f"--out {path}: {f'{above} ' * (above != path)}is a file. Name a folder.")
    require_writable(above / "file")
