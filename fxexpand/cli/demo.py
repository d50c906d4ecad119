"""``fxexpand demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxexpand.cli.failures import fail
from fxexpand.cli.files import require_folder
from fxexpand.cli.options import Device, Json, device_of
from fxexpand.cli.output import show, stdout_kept
from fxexpand.training.options import DemoOptions, Schedule


def demo(
    options: DemoOptions,
    schedule: Schedule,
    depth: Annotated[int, typer.Option(help="Factors per layer.")] = 3,
    width: Annotated[float, typer.Option(help="Hidden width, in multiples of the outputs.")] = 2.0,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")] = Path("runs/demo"),
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train a network plain and expanded, fuse it, prove the result."""
    from fxexpand.recipes import Chain
    from fxexpand.training.demo import describe, run

    require_folder(out)
    place, recipe = device_of(device), Chain(depth=depth, width=width)
    with stdout_kept():
        findings = run(out, **vars(options), schedule=schedule, recipe=recipe, device=place)
    show(f"{findings}\n\n{out}: {', '.join(findings.files)}", as_json, findings.to_dict())
    if findings.failed:
        fail(f"demo: {describe(findings.failed)} See {out / 'report.html'}.")
