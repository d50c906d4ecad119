"""The findings of the demo as one HTML file without links."""

from __future__ import annotations

import importlib.util
from html import escape

from fxexpand.reporting.html import bullets, document, table
from fxexpand.training.demo.findings import NETWORKS, Findings
from fxexpand.training.demo.plots import all_plots

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
        bullets(findings.verdict, "verdict"),
        "<h2>Method</h2>",
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
        table(("", *NETWORKS, "change"), findings.rows()),
        f'<p class="note">{_notes(findings)}</p>',
        "<h2>Proofs</h2>",
        _proofs(findings),
    ]
    for name, title, caption in _PLOTS:
        if name in plots:
            text = escape(caption.format(spread=spread))
            parts.append(f"<h2>{title}</h2><figure>{plots[name]}<figcaption>{text}</figcaption></figure>")
    if findings.skipped:
        parts += ["<h2>Skipped</h2>", bullets(findings.skipped)]
    parts += ["<h2>Where and how</h2>", bullets(_conditions(findings))]
    return document(f"fxexpand demo: {findings.title}", parts)


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
    return table(head, rows) + note + (bullets(problems, "failed") if problems else "")


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
