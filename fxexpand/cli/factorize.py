"""``fxexpand factorize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxexpand.cli.files import require_safetensors, weights_of
from fxexpand.cli.options import Json, PlacedSource, Strict
from fxexpand.cli.output import show, sites, stdout_kept
from fxexpand.lowrank.options import FactorizeOptions


def factorize(
    source: PlacedSource,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    options: FactorizeOptions,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Replace layers by cheaper pairs of low rank, and save their weights."""
    require_safetensors(out)
    with stdout_kept():
        from fxexpand.reporting.files import write_whole
        from fxexpand.reporting.table import short
        from fxexpand.surgery.factorize import cuts
        from fxexpand.surgery.factorize import factorize as factorized
        from fxexpand.surgery.transaction import report

        network, given, lines = source.ready()
        small = factorized(network, given, **vars(options), strict=strict, inplace=True)
        found = report(small)
        ranks = {name: [cut.scheme, cut.rank] for name, cut in cuts(small).items()}
        data = weights_of(small, {"model": source.model, "ranks": ranks})
        write_whole(out, data)
    values = {"model": source.model, "path": str(out), "size": len(data), "ranks": ranks}
    loading = "\n    ".join([*lines, "model = fxexpand.factorize(model, rank=ranks)"])
    size = f"{out}: {short(len(data))}B"
    text = f"{sites(found)}\n\n{size}. With the ranks in its metadata it loads into\n\n    {loading}"
    show(text, as_json, {**values, **found.to_dict()})
