"""The result of a pass at each site: its action, and the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fxexpand.reporting.table import short, table

Action: TypeAlias = str  # one of UNCHANGED, or what the pass did to the site: a verb in the past tense
REFUSED, LEFT = "refused", "left"
UNCHANGED = (REFUSED, LEFT)


@dataclass(frozen=True)
class Row:
    """The result at one site.

    Attributes:
        site: the dotted name of the module or parameter.
        kind: its type and sizes: ``Conv2d 64->64 k3 p1``.
        action: ``"refused"``: impossible, for the given ``reason``; ``"left"``: not asked for, or no weight
            of a linear map; any other verb: changed, as in ``"expanded"``, ``"fused"``, ``"factorized"``.
        reason: the reason of a refusal; for a changed site, the result.
        params_before, params_after: number of elements of the parameters of the site.
        error: relative error on a random probe in float64; for a factorized layer, that of the weight in the
            Frobenius norm; None where nothing was measured.
    """

    site: str
    kind: str
    action: Action
    reason: str = ""
    params_before: int = 0
    params_after: int = 0
    error: float | None = None

    @property
    def message(self) -> str:
        """The row as one sentence, as errors print it."""
        verb = {REFUSED: "not changed", LEFT: "left alone"}.get(self.action, self.action)
        where = f"{self.site} ({self.kind})" if self.kind else self.site
        reason = self.reason.rstrip(".")
        return f"{where}: {verb}: {reason}." if reason else f"{where}: {verb}."


@dataclass(frozen=True)
class Report:
    """The rows of one pass over one model, in the model's order.

    Attributes:
        traced: whether the pass read the model as one graph, or in parts and why; "" if it needs no graph.
    """

    title: str
    rows: tuple[Row, ...]
    traced: str = ""

    @property
    def changed(self) -> tuple[Row, ...]:
        """The sites that were rewritten."""
        return tuple(row for row in self.rows if row.action not in UNCHANGED)

    @property
    def refusals(self) -> tuple[Row, ...]:
        """The sites that could not be rewritten, with their reasons."""
        return tuple(row for row in self.rows if row.action == REFUSED)

    @property
    def worst_error(self) -> float | None:
        """The largest error of any site; None when none was measured."""
        return max((row.error for row in self.rows if row.error is not None), default=None)

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.title}: no site"
        rows = [
            (
                row.site,
                row.kind,
                row.action,
                short(row.params_before) if row.params_before else "-",
                short(row.params_after) if row.params_after else "-",
                "-" if row.error is None else f"{row.error:.1e}",
                row.reason.rstrip("."),
            )
            for row in self.rows
        ]
        head = ("site", "kind", "action", "params", "after", "error", "reason")
        traced = f"traced {self.traced}\n" if self.traced else ""
        return f"{self.summary}\n{traced}{table(head, rows, left=(0, 1, 2, 6))}"

    @property
    def summary(self) -> str:
        """One line with the number of sites per action."""
        counts = Counter(row.action for row in self.rows)
        order = [*(action for action in counts if action not in UNCHANGED), *UNCHANGED]
        parts = [f"{counts[action]} {action}" for action in order if counts[action]]
        return f"{self.title}: {', '.join(parts) or 'no site'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(plain(self))


def plain(value: Any) -> Any:
    """A value as JSON has it: a dataclass as an object of its fields, a tuple as an array, a path as text."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
