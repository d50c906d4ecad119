"""``fxexpand bench``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxexpand.cli.files import require_writable
from fxexpand.cli.options import (
    Device,
    Input,
    Json,
    Model,
    Weights,
    device_of,
    given_inputs,
    loaded,
    recipe_of,
)
from fxexpand.cli.output import columns, note, show, show_json, sites, stdout_kept, working

if TYPE_CHECKING:
    import torch
    from torch import nn

_DTYPES = ("float32", "float64", "bfloat16", "float16")


def bench(
    model: Model,
    inputs: Input = None,
    weights: Weights = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Also measure it expanded, and folded back: RepVGG, Chain(depth=2)..."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="eager, compile, onnxruntime, aotinductor, cudagraphs, tensorrt. Repeatable.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timings per model and backend.")] = 30,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size, in place of the input's. Repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(_DTYPES)}.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Lay images out so.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU.")] = None,
    device: Device = "cpu",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with plots, one file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure latency: a model as it is, and fused.

    The models take turns, in a random order; their outputs are compared before they are timed. A difference
    is called real where its confidence interval excludes 1.
    """
    if html is not None:
        require_writable(html)
    place = device_of(device)
    precision = _dtype(dtype)
    chosen = None if recipe is None else recipe_of(recipe)
    with stdout_kept():
        from fxexpand.deploy.latency import measure_latency
        from fxexpand.surgery.expand import expand
        from fxexpand.surgery.fuse import fuse
        from fxexpand.surgery.transaction import report as report_of

        with working(f"{model}: building"):
            network = loaded(model, weights, place)
            given = given_inputs(model, network, inputs, place)
        models: dict[str, nn.Module] = {"original": network, "fused": fuse(network, given)}
        if chosen is not None:
            models["expanded"] = expand(network, chosen)
            models["folded back"] = fuse(models["expanded"], scope="expanded")
        found = measure_latency(
            models,
            given,
            backends=backend or _usual_backends(),
            device=place,
            rounds=rounds,
            threads=threads,
            dtype=precision,
            channels_last=channels_last,
            batch_sizes=batch,
            skip_unavailable=not backend,
        )
    folded = report_of(models["fused"])
    if html is not None:
        from fxexpand.deploy.latency.page import latency_page
        from fxexpand.reporting.files import write_whole

        write_whole(html, latency_page(model, found, folded))
        note(f"{html}: written")
    if as_json:
        show_json({"model": model, **found.to_dict()})
    else:
        show(f"{model}\n{sites(folded, every=False)}\n\n{columns(str(found))}")


def _dtype(name: str) -> torch.dtype | None:
    import torch

    from fxexpand.errors import SelectionError
    from fxexpand.reporting.closest import closest

    if name not in _DTYPES:
        raise SelectionError(f"dtype {name!r}: choose from {', '.join(_DTYPES)}.{closest(name, _DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return None if found == torch.float32 else found


def _usual_backends() -> tuple[str, ...]:
    """Eager, and onnxruntime where it is installed; the others compile for minutes and are asked for."""
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        return ("eager", "onnxruntime")
    note('no onnxruntime figures: run pip install "fxexpand[onnx]"')
    return ("eager",)
