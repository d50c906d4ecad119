"""``fxexpand demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxexpand.cli.failures import fail
from fxexpand.cli.files import require_folder
from fxexpand.cli.options import Device, Json, device_of
from fxexpand.cli.output import show, show_json, stdout_kept


def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of networks to train.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs each is trained for.")] = 40,
    train_size: Annotated[int, typer.Option(min=10, help="Digits to train on, of 1797.")] = 600,
    depth: Annotated[int, typer.Option(help="Factors per layer.")] = 3,
    width: Annotated[float, typer.Option(help="Hidden width, in multiples of the outputs.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=8, help="Rounds of the latency measurement.")] = 30,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")] = Path("runs/demo"),
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train a network plain and expanded, fuse it, prove the result."""
    from fxexpand.recipes import Chain
    from fxexpand.training.demo import describe, run
    from fxexpand.training.loop import Schedule

    require_folder(out)
    place = device_of(device)
    with stdout_kept():
        findings = run(
            out,
            seeds=seeds,
            train_size=train_size,
            schedule=Schedule(epochs=epochs),
            recipe=Chain(depth=depth, width=width),
            rounds=rounds,
            device=place,
        )
    if as_json:
        show_json(findings.to_dict())
    else:
        show(f"{findings}\n\n{out}: {', '.join(findings.files)}")
    if findings.failed:
        fail(f"demo: {describe(findings.failed)} See {out / 'report.html'}.")
