"""``fxexpand rank``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fxexpand.cli.options import Input, Json, Model, Weights, given_inputs, loaded
from fxexpand.cli.output import note, show, show_json, stdout_kept, working


def rank(
    model: Model,
    weights: Weights = None,
    before: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Earlier weights, for a column to compare with.")
    ] = None,
    inputs: Input = None,
    unfolding: Annotated[
        str, typer.Option(help="How a kernel becomes a matrix: channel or spatial.")
    ] = "channel",
    sketched: Annotated[
        int | None, typer.Option(help="Singular values of big weights to compute; left out, all.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="A plot, as .svg, .png or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Show the effective rank of every weight of a model.

    With --input, two samples of noise or more, the ranks of the features of every layer too.
    """
    from fxexpand.cli.files import require_writable

    if plot is not None:
        require_writable(plot)
    with stdout_kept(), working(f"{model}: singular values"):
        from fxexpand.rank import rank_report

        network = loaded(model, weights)
        found = rank_report(
            network,
            given_inputs(model, network, inputs) if inputs else None,
            before=loaded(model, before) if before is not None else None,
            unfolding=cast(Any, unfolding),
            sketched=sketched,
        )
        if plot is not None:
            from fxexpand.rank.plots import plot_report

            plot_report(found, plot)
    if plot is not None:
        note(f"{plot}: written")
    if as_json:
        show_json({"model": model, **found.to_dict()})
    else:
        show(str(found))
