"""Benchmarks, a folder by question; each prints a table and writes versioned JSON.

The folders are on the path of the package, so that ``python -m benchmarks.fuse_zoo`` finds the program in
``benchmarks/fusing``.
"""

from pathlib import Path

__path__ += [str(file.parent) for file in sorted(Path(__file__).parent.glob("*/__init__.py"))]
