"""``python -m fxexpand``, and so ``torchrun -m fxexpand``: the command line."""

from __future__ import annotations

from fxexpand.cli import app

if __name__ == "__main__":
    app(prog_name="fxexpand")
