"""``python -m benchmarks.low_rank_bias``: the program is a module, which its processes import by name."""

from __future__ import annotations

import sys

from benchmarks.low_rank_bias.program import main

if __name__ == "__main__":
    sys.exit(main())
