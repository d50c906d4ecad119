"""``fxexpand factorize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxexpand.cli.files import require_safetensors, weights_of
from fxexpand.cli.options import (
    Device,
    Input,
    Json,
    Model,
    Weights,
    built,
    device_of,
    filled,
    given_inputs,
)
from fxexpand.cli.output import show, show_json, sites, stdout_kept, working


def factorize(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    inputs: Input = None,
    weights: Weights = None,
    flops: Annotated[float | None, typer.Option(help="Share of the model's FLOPs to keep.")] = None,
    params: Annotated[float | None, typer.Option(help="Share of its parameters to keep.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of each squared norm to keep.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of every layer.")] = None,
    method: Annotated[str, typer.Option(help="svd, lp or trp.")] = "svd",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a layer is refused.")] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Replace layers by cheaper pairs of low rank, and save their weights."""
    require_safetensors(out)
    place = device_of(device)
    with stdout_kept():
        from fxexpand.reporting.files import write_whole
        from fxexpand.reporting.table import short
        from fxexpand.surgery.factorize import cuts
        from fxexpand.surgery.factorize import factorize as factorized
        from fxexpand.surgery.transaction import report

        with working(f"{model}: building"):
            network, lines = built(model, weights)
            network = filled(network, weights, place)
            given = given_inputs(model, network, inputs, place)
        small = factorized(
            network,
            given,
            flops=flops,
            params=params,
            energy=energy,
            rank=rank,
            method=method,  # type: ignore[arg-type]  # checked there
            strict=strict,
            inplace=True,
        )
        found = report(small)
        ranks = {name: [cut.scheme, cut.rank] for name, cut in cuts(small).items()}
        data = weights_of(small, {"model": model, "ranks": ranks})
        write_whole(out, data)
    if as_json:
        show_json({"model": model, "path": str(out), "size": len(data), "ranks": ranks, **found.to_dict()})
    else:
        loading = "\n    ".join([*lines, "model = fxexpand.factorize(model, rank=ranks)"])
        size = f"{out}: {short(len(data))}B"
        show(f"{sites(found)}\n\n{size}. With the ranks in its metadata it loads into\n\n    {loading}")
