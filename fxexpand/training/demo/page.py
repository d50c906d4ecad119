"""The findings of the demo as one HTML file without links."""

from __future__ import annotations

import importlib.util

from fxexpand.reporting.html import page
from fxexpand.training.demo.findings import Findings
from fxexpand.training.demo.plots import all_plots


def html(findings: Findings) -> str:
    """The page. Without matplotlib it has no plots, and says so."""
    plots = all_plots(findings) if importlib.util.find_spec("matplotlib") else {}
    title = f"fxexpand demo: {findings.title}"
    return page("training/demo/page.html", title=title, found=findings, plots=plots)
