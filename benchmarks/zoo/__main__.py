"""``python -m benchmarks.zoo``: the program is a module, which its processes import by name."""

from __future__ import annotations

import sys

from benchmarks.zoo.sweep import main

if __name__ == "__main__":
    sys.exit(main())
