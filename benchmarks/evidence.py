"""The output of every benchmark: the machine, versioned JSON, and its table in benchmarks/README.md."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fxexpand.reporting.files import write_whole

FOLDER = Path(__file__).resolve().parent
README = FOLDER / "README.md"
ALL_OF_MKL = "FXEXPAND_ALL_OF_MKL"  # set by benchmarks.mkl


def variant() -> str:
    """The end of the name of what is published and saved: ``benchmarks.mkl`` has figures of its own."""
    return "-mkl" if ALL_OF_MKL in os.environ else ""


def machine() -> dict[str, Any]:
    """Processor, cores, threads, versions and date: figures mean nothing without them."""
    return {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **({"mkl": "all kernels"} if variant() else {}),
    }


def headline(about: dict[str, Any]) -> str:
    """The machine in one line."""
    gpu, mkl = about["gpu"] or "no GPU", ", all kernels of MKL" if about.get("mkl") else ""
    return (
        f"{about['date']}, {about['processor']}, {about['cores']} cores, {about['threads']} threads, {gpu}, "
        f"Python {about['python']}, torch {about['torch']}{mkl}"
    )


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` with a format version as JSON; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": 1, **content}, indent=1) + "\n"
    write_whole(path, text.encode())


def publish(name: str, text: str, readme: Path = README) -> None:
    """Put ``text`` between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a README.

    Raises: ValueError: a marker is missing.
    """
    page = readme.read_text(encoding="utf-8")
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.partition(opening)
    _, ended, after = rest.partition(closing)
    if not found or not ended:
        raise ValueError(f"{readme.name}: has no markers {opening} ... {closing}. Add them.")
    write_whole(readme, f"{before}{opening}\n{text.strip()}\n{closing}{after}".encode())
