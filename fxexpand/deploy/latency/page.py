"""The latencies of one model as one HTML file without links."""

from __future__ import annotations

import importlib.util

from fxexpand.deploy.latency.measure import LatencyReport
from fxexpand.deploy.latency.plots import latency_bars
from fxexpand.reporting.figures import styled, svg
from fxexpand.reporting.html import page
from fxexpand.reporting.rows import Report


def latency_page(name: str, found: LatencyReport, folded: Report) -> str:
    """The page of ``fxexpand bench``. Without matplotlib it has no plot, and says so."""
    plot = ""
    if importlib.util.find_spec("matplotlib"):
        with styled():
            plot = svg(latency_bars(found), "latency")
    values = {"title": f"fxexpand bench: {name}", "name": name, "found": found, "folded": folded}
    return page("deploy/latency/page.html", **values, plot=plot)
