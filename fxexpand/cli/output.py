"""Results go to stdout, everything else to stderr, in 80 columns without colours."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from fxexpand.reporting.rows import Report, Row

WIDTH = 80
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def show(text: str, as_json: bool, values: Mapping[str, Any]) -> None:
    """Print the result of a command: the text, or the values as JSON; nothing else is on stdout.

    Raises: OSError: stdout cannot be written to, for example as the disk is full.
    """
    typer.echo(json.dumps(values, indent=1, allow_nan=False) if as_json else text)


def note(text: str) -> None:
    """Print something beside the result, on stderr."""
    typer.echo(text, err=True)


@contextlib.contextmanager
def stdout_kept() -> Iterator[None]:
    """Send the prints of a model and of libraries to stderr: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def working(task: str) -> Iterator[None]:
    """Show on a terminal the task that is at work, and for how long."""
    from rich.progress import SpinnerColumn, TimeElapsedColumn

    from fxexpand.reporting.progress import bars

    with bars(None, SpinnerColumn(), "{task.description}", TimeElapsedColumn()) as bar:
        bar.add_task(task, total=None)
        yield


def sites(report: Report, *, every: bool = True) -> str:
    """A report in 80 columns: a table of the changed sites, and the others by their reason.

    Args:
        every: list each site; otherwise two for each reason, and how many there are.
    """
    parts = [report.summary]
    if every and report.changed:
        parts.append(_changed(report))
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        if row.action in ("refused", "left"):
            reasons.setdefault((row.action, _NUMBER.sub("0", row.reason)), []).append(row)
    for group in sorted(reasons.values(), key=lambda group: group[0].action != "refused"):
        parts.append(wrapped(f"{group[0].action}: {_reason([row.reason for row in group])}"))
        names = [row.site for row in group]
        named = names if every else names[:2]
        more = f" and {len(names) - len(named)} more" if len(names) > len(named) else ""
        parts.append(wrapped(", ".join(named) + more, "    "))
    return "\n".join(parts)


def fitted(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """A table in 80 columns; a name (the first cell) that is too long has a line of its own."""
    from fxexpand.reporting.table import table

    taken = sum(2 + max(len(row[i]) for row in (head, *rows)) for i in range(1, len(head)))
    room = max(WIDTH - taken, len(head[0]))
    short = [("" if len(row[0]) > room else row[0], *row[1:]) for row in rows]
    lines = table(head, short, left=left).splitlines()
    found = lines[:2]
    for row, line in zip(rows, lines[2:], strict=True):
        found += [row[0], line] if len(row[0]) > room else [line]
    return "\n".join(found)


def _changed(report: Report) -> str:
    """The table of the changed sites."""
    from fxexpand.reporting.table import short

    head = ("site", "becomes" if report.title == "fuse" else "kind", "params", "after", "error")
    last = len(head) - (report.worst_error is None)
    rows = []
    for row in report.changed:
        error = "-" if row.error is None else f"{row.error:.0e}"
        cells = (row.site, row.kind, short(row.params_before), short(row.params_after), error)
        rows.append(cells[:last])
    return fitted(head[:last], rows, left=(0, 1))


def _reason(reasons: list[str]) -> str:
    """One reason for several that differ in a number; else the first of them."""
    first = reasons[0].rstrip(".")
    numbers = sorted({match[0] for reason in reasons if (match := _NUMBER.search(reason))}, key=float)
    return _NUMBER.sub(f"{numbers[0]} to {numbers[-1]}", first, count=1) if len(numbers) > 1 else first


def wrapped(text: str, indent: str = "  ") -> str:
    """Lines of at most 80 columns; all but the first are indented further."""
    indents = (indent, f"{indent}  ")
    return textwrap.TextWrapper(WIDTH, *indents, break_long_words=False, break_on_hyphens=False).fill(text)


def columns(text: str) -> str:
    """The text with its long lines broken at 80 columns."""
    return "\n".join(line if len(line) <= WIDTH else wrapped(line, "") for line in text.splitlines())
