"""The demo's findings as one HTML file that needs nothing but itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from html import escape

from fxexpand.findings import NETWORKS, Findings
from fxexpand.plots import all_plots

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; color: #1f2937;
       background: #fff; max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
p, ul { max-width: 46rem; }
.subtitle, figcaption, .note { color: #4b5563; }
.note, figcaption { font-size: .9rem; }
.verdict { background: #f3f4f6; border-left: 4px solid #4c6a92; padding: .8rem 1.1rem; max-width: none;
           list-style: none; margin: 1.2rem 0; }
.verdict li + li { margin-top: .35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; margin: .6rem 0; }
th, td { padding: .32rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e7eb; }
th { color: #4b5563; font-weight: 600; border-bottom: 2px solid #9ca3af; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.failed { color: #b91c1c; font-weight: 700; }
figure { margin: .6rem 0 0; }
svg { width: 100%; height: auto; display: block; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .9em; }
"""

_PLOTS = (
    (
        "ranks",
        "Effective rank of each layer during training",
        "The exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007) of the "
        "weight; for the expanded network, of the product of its factors. Axes do not start at 0.{spread}",
    ),
    (
        "accuracy",
        "Accuracy and loss",
        "Both networks start from the same function and see the same batches.{spread}",
    ),
    (
        "spectra",
        "Singular values at the end of training",
        "Of the network with seed 0, each divided by the largest of its layer.",
    ),
    (
        "latency",
        "Latency of one image",
        "Median, with its 95 % interval. The networks take turns in every round; their outputs are compared "
        "first. The plain network here holds the fused weights.",
    ),
)


def html(findings: Findings) -> str:
    """The page. Without matplotlib it has no plots, and says so."""
    plots = all_plots(findings) if importlib.util.find_spec("matplotlib") else {}
    spread = " The band is the range over the seeds." if len(findings.runs) > 1 else ""
    train, test = findings.sizes
    parts = [
        "<h1>The same network, trained plain and expanded</h1>",
        f'<p class="subtitle">{escape(findings.title)}</p>',
        _list(findings.verdict, "verdict"),
        "<h2>What was done</h2>",
        f"<p>The network has {escape(findings.network)}. It was trained twice per seed on {train} of "
        f"{train + test} images ({escape(findings.data)}; a new split for every seed, stratified by "
        f"class): once as it is, and once after <code>fxexpand.expand</code> with the recipe "
        f"<code>{escape(findings.recipe)}</code>, which turns every convolution and Linear layer into a "
        "chain of trainable linear maps without changing the function. Everything else was the same: start, "
        f"batches of {findings.schedule.batch_size}, {findings.schedule.epochs} epochs of Adam without "
        f"weight decay, learning rate from {findings.schedule.lr:g} to 0 along a cosine. The other {test} "
        "images were never trained on; accuracy is that after the last epoch, not the best one. Then "
        "<code>fxexpand.fuse</code> multiplied each chain out into one layer.</p>",
        "<h2>Figures</h2>",
        _table(("", *NETWORKS, "change"), findings.rows()),
        f'<p class="note">{_notes(findings)}</p>',
        "<h2>Proofs</h2>",
        _proofs(findings),
    ]
    for name, title, caption in _PLOTS:
        if name in plots:
            text = escape(caption.format(spread=spread))
            parts.append(f"<h2>{title}</h2><figure>{plots[name]}<figcaption>{text}</figcaption></figure>")
    if findings.skipped:
        parts += ["<h2>Skipped</h2>", _list(findings.skipped)]
    parts += ["<h2>Where and how</h2>", _list(_conditions(findings))]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fxexpand demo: {escape(findings.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _notes(findings: Findings) -> str:
    count = len(findings.runs)
    if count < 2:
        return "One seed: no spread. Change is expanded minus plain; for ratios, fused against plain."
    return (
        f"± is the standard deviation over {count} seeds. Change is expanded minus plain, paired by seed; "
        "for parameters, FLOPs and latency, fused against plain; for training steps, expanded against plain."
    )


def _proofs(findings: Findings) -> str:
    rows = []
    for proof in findings.proofs:
        absolute = "" if proof.absolute is None else f"{proof.absolute:.1e}"
        holds = "yes" if proof.holds else "NO"
        rows.append((proof.claim, proof.amount, absolute, f"{proof.limit:g}", holds))
    note = (
        '<p class="note">Errors of logits are the largest deviation divided by the largest logit; counts add '
        "up over the seeds. The files are those of seed 0.</p>"
    )
    problems = [f"{proof.claim}: {proof.problem}" for proof in findings.failed if proof.problem]
    head = ("claim", "measured", "absolute", "at most", "holds")
    return _table(head, rows) + note + (_list(problems, "failed") if problems else "")


def _conditions(findings: Findings) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in findings.versions.items())
    lines = [f"Device: {findings.device}; {versions}; {findings.seconds:.0f} seconds in all."]
    if findings.latency is not None:
        report = findings.latency
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        lines.append(
            f"Latency: {report.device}, {report.threads} threads, {report.dtype}, batch {report.batch}, "
            f"{report.rounds} interleaved rounds; {versions}."
        )
    lines.append("Files: " + ", ".join(findings.files))
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str], tag: str) -> str:
        cells = (
            f'<{tag} class="failed">{escape(cell)}</{tag}>'
            if cell == "NO"
            else f"<{tag}>{escape(cell)}</{tag}>"
            for cell in row
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>\n{line(head, "th")}\n{body}\n</table></div>'


def _list(lines: Sequence[str], kind: str = "") -> str:
    opening = f'<ul class="{kind}">' if kind else "<ul>"
    return opening + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
