"""Where a command will write is tried before it works for minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fxexpand.errors import SelectionError


def require_writable(path: Path) -> None:
    """That a file can be written at ``path``; nothing is left there.

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
