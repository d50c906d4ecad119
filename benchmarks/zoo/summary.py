"""The table of a sweep: per library how many architectures hold, and every reason why one does not."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.zoo.names import file_of, in_order
from fxexpand.reporting.table import table

HEAD = (
    *("library", "rows", "of", "hold", "covered", "weights", "whole", "by mode", "regions"),
    *("expand", "fuse", "nodes", "s", "total h"),
)
SHOWN = 6  # names per reason


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The text that is published.

    ``covered`` counts the rows whose weights are all changed; ``expand`` and ``fuse`` are the largest errors
    of rows in float64 that hold, ``nodes`` is the median of operators after fusing / before.
    """
    libraries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["name"]):
        libraries[row["name"].partition(":")[0]].append(row)
    parts = [table(HEAD, [_line(library, found) for library, found in sorted(libraries.items())])]
    if "timm" in libraries:
        parts.append(_files([row["name"].partition(":")[2] for row in libraries["timm"]]))
    parts.append(_reasons("does not hold", ((row, row["failures"]) for row in rows)))
    refused = ((row, row.get("refused", {})) for row in rows)
    parts.append(_reasons("refused by expand, in a network that holds or not", refused))
    return "\n\n".join(part for part in parts if part)


def _line(library: str, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    measured = [row for row in rows if "covered" in row]
    good = [row for row in measured if not row["failures"]]
    exact = [row for row in good if row.get("dtype", "float64") == "float64"]
    traced = Counter(row["traced"].split()[-1] for row in rows if "traced" in row)
    covered, weights = (sum(row[key] for row in measured) for key in ("covered", "weights"))
    ratios = [row["nodes"][1] / row["nodes"][0] for row in good if row["nodes"][0]]
    return (
        library,
        str(len(rows)),
        str(len(in_order(library))),
        str(len(good)),
        str(sum(row["covered"] == row["weights"] for row in measured)),
        f"{covered}/{weights}",
        *(str(traced[kind]) for kind in ("whole", "mode", "regions")),
        *(f"{max((row[key] for row in exact), default=0.0):.0e}" for key in ("expand_error", "fuse_error")),
        f"{median(ratios):.2f}" if ratios else "-",
        f"{median(row['seconds'] for row in rows):.0f}",
        f"{sum(row['seconds'] for row in rows) / 3600:.1f}",
    )


def _files(names: Sequence[str]) -> str:
    """The number of files of timm with rows, and with two rows if they define two architectures."""
    known = Counter(file_of(entry.name) for entry in in_order("timm"))
    found = Counter(file_of(name) for name in names)
    twice = sum(found[file] >= min(2, count) for file, count in known.items())
    return f"timm: {len(found)} of {len(known)} files, {twice} with two architectures or all they have."


def _reasons(title: str, found: Iterable[tuple[dict[str, Any], Iterable[str]]]) -> str:
    """Each reason with the names it holds for; numbers differ by network and do not part reasons."""
    names: dict[str, list[str]] = defaultdict(list)
    for row, reasons in found:
        for reason in reasons:
            names[re.sub(r"\d[\d.e+-]*", "#", reason)].append(row["name"])
    if not names:
        return ""
    lines = []
    for reason, affected in sorted(names.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        some = ", ".join(affected[:SHOWN]) + (", ..." if len(affected) > SHOWN else "")
        lines.append((str(len(affected)), reason, some))
    return table(("rows", title, "networks"), lines, left=(1, 2))
