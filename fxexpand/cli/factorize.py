"""``fxexpand factorize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxexpand.cli.files import require_safetensors, weights_of
from fxexpand.cli.options import Json, PlacedSource, Strict
from fxexpand.cli.output import show, show_json, sites, stdout_kept, working
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

        with working(f"{source.model}: building"):
            network, lines = source.built()
            network = source.filled(network)
            given = source.required_inputs(network)
        small = factorized(network, given, **vars(options), strict=strict, inplace=True)
        found = report(small)
        ranks = {name: [cut.scheme, cut.rank] for name, cut in cuts(small).items()}
        data = weights_of(small, {"model": source.model, "ranks": ranks})
        write_whole(out, data)
    if as_json:
        written = {"model": source.model, "path": str(out), "size": len(data), "ranks": ranks}
        show_json({**written, **found.to_dict()})
    else:
        loading = "\n    ".join([*lines, "model = fxexpand.factorize(model, rank=ranks)"])
        size = f"{out}: {short(len(data))}B"
        show(f"{sites(found)}\n\n{size}. With the ranks in its metadata it loads into\n\n    {loading}")
