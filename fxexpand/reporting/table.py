"""Plain-text tables and short numbers, as every report prints them."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Rows under a head, columns aligned; the columns in ``left`` are flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])


def short(count: float) -> str:
    """A count with three digits and a metric prefix: 1814073344 is ``1.81 G``."""
    value = float(count)
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            digits = 0 if not prefix and value == int(value) else max(0, 3 - len(str(int(abs(value)))))
            return f"{value:.{digits}f} {prefix}".rstrip()
        value /= 1000.0
    return f"{value:.3g} P"
