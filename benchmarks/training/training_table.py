"""The table of training steps, and what of the targets does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxexpand.reporting.table import short, table

BATCHES = 4  # micro-batches of one accumulated step
ABOVE_FLOOR = 1.15
# (network, size, batch, depth, width, device): the highest ratios of auto and of accumulate to the original.
TARGETS: dict[tuple[Any, ...], dict[str, float]] = {
    ("torchvision:resnet18", 64, 32, 3, 1, "cpu"): {"auto": 1.5, "accumulate": 1.25},
    ("torchvision:resnet18", 64, 32, 3, 4, "cpu"): {"auto": 4.0, "accumulate": 3.0},
    ("torchvision:resnet18", 224, 256, 3, 2, "cuda"): {"auto": 1.10},
    ("torchvision:resnet50", 224, 256, 3, 2, "cuda"): {"auto": 1.10},
}
HEAD = (
    *("network", "px", "batch", "(d, w)", "form", "params", "GFLOPs", "ms", "x original", "+-", "floor"),
    *("/ floor", "kept MB", "products", "peak MB", "allowed", "verdict"),
)


def verdicts(row: dict[str, Any]) -> list[str]:
    """The limits that a row of auto or accumulate exceeds; empty for other rows."""
    found: list[str] = []
    if row.get("failed"):
        return [row["failed"]]
    if row["name"] not in ("auto", "accumulate"):
        return found
    key = tuple(row[name] for name in ("network", "size", "batch", "depth", "width", "device"))
    ratio = row["ratio"][1]
    limit = TARGETS.get(key, {}).get(row["name"])
    if limit is not None and ratio > limit:
        found.append(f"{ratio:.2f} of the original, not {limit:g}")
    if ratio > ABOVE_FLOOR * row["floor"]:
        found.append(f"{ratio / row['floor']:.2f} of the floor")
    # Where both do the same, one is as often the faster; what counts is three rounds out of four.
    found += [
        f"{middle:.2f} of {rival}"
        for rival, (lower, middle, _) in row.get("against", {}).items()
        if lower > 1.0
    ]
    if row["name"] == "auto" and row["peak_bytes"] > row["allowed_bytes"]:
        found.append(f"{row['peak_bytes'] / row['allowed_bytes']:.2f} of the memory allowed")
    return found


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The limits that are exceeded, in words; the failure of a rival does not count."""
    return [
        f"{row['network'].partition(':')[2]} {row['size']} px, batch {row['batch']}, "
        f"({row['depth']}, {row['width']:g}), {row['name']}: {'; '.join(found)}"
        for row in rows
        if row["name"] in ("auto", "accumulate", "all") and (found := verdicts(row))
    ]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and what does not hold."""
    missed = misses(rows)
    verdict = "\n".join(["Not reached:", *missed]) if missed else "Every target is reached."
    return f"{table(HEAD, [_cells(row) for row in rows], left=(0, 4, len(HEAD) - 1))}\n\n{verdict}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    case = (
        row["network"].partition(":")[2],
        str(row["size"]),
        str(row["batch"]),
        f"({row['depth']}, {row['width']:g})",
        row["name"],
    )
    found = "; ".join(verdicts(row))
    static = (
        short(row["params"]) if "params" in row else "-",
        f"{row['flops'] / 1e9:.3g}" if "flops" in row else "-",
    )
    kept = [_megabytes(row.get(name)) for name in ("kept_activations", "kept_products")]
    if row.get("failed"):
        return (*case, *static, *("-",) * 5, *kept, "-", "-", found)
    lower, middle, upper = row["ratio"]
    floor = row.get("floor")
    ours = row["name"] in ("auto", "accumulate")
    return (
        *case,
        *static,
        f"{1e3 * row['seconds']:.0f}",
        f"{middle:.2f}",
        f"{(upper - lower) / 2:.2f}",
        f"{floor:.2f}" if floor else "-",
        f"{middle / floor:.2f}" if floor else "-",
        *kept,
        _megabytes(row["peak_bytes"]),
        _megabytes(row["allowed_bytes"]) if row["name"] == "auto" else "-",
        found or ("holds" if ours else ""),
    )


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f}"
