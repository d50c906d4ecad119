"""Write a complete file or none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``; a reader sees the old file or the new one.

    An interrupted run leaves the old file. The target of a link is replaced, not the link.

    Raises: OSError: the folder does not exist or cannot be written to, or the disk is full; the error names
        ``path``, and nothing is left behind.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    try:
        # In the target's own folder: os.replace is atomic within one file system only.
        handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(draft, 0o666 & ~mask)  # mkstemp makes files that only the owner may read
            os.replace(draft, target)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:  # its own message names the draft, or no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
