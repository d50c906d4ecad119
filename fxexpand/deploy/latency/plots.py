"""The plot of a latency report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxexpand.deploy.latency.measure import LatencyReport
from fxexpand.reporting.figures import COLOURS, GREY, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def latency_bars(report: LatencyReport) -> Figure:
    """Median latency with its interval, one panel per backend and batch size; no bar where there is none."""
    measured = {(row.model, row.backend, row.batch): row for row in report.measurements}
    places = list(dict.fromkeys((row.backend, row.batch) for row in report.measurements))
    several = len({batch for _, batch in places}) > 1
    networks = list(dict.fromkeys(row.model for row in report.measurements))[::-1]
    columns = min(len(places), 2)
    figure, panels = new_panels(len(places), height=0.7 + 0.4 * len(networks), columns=columns)
    for panel, (backend, batch) in zip(panels, places, strict=False):
        for place, network in enumerate(networks):
            row = measured.get((network, backend, batch))
            if row is None:
                panel.text(0, place, "  not available", va="center", ha="left", fontsize=9, color=GREY)
                continue
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
