"""``fxexpand fuse``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxexpand.cli.files import require_safetensors, weights_of
from fxexpand.cli.options import Json, PlacedSource, Strict, recipe_of
from fxexpand.cli.output import show, sites, stdout_kept, working

if TYPE_CHECKING:
    from fxexpand.running.inputs import ExampleInputs


def fuse(
    source: PlacedSource,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="How the model of --weights was expanded: Chain(depth=2)..."),
    ] = None,
    scope: Annotated[str, typer.Option(help="all, or expanded: undo expand and nothing else.")] = "all",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Fold everything affine, and save the weights of the fused network.

    With --scope expanded, the file holds the weights of the original network under its own names.
    """
    require_safetensors(out)
    with stdout_kept():
        from fxexpand import __version__
        from fxexpand.reporting.files import write_whole
        from fxexpand.reporting.table import short
        from fxexpand.surgery.expand import expand
        from fxexpand.surgery.fuse import fuse as fuse_model
        from fxexpand.surgery.transaction import report as report_of

        with working(f"{source.model}: building"):
            network, lines = source.built()
            names = set(network.state_dict())
            if recipe is not None:
                network = expand(network, recipe_of(recipe), inplace=True)
            network = source.filled(network)
            given = source.known_inputs(network)
        # the scope is checked first of all
        fused = fuse_model(network, given, scope=scope, strict=strict)  # type: ignore[call-overload]
        report = report_of(fused)
        data = weights_of(fused, {"fxexpand": __version__, "model": source.model, "scope": scope})
        write_whole(out, data)
    grown = scope == "expanded" and set(fused.state_dict()) != names
    loading = _loading(lines, recipe, scope, given, grown, out)
    values = {"model": source.model, "path": str(out), "size": len(data), "load": loading}
    program = textwrap.indent(loading, "    ")
    text = f"{sites(report)}\n\n{out}: {short(len(data))}B. It loads by\n\n{program}"
    show(text, as_json, {**values, **report.to_dict()})


def _loading(
    lines: list[str], recipe: str | None, scope: str, given: ExampleInputs | None, grown: bool, path: Path
) -> str:
    """A program, after ``lines``, that builds the fused network and loads the file into it."""
    lines = [*lines]
    if recipe is not None and (scope == "all" or grown):
        words = recipe if "(" in recipe else f"{recipe}()"
        lines.append(f"model = fxexpand.expand(model, fxexpand.{words.strip()})")
    if scope == "all":
        inputs = "" if given is None else f"{_written(given)}, "
        lines.append(f"model = fxexpand.fuse(model.eval(), {inputs}verify=False)")
    elif grown:
        lines.append('model = fxexpand.fuse(model, scope="expanded", verify=False)')
    body = "\n".join(lines)
    needed = [name for name in ("timm", "torch", "torchvision", "fxexpand") if f"{name}." in body]
    imports = [*(f"import {name}" for name in needed), "from safetensors.torch import load_file"]
    return "\n".join([*imports, body, f"model.load_state_dict(load_file({str(path)!r}))"])


def _written(given: ExampleInputs) -> str:
    """The inputs as Python, with zeros for their values."""
    from fxexpand.running.inputs import as_call

    def zeros(tensor: Any) -> str:
        if not hasattr(tensor, "dtype"):
            return repr(tensor)
        dtype = "" if str(tensor.dtype) == "torch.float32" else f", dtype={tensor.dtype}"
        return f"torch.zeros({', '.join(map(str, tensor.shape))}{dtype})"

    args, kwargs = as_call(given)
    if kwargs:
        return f"{{{', '.join(f'{name!r}: {zeros(value)}' for name, value in kwargs.items())}}}"
    return zeros(args[0]) if len(args) == 1 else f"({', '.join(map(zeros, args))})"
