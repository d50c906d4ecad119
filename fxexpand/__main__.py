"""``python -m fxexpand``, and so ``torchrun -m fxexpand``: the command line."""

from __future__ import annotations

import os
import sys

from fxexpand.cli import app


def main() -> None:
    """Run a command; a process of ``torchrun`` ends at once when it is done.

    Threads of gloo live until then, and one that still holds a tensor aborts the process when Python shuts
    down (pytorch issue 190489).
    """
    try:
        app(prog_name="fxexpand")
    except SystemExit as end:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


if __name__ == "__main__":
    main()
