"""``fxexpand export``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fxexpand.cli.files import require_writable
from fxexpand.cli.options import Json, PlacedSource
from fxexpand.cli.output import columns, note, show, stdout_kept, working
from fxexpand.deploy.options import OnnxOptions


def export(
    source: PlacedSource,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The ONNX file to write.")],
    options: OnnxOptions,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX, and compare the file with the model.

    Nothing is written unless the file computes what the model computes.
    """
    require_writable(out)
    with stdout_kept():
        from fxexpand.deploy.onnx import export_onnx

        network, given, _ = source.ready()
        original = network if options.fuse else None
        options = replace(options, compare_with=original, metadata={"fxexpand.model": source.model})
        with working(f"{source.model}: exporting and comparing"):
            found = export_onnx(network, out, given, **vars(options))
    if options.fuse:
        note(found.metadata["fxexpand.report"])
    show(columns(str(found)), as_json, {"model": source.model, **found.to_dict()})
