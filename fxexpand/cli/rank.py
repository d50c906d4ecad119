"""``fxexpand rank``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fxexpand.cli.options import Json, Source
from fxexpand.cli.output import fitted, note, show, stdout_kept, working

if TYPE_CHECKING:
    from fxexpand.lowrank import RankReport


def rank(
    source: Source,
    before: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Earlier weights, for a column to compare with.")
    ] = None,
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
    with stdout_kept(), working(f"{source.model}: singular values"):
        from fxexpand.lowrank import rank_report

        network = source.loaded()
        found = rank_report(
            network,
            source.required_inputs(network) if source.inputs else None,
            before=replace(source, weights=before).loaded() if before is not None else None,
            unfolding=cast(Any, unfolding),
            sketched=sketched,
        )
        if plot is not None:
            from fxexpand.lowrank.rank_plots import plot_report

            plot_report(found, plot)
    if plot is not None:
        note(f"{plot}: written")
    show(_tables(found), as_json, {"model": source.model, **found.to_dict()})


def _tables(found: RankReport) -> str:
    """Tables of the measures that fit 80 columns; --json has all of them."""
    compared = ("before",) if found.compared else ()
    weights = [
        (
            row.name.removesuffix(".weight"),
            str(row.full_rank),
            *((_number(row.before),) if found.compared else ()),
            *(
                # the other measures of a sketched weight are those of its largest singular values alone
                (f"{row.bounds[0]:.2f}..{row.bounds[1]:.2f}", "-", "-", "-")
                if row.bounds
                else (
                    _number(row.effective_rank),
                    f"{row.effective_rank / row.full_rank:.1%}",
                    _number(row.stable_rank),
                    str(row.energy_rank),
                )
            ),
        )
        for row in found.rows
    ]
    tables = [fitted(("weight", "full", *compared, "effective", "share", "stable", "energy"), weights)]
    if found.features:
        features = [
            (
                row.name,
                str(row.points),
                str(row.dimensions),
                *((_number(row.before),) if found.compared else ()),
                *map(_number, (row.effective_rank, row.stable_rank, row.cosine_distance)),
            )
            for row in found.features
        ]
        head = ("features of", "points", "dimensions", *compared, "effective", "stable", "distance")
        tables.append(fitted(head, features))
    return "\n\n".join(tables)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
