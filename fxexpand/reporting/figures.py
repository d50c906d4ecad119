"""Figures in one style, as SVG elements without scripts, addresses or fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

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


def styled() -> AbstractContextManager[None]:
    """A context with the style of the plots.

    Raises: ImportError: matplotlib is not installed.
    """
    import matplotlib

    context: AbstractContextManager[None] = matplotlib.rc_context(_STYLE)
    return context


def new_panels(count: int, height: float, columns: int = 3) -> tuple[Figure, Sequence[Axes]]:
    """A figure with ``count`` panels or more in rows of ``columns``; the object interface needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(9.6, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def svg(figure: Figure, name: str) -> str:
    """The figure as one ``<svg>`` element to be put into an HTML page.

    The XML prologue, the metadata and the name spaces are left out: HTML needs none of them, and they have
    web addresses. ``name`` is the label of the figure and the prefix of its ids, so that ids of two figures
    differ.
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
