"""Run a benchmark with all kernels of MKL: ``python -m benchmarks.mkl surgery_cost [options]``

The builds of torch for x86 multiply matrices with MKL. On a processor that is not Intel's, MKL takes its AVX2
kernels where there is AVX-512, at half the rate; oneDNN, which computes convolutions, does not. MKL learns
whose processor it is from the function ``mkl_serv_intel_cpu_true``: this compiles one that says yes, and
preloads it. What is measured so is published beside the figures of torch as it is, and says so.

Linux, with a C compiler.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import ALL_OF_MKL

SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def main(given: Sequence[str] | None = None) -> int:
    """Compile, then run the benchmark; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "benchmark", nargs="?", choices=("surgery_cost", "training_cost", "profiles"), default="surgery_cost"
    )
    options, others = parser.parse_known_args(given)  # the others are the benchmark's
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "mkl.so"
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=SOURCE, text=True, check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), ALL_OF_MKL: "1"}
        run = [sys.executable, "-m", f"benchmarks.{options.benchmark}", *others]
        return subprocess.run(run, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
