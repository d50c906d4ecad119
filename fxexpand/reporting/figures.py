"""Figures in one style: as files, and as SVG elements without scripts, addresses or fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.reporting.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#4c6a92", "#d9722e", "#6b7280"
COLOURS = {"plain": BLUE, "original": BLUE, "expanded": ORANGE, "fused": "#3a8f6b", "folded back": "#7c6aa8"}
FORMATS = ("svg", "png", "pdf")

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


@contextmanager
def styled() -> Iterator[None]:
    """The style of all plots, as a context and as a decorator.

    Raises: FxExpandError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise FxExpandError('matplotlib is not installed. Run pip install "fxexpand[plots]".') from error
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(
    rows: int, columns: int, *, width: float = 3.2, height: float = 2.5
) -> tuple[Figure, list[Any]]:
    """An empty figure and its axes, row by row; the object interface needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def new_panels(count: int, height: float, columns: int = 3) -> tuple[Figure, list[Any]]:
    """A figure 9.6 inches wide, with ``count`` panels in rows of ``columns``, and empty ones after them."""
    figure, panels = new_figure(-(-count // columns), columns, width=9.6 / columns, height=height)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels


def write_figure(figure: Figure, path: Path) -> Path:
    """Write ``figure`` whole or not at all; the same figure gives the same bytes.

    Raises: SelectionError: a suffix other than svg, png and pdf.
    """
    import matplotlib

    form = path.suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise SelectionError(f"{path}: choose a name that ends in {', '.join('.' + f for f in FORMATS)}.")
    stamps = {"svg": ("Date",), "pdf": ("CreationDate",), "png": ()}[form]
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fxexpand", "svg.fonttype": "path"}):
        figure.savefig(content, format=form, dpi=120, metadata=dict.fromkeys(stamps))
    write_whole(path, content.getvalue())
    return path


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
    for side in ("width", "height"):
        element = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", element, count=1)
    return re.sub(r"<svg", f'<svg role="img" aria-label="{name}"', element, count=1).strip()
