"""The latencies of one model as one HTML file without links."""

from __future__ import annotations

import importlib.util
from html import escape

from fxexpand.deploy.latency.measure import LatencyReport
from fxexpand.deploy.latency.plots import latency_bars
from fxexpand.reporting.figures import styled, svg
from fxexpand.reporting.html import bullets, document, table
from fxexpand.reporting.rows import Report
from fxexpand.reporting.table import short


def latency_page(name: str, found: LatencyReport, folded: Report) -> str:
    """The page of ``fxexpand bench``. Without matplotlib it has no plot, and says so."""
    shapes = ", ".join("x".join(map(str, shape)) for shape in found.shapes)
    parts = [
        f"<h1>Latency of {escape(name)}</h1>",
        f'<p class="subtitle">{escape(f"Input {shapes}, {found.dtype}, {found.device}.")}</p>',
        bullets([str(row) for row in found.differences], "verdict"),
    ]
    if importlib.util.find_spec("matplotlib"):
        with styled():
            plot = svg(latency_bars(found), "latency")
        caption = f"Median with its {found.confidence:.0%} interval; shorter is faster."
        parts.append(f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>")
    else:
        parts.append('<p class="note">No plot: run pip install "fxexpand[plots]".</p>')
    parts += [
        "<h2>Figures</h2>",
        table(
            ("model", "backend", "batch", "median, ms", "interval", "peak", "relative error"), _rows(found)
        ),
        '<p class="note">The outputs of all models were compared with those of the first before anything was '
        "timed. Then the models took turns in every round, in a random order, so that drift of the machine "
        "falls on all alike; ratios are those within a round. A difference is real where its interval, which "
        "holds jointly for all of them, excludes 1; otherwise it is noise.</p>",
        *_fused(folded),
        "<h2>Where and how</h2>",
        bullets(
            [
                f"{found.device}, {found.threads} threads, {found.dtype}"
                f"{', TF32' * found.tf32}{', channels last' * found.channels_last}",
                f"{found.rounds} interleaved rounds",
                ", ".join(f"{library} {version}" for library, version in found.versions.items()),
                *map(str, found.unavailable),
            ]
        ),
    ]
    return document(f"fxexpand bench: {name}", parts)


def _fused(folded: Report) -> list[str]:
    """The layers that were fused, and those that were refused."""
    rows = [
        (
            row.site,
            row.kind,
            short(row.params_before),
            short(row.params_after),
            "-" if row.error is None else f"{row.error:.1e}",
        )
        for row in folded.changed
    ]
    head = ("site", "becomes", "parameters", "after", "relative error")
    refusals = [bullets([row.message for row in folded.refusals])] if folded.refusals else []
    return ["<h2>Fused layers</h2>", f"<p>{escape(folded.summary)}</p>", table(head, rows), *refusals]


def _rows(found: LatencyReport) -> list[tuple[str, ...]]:
    return [
        (
            row.model,
            row.backend,
            str(row.batch or "-"),
            f"{row.median:.4g}",
            f"[{row.low:.4g}, {row.high:.4g}]",
            "-" if row.peak_bytes is None else f"{short(row.peak_bytes)}B",
            "-" if row.error is None else f"{row.error:.1e}",
        )
        for row in found.measurements
    ]
