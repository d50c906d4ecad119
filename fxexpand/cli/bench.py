"""``fxexpand bench``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxexpand.cli.files import require_writable
from fxexpand.cli.options import Json, PlacedSource, recipe_of
from fxexpand.cli.output import columns, note, show, sites, stdout_kept
from fxexpand.deploy.options import EVERY_BACKEND, LatencyOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

_DTYPES = ("float32", "float64", "bfloat16", "float16")


def bench(
    source: PlacedSource,
    options: LatencyOptions,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Also measure it expanded, and folded back: RepVGG, Chain(depth=2)..."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"{', '.join(EVERY_BACKEND)}. Repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(_DTYPES)}.")] = "float32",
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
    precision, place = _dtype(dtype), source.place
    chosen = None if recipe is None else recipe_of(recipe)
    with stdout_kept():
        from fxexpand.deploy.latency import measure_latency
        from fxexpand.surgery.expand import expand
        from fxexpand.surgery.fuse import fuse
        from fxexpand.surgery.transaction import report as report_of

        network, given, _ = source.ready()
        models: dict[str, nn.Module] = {"original": network, "fused": fuse(network, given)}
        if chosen is not None:
            models["expanded"] = expand(network, chosen)
            models["folded back"] = fuse(models["expanded"], scope="expanded")
        options = replace(
            options,
            backends=backend or _usual_backends(),
            device=place,
            dtype=precision,
            skip_unavailable=not backend,
        )
        found = measure_latency(models, given, **vars(options))
    folded = report_of(models["fused"])
    if html is not None:
        from fxexpand.deploy.latency.page import latency_page
        from fxexpand.reporting.files import write_whole

        write_whole(html, latency_page(source.model, found, folded))
        note(f"{html}: written")
    text = f"{source.model}\n{sites(folded, every=False)}\n\n{columns(str(found))}"
    show(text, as_json, {"model": source.model, **found.to_dict()})


def _dtype(name: str) -> torch.dtype | None:
    import torch

    from fxexpand.errors import SelectionError, closest

    if name not in _DTYPES:
        raise SelectionError(f"dtype {name!r}: choose from {', '.join(_DTYPES)}.{closest(name, _DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return None if found == torch.float32 else found


def _usual_backends() -> tuple[str, ...]:
    """Eager, and onnxruntime where it is installed; the other backends compile for minutes."""
    from fxexpand.deploy.sessions import onnx_installed

    if onnx_installed():
        return ("eager", "onnxruntime")
    note('no onnxruntime figures: run pip install "fxexpand[onnx]"')
    return ("eager",)
