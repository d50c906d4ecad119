"""The command line.

What a command needs is imported inside it, so that ``--help`` and ``--version`` answer at once.
Exit codes: 0 ok, 1 refused or a check failed, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fxexpand.export import OnnxReport
    from fxexpand.latency import LatencyReport
    from fxexpand.rank import RankReport
    from fxexpand.report import Report


class Commands(TyperGroup):
    """The commands; an expected error is one line on stderr and an exit code, or a traceback with --debug."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        from fxexpand.errors import FxExpandError, SelectionError

        try:
            return super().invoke(ctx)
        except SelectionError as error:
            fail(str(error), code=2)
        except FxExpandError as error:
            fail(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader went away (`| head`), and click knows what to do
            fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


app = typer.Typer(
    cls=Commands,
    help="Expand a network's layers into linear chains for training, and fuse them back exactly.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

_MODEL = typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME or package.module:factory.")
Model = Annotated[str, _MODEL]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Weights to load: safetensors, or a saved state dict."),
]
Input = Annotated[
    list[str],
    typer.Option("--input", metavar="SHAPE", help="An argument: 1,3,224,224 or 1,16:int64. Repeatable."),
]
Depth = Annotated[int, typer.Option(help="Factors per layer.")]
Width = Annotated[float, typer.Option(help="Hidden width, in multiples of the outputs.")]
Select = Annotated[
    list[str] | None,
    typer.Option("--select", metavar="PATTERN", help="Only layers whose name matches. Repeatable."),
]


def _version(shown: bool) -> None:
    if shown:
        from importlib.metadata import version

        typer.echo(f"fxexpand {version('fxexpand')}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Expand a network's layers into linear chains for training, and fuse them back exactly."""


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of networks to train.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs each is trained for.")] = 40,
    train_size: Annotated[int, typer.Option(min=10, help="Digits to train on, of 1797.")] = 600,
    depth: Depth = 3,
    width: Width = 2.0,
    rounds: Annotated[int, typer.Option(min=8, help="Rounds of the latency measurement.")] = 30,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")] = Path("runs/demo"),
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Train a network plain and expanded, fuse it, prove the result."""
    from fxexpand import demo as job
    from fxexpand.findings import describe
    from fxexpand.recipes import Chain
    from fxexpand.training import Schedule

    place = _device(device)
    with _stdout_kept():
        findings = job.run(
            out,
            seeds=seeds,
            train_size=train_size,
            schedule=Schedule(epochs=epochs),
            recipe=Chain(depth=depth, width=width),
            rounds=rounds,
            device=place,
        )
    written = f"{out}: {', '.join(findings.files)}"
    typer.echo(_json(findings.to_dict()) if as_json else f"{findings}\n\n{written}")
    if findings.failed:
        fail(f"demo: {describe(findings.failed)} See {out / 'report.html'}.")


@app.command()
def inspect(
    model: Model,
    select: Select = None,
    depth: Depth = 3,
    width: Width = 2.0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a layer is refused.")] = False,
    as_json: Json = False,
) -> None:
    """Show what expanding does to each layer, and what it refuses."""
    from fxexpand.pipeline import expand, report
    from fxexpand.recipes import Chain
    from fxexpand.zoo import load_model

    recipe = Chain(depth=depth, width=width)
    with _stdout_kept():
        found = report(expand(load_model(model, meta=True), recipe, select=select, inplace=True))
    _show(found, model, as_json)
    if strict and found.refusals:
        fail(f"{model}: {len(found.refusals)} refused, the first: {found.refusals[0].message}")


@app.command()
def rank(model: Model, weights: Weights = None, as_json: Json = False) -> None:
    """Show the effective rank of every weight of a model."""
    from fxexpand.rank import rank_report

    with _stdout_kept():
        found = rank_report(_model(model, weights))
    _show(found, model, as_json)


@app.command()
def export(
    model: Model,
    inputs: Input,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The ONNX file to write.")],
    weights: Weights = None,
    fuse: Annotated[bool, typer.Option("--fuse", help="Fold every expansion first.")] = False,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Do not leave the batch free.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare with the model in onnxruntime.")] = True,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX, and compare the file with the model."""
    from fxexpand import pipeline
    from fxexpand.export import export_onnx

    with _stdout_kept():
        network = _model(model, weights)
        given = _inputs(network, inputs)
        if fuse:
            network = pipeline.fuse(network, given)
            typer.echo(pipeline.report(network).summary, err=True)
        with _one_line(f"{model}: torch cannot export it"):
            found = export_onnx(network, out, given, dynamic_batch=not fixed_batch, verify=verify)
    _show(found, model, as_json)


@app.command()
def bench(
    model: Model,
    inputs: Input,
    weights: Weights = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="NAME", help="eager, compile or onnxruntime. Repeatable."),
    ] = None,
    depth: Depth = 3,
    width: Width = 2.0,
    rounds: Annotated[int, typer.Option(help="Timings per model and backend.")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Measure latency: a model as it is, expanded, and fused again."""
    from fxexpand.latency import measure_latency
    from fxexpand.pipeline import expand, fuse
    from fxexpand.recipes import Chain

    place, recipe = _device(device), Chain(depth=depth, width=width)
    with _stdout_kept():
        network = _model(model, weights).to(place)
        given = _inputs(network, inputs, place)
        expanded = expand(network, recipe)
        models = {"plain": network, "expanded": expanded, "fused": fuse(expanded, scope="expanded")}
        with _one_line(f"{model}: cannot be measured"):
            found = measure_latency(
                models, given, backends=backend or ("eager",), rounds=rounds, threads=threads
            )
    _show(found, model, as_json)


def fail(message: str, code: int = 1) -> NoReturn:
    """End the command with one line on stderr."""
    typer.echo(f"fxexpand: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def _show(found: Report | RankReport | OnnxReport | LatencyReport, model: str, as_json: bool) -> None:
    typer.echo(_json({"model": model, **found.to_dict()}) if as_json else str(found))


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, allow_nan=False)


def _model(name: str, weights: Path | None) -> nn.Module:
    from fxexpand.zoo import load_model, load_weights

    model = load_model(name)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def _inputs(model: nn.Module, shapes: list[str], device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    from fxexpand.zoo import example_input, require_accepts

    given = tuple(example_input(shape, device) for shape in shapes)
    require_accepts(model, given)
    return given


def _device(name: str) -> torch.device:
    import torch

    from fxexpand.errors import SelectionError

    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SelectionError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    return device


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """Send to stderr what a model's own code or a library prints: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Shorten an error of torch's exporter or compiler, which runs to pages, to its cause."""
    from fxexpand.errors import FxExpandError

    try:
        yield
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise FxExpandError(f"{what}: {lines[0]} (all of it: fxexpand --debug ...)") from error
