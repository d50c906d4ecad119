"""Plots of ranks: bars of a report, ranks and spectra over training; SVG, PNG or PDF by the file's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fxexpand.errors import SelectionError
from fxexpand.lowrank.model_ranks import RankReport
from fxexpand.reporting.figures import BLUE, ORANGE, new_figure, styled, write_figure

Bars: TypeAlias = tuple[str, float, float | None, float]  # name, effective rank, that before, full rank


@styled()
def plot_report(report: RankReport, path: str | Path) -> Path:
    """Effective ranks of weights, and of features where there are any, as bars: before, after, full rank.

    Raises: SelectionError: the report is empty, or the file's suffix is unknown.
    """
    weights: list[Bars] = [(r.name, r.effective_rank, r.before, r.full_rank) for r in report.rows]
    features: list[Bars] = [
        (r.name or "(model)", r.effective_rank, r.before, min(r.points, r.dimensions))
        for r in report.features
    ]
    groups = {title: rows for title, rows in (("weights", weights), ("features", features)) if rows}
    if not groups:
        raise SelectionError("rank report: it has no rows to plot.")
    longest = max(map(len, groups.values()))
    figure, axes = new_figure(1, len(groups), width=5.2, height=max(1.8, 0.22 * longest + 0.9))
    for axis, (title, rows) in zip(axes, groups.items(), strict=True):
        _plot_bars(axis, title, rows)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return write_figure(figure, Path(path))


def _plot_bars(axis: Any, title: str, rows: Sequence[Bars]) -> None:
    names, now, before, full = zip(*rows, strict=True)
    places = range(len(rows))
    axis.barh(places, full, 0.8, color="#eef0f3", label="full rank")
    if any(rank is not None for rank in before):
        axis.barh([p + 0.18 for p in places], now, 0.34, color=ORANGE, label="now")
        past = [rank or 0.0 for rank in before]
        axis.barh([p - 0.18 for p in places], past, 0.34, color=BLUE, label="before")
    else:
        axis.barh(places, now, 0.6, color=BLUE, label="effective rank")
    axis.set_yticks(places, [name.removesuffix(".weight") for name in names], fontsize=7)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    axis.set_xscale("log" if max(full) > 40 * min(full) else "linear")
    axis.set_title(f"effective rank of {title}", loc="left")


@styled()
def plot_ranks(steps: Sequence[int], ranks: Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Effective rank over training steps, a line per layer, light to dark from the input to the output."""
    import matplotlib

    figure, (axis,) = new_figure(1, 1, width=6.4, height=3.4)
    colours = matplotlib.colormaps["viridis_r"]
    for place, (name, values) in enumerate(ranks.items()):
        shade = colours(0.1 + 0.85 * place / max(len(ranks) - 1, 1))
        axis.plot(steps[-len(values) :], values, color=shade, label=name.removesuffix(".weight"))
    axis.set_xlabel("training step")
    axis.set_ylabel("effective rank")
    if len(ranks) <= 24:
        figure.legend(loc="outside right upper", fontsize=7)
    return write_figure(figure, Path(path))


@styled()
def plot_spectra(
    spectra: Mapping[str, Sequence[tuple[int, Sequence[int], Sequence[float]]]], path: str | Path
) -> Path:
    """Singular values over their index, a panel per layer and a line per recorded step, light to dark.

    Args:
        spectra: by layer, ``(step, indices from 1, singular values over the largest)`` in order of the steps.
    """
    import matplotlib

    columns = min(3, len(spectra))
    rows = -(-len(spectra) // columns)
    figure, axes = new_figure(rows, columns)
    colours = matplotlib.colormaps["viridis_r"]
    for axis, (name, records) in zip(axes, spectra.items(), strict=False):
        for place, (step, indices, values) in enumerate(records):
            shade = colours(0.1 + 0.85 * place / max(len(records) - 1, 1))
            axis.plot(indices, values, color=shade, label=f"step {step}")
        axis.set_title(name.removesuffix(".weight"), loc="left")
        axis.set_ylim(0.0, 1.05)
        axis.set_xlabel("index")
    for axis in axes[len(spectra) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("singular value / largest")
    axes[0].legend(fontsize=6.5)
    return write_figure(figure, Path(path))
