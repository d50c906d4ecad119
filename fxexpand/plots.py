"""The plots of the demo's report as SVG elements that stand alone: no scripts, no addresses, no fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fxexpand.findings import Findings
from fxexpand.latency import LatencyReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "plain": "#4c6a92",
    "original": "#4c6a92",
    "expanded": "#d9722e",
    "fused": "#3a8f6b",
    "folded back": "#7c6aa8",
}
GREY = "#6b7280"

_STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelcolor": "#374151",
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def ranks(findings: Findings) -> Figure:
    """Effective rank over training steps, one panel per layer: mean, and the range over the seeds."""
    layers = list(findings.full_ranks)
    figure, panels = _panels(len(layers), height=2.5)
    for panel, layer in zip(panels, layers, strict=False):
        for network in ("plain", "expanded"):
            histories = [findings.history(run, network) for run in findings.runs]
            values = [history.ranks[layer] for history in histories]
            _line_with_range(panel, histories[0].rank_steps, values, network)
        panel.set_title(f"{layer} (full rank {findings.full_ranks[layer]})", loc="left")
        panel.set_xlabel("training step")
        panel.margins(x=0.02)
    panels[0].set_ylabel("effective rank")
    _legend(figure, panels, len(layers))
    return figure


def spectra(findings: Findings) -> Figure:
    """Singular values at the end of training, largest first, one panel per layer."""
    layers = list(findings.spectra)
    figure, panels = _panels(len(layers), height=2.5)
    for panel, layer in zip(panels, layers, strict=False):
        for network, values in zip(("plain", "expanded"), findings.spectra[layer], strict=True):
            positions = range(1, len(values) + 1)
            marker = "o" if len(values) <= 16 else ""
            panel.plot(positions, values, color=COLOURS[network], label=network, marker=marker, markersize=3)
        panel.set_title(layer, loc="left")
        panel.set_xlabel("index")
        panel.set_ylim(bottom=0.0, top=1.05)
    panels[0].set_ylabel("singular value / largest")
    _legend(figure, panels, len(layers))
    return figure


def accuracy(findings: Findings) -> Figure:
    """Test accuracy and training loss by epoch: mean, and the range over the seeds."""
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = _panels(2, height=3.0, columns=2)
    for network in ("plain", "expanded"):
        histories = [findings.history(run, network) for run in findings.runs]
        epochs = range(1, len(histories[0].loss) + 1)
        _line_with_range(left, epochs, [history.test_accuracy for history in histories], network)
        _line_with_range(right, epochs, [history.loss for history in histories], network)
    late = [
        value
        for run in findings.runs
        for network in ("plain", "expanded")
        for value in findings.history(run, network).test_accuracy[len(run.plain.loss) // 4 :]
    ]
    left.set_ylim(min(late) - 0.5, min(100.2, max(late) + 0.5))
    left.set_title("test accuracy, %", loc="left")
    right.set_title("training loss", loc="left")
    right.set_yscale("log")
    for panel in (left, right):
        panel.set_xlabel("epoch")
        panel.margins(x=0.02)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(loc="lower right")
    return figure


def latency(findings: Findings) -> Figure | None:
    """Median latency of one image with its interval; None where nothing was measured."""
    return None if findings.latency is None else latency_bars(findings.latency)


def latency_bars(report: LatencyReport) -> Figure:
    """Median latency with its interval, one panel per backend and batch size."""
    places = list(dict.fromkeys((row.backend, row.batch) for row in report.measurements))
    several = len({batch for _, batch in places}) > 1
    networks = list(dict.fromkeys(row.model for row in report.measurements))[::-1]
    columns = min(len(places), 2)
    figure, panels = _panels(len(places), height=0.7 + 0.4 * len(networks), columns=columns)
    for panel in panels[len(places) :]:
        panel.set_axis_off()
    for panel, (backend, batch) in zip(panels, places, strict=False):
        for place, network in enumerate(networks):
            row = report.measurement(network, backend, batch)
            error = [[row.median - row.low], [row.high - row.median]]
            colour = COLOURS.get(network, GREY)
            panel.barh(place, row.median, 0.62, color=colour, xerr=error, ecolor="#111827", capsize=3)
            text = f"  {row.median:.4g} ms"
            panel.text(row.high, place, text, va="center", ha="left", fontsize=9, color="#111827")
        panel.set_yticks(range(len(networks)), networks)
        panel.grid(visible=False, axis="y")
        panel.set_title(f"{backend}, batch {batch}" if several else backend, loc="left")
        panel.set_xlabel("milliseconds per call")
        panel.set_xlim(right=panel.get_xlim()[1] * 1.22)
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as one ``<svg>`` element to be put into an HTML page.

    The XML prologue, the metadata and the name spaces are left out: HTML needs none of them, and they hold
    web addresses. ``name`` is the figure's label, and keeps its ids apart from those of other figures.
    """
    import matplotlib

    text = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata=nothing)
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"\s*<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", element)
    element = re.sub(r'<g id="[^"]*"', "<g", element)  # nothing refers to groups
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", element)  # glyphs are in every figure
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    return re.sub(r"<svg", f'<svg role="img" aria-label="{name}"', element, count=1).strip()


def all_plots(findings: Findings) -> dict[str, str]:
    """Every plot of the report as SVG, by what it shows.

    Raises: ImportError: matplotlib is not installed.
    """
    with styled():
        figures = {
            "ranks": ranks(findings),
            "accuracy": accuracy(findings),
            "spectra": spectra(findings),
            "latency": latency(findings),
        }
        return {name: svg(figure, name) for name, figure in figures.items() if figure is not None}


def styled() -> AbstractContextManager[None]:
    """The look of the plots.

    Raises: ImportError: matplotlib is not installed.
    """
    import matplotlib

    context: AbstractContextManager[None] = matplotlib.rc_context(_STYLE)
    return context


def _panels(count: int, height: float, columns: int = 3) -> tuple[Figure, Sequence[Axes]]:
    """A figure with ``count`` panels or more in rows of ``columns``; the object interface needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(9.6, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def _line_with_range(panel: Axes, x: Sequence[int], values: Sequence[Sequence[float]], network: str) -> None:
    columns = list(zip(*values, strict=True))
    mean = [sum(column) / len(column) for column in columns]
    panel.plot(x, mean, color=COLOURS[network], label=network)
    if len(values) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        panel.fill_between(x, low, high, color=COLOURS[network], alpha=0.18, linewidth=0)


def _legend(figure: Figure, panels: Sequence[Axes], used: int) -> None:
    """In the first free panel, or else in the first one; free panels vanish."""
    handles, labels = panels[0].get_legend_handles_labels()
    for panel in panels[used:]:
        panel.set_axis_off()
    place = panels[used] if used < len(panels) else panels[0]
    place.legend(handles, labels, loc="center left" if used < len(panels) else "best", fontsize=10)
