"""``fxexpand export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxexpand.cli.options import Device, Input, Json, Model, Weights, device_of, given_inputs, loaded
from fxexpand.cli.output import columns, note, show, show_json, stdout_kept, working


def export(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The ONNX file to write.")],
    inputs: Input = None,
    weights: Weights = None,
    fuse: Annotated[bool, typer.Option("--fuse", help="Fold everything affine first.")] = False,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Do not leave the batch free.")] = False,
    free_size: Annotated[bool, typer.Option("--free-size", help="Leave height and width free, too.")] = False,
    opset: Annotated[int | None, typer.Option(help="Of ONNX; left out, torch's default.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare with the model in onnxruntime.")] = True,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write a model as ONNX, and compare the file with the model.

    Nothing is written unless the file computes what the model computes.
    """
    from fxexpand.cli.files import require_writable

    require_writable(out)
    place = device_of(device)
    with stdout_kept():
        from fxexpand.deploy import export_onnx

        with working(f"{model}: building"):
            network = loaded(model, weights, place)
            given = given_inputs(model, network, inputs, place)
        with working(f"{model}: exporting and comparing"):
            found = export_onnx(
                network,
                out,
                given,
                dynamic_batch=not fixed_batch,
                dynamic_spatial=free_size,
                opset=opset,
                verify=verify,
                fuse=fuse,
                compare_with=network if fuse else None,
                metadata={"fxexpand.model": model},
            )
    if fuse:
        note(found.metadata["fxexpand.report"])
    if as_json:
        show_json({"model": model, **found.to_dict()})
    else:
        show(columns(str(found)))
