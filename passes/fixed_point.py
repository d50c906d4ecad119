"""Fold until nothing changes: the one loop of ``fuse`` and of the ``Fuse`` pass, and its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxexpand.reporting.rows import Report


def to_fixed_point(fold: Callable[[], Report], earlier: Sequence[Report] = ()) -> Report:
    """Call ``fold`` until it changes nothing: a fold takes readers away, so that more may be merged.

    Args:
        fold: plans and commits one round of folds; its report has their rows.
        earlier: reports of what was done before, to be in the result too.
    """
    reports = [*earlier, fold()]
    while reports[-1].changed:
        reports.append(fold())
    return combined(reports)


def combined(reports: Sequence[Report]) -> Report:
    """One report of rounds one after the other: all that was fused, and what the last one left alone."""
    last = reports[-1]
    fused = [row for report in reports for row in report.changed]
    sites = {row.site for row in fused}
    rest = [row for row in last.rows if row.action == "refused" or row.site not in sites]
    return Report(last.title, (*fused, *(row for row in rest if row not in fused)), last.traced)
