"""The headline figures of README.md and its plot, from ``benchmarks/results``: ``python docs/headline.py``

Nothing is measured here. Each line of the tables carries the command that measured it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "fusing.svg"
PAGES = (ROOT / "README.md", ROOT / "docs" / "comparison.md")
METHODS = ("unfused", "torch.fx", "timm", "fxexpand")
KINDS = ("conv", "linear", "norm", "add")
WRONG = 1e-3  # a relative error that is no rounding
COLOURS = {"torch.fx": "#9ca3af", "timm": "#d9722e", "fxexpand": "#3a8f6b"}


def read(name: str) -> dict[str, Any]:
    """The results of one benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def networks() -> list[dict[str, Any]]:
    """The rows of ``fuse_zoo`` that are networks, not traps."""
    return [row for row in read("fuse_zoo")["rows"] if row["name"].startswith("timm:")]


def fusing_table() -> str:
    """What is left after fusing, per method; counted where every method ran."""
    rows = networks()
    both = [row for row in rows if all("failed" not in row["methods"][method] for method in METHODS)]
    traps = [row for row in read("fuse_zoo")["rows"] if row not in rows]
    lines = [
        f"| on {len(both)} networks | conv | linear | norms | additions | crashes | wrong outputs |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        left = [sum(row["methods"][method][kind] for row in both) for kind in KINDS]
        crashed = sum("failed" in row["methods"][method] for row in rows)
        wrong = [_wrong(group, method) for group in (rows, traps)]
        name = f"`{method}`" if method != "unfused" else "as they are"
        lines.append(
            f"| {name} | {' | '.join(map(str, left))} | {crashed} of {len(rows)} "
            f"| {wrong[0]} of {len(rows)}; {wrong[1]} of {len(traps)} traps |"
        )
    return "\n".join([*lines, "", "`python -m benchmarks.fuse_zoo`, " + _when("fuse_zoo")])


def _wrong(rows: Iterable[dict[str, Any]], method: str) -> int:
    found = (row["methods"][method] for row in rows)
    return sum(max(row.get("error32", 0.0), row.get("error64", 0.0)) > WRONG for row in found)


def roundtrip_table() -> str:
    """What holds of ``fuse(expand(model), scope="expanded")`` after training steps."""
    rows = read("roundtrip")["rows"]
    good = [row for row in rows if not row["failures"]]
    worst = max(row["error64"] for row in rows)
    layers = sum(row["layers"] for row in rows)
    expanded = sum(row["expanded_layers"] for row in rows)
    return "\n".join(
        [
            "| expand, train, fuse back | |",
            "|---|---|",
            f"| networks of timm and torchvision where all holds | {len(good)} of {len(rows)} |",
            f"| Linear and convolution layers expanded | {expanded} of {layers} |",
            f"| worst relative error of the outputs after `expand`, float64 | {worst:.0e} |",
            f"| FLOPs of the fused network = the original's | {_equal(rows)} of {len(rows)} |",
            "",
            "`python -m benchmarks.roundtrip`, " + _when("roundtrip"),
        ]
    )


def zoo_table() -> str:
    """How much of each library survives everything."""
    lines = [json.loads(line) for line in (RESULTS / "zoo.jsonl").read_text(encoding="utf-8").splitlines()]
    about = next(line for line in lines if "benchmark" in line)
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "name" in line:
            rows.setdefault(line["name"].partition(":")[0], []).append(line)
    libraries = sorted(rows)
    whole = [[row for row in rows[name] if "covered" in row] for name in libraries]
    cells = {
        "architectures measured": [str(len(rows[name])) for name in libraries],
        "where all holds": [str(sum(not row["failures"] for row in rows[name])) for name in libraries],
        "weights expanded": [
            f"{sum(row['covered'] for row in found)} of {sum(row['weights'] for row in found)}"
            for found in whole
        ],
    }
    head = [
        f"| expand, train, fold back, fuse | {' | '.join(libraries)} |",
        "|---|" + "---|" * len(libraries),
    ]
    body = [f"| {what} | {' | '.join(values)} |" for what, values in cells.items()]
    return "\n".join([*head, *body, "", "`python -m benchmarks.zoo`, " + _told(about["machine"])])


def _equal(rows: Iterable[dict[str, Any]]) -> int:
    return sum(row["flops"] == row["flops_fused"] for row in rows)


def _when(name: str) -> str:
    return _told(read(name)["machine"])


def _told(about: dict[str, Any]) -> str:
    return f"{about['date']}, {about['processor']}, {about['cores']} cores, torch {about['torch']}."


def tables() -> dict[str, str]:
    """The tables by the name of their markers."""
    return {"fusing": fusing_table(), "roundtrip": roundtrip_table(), "zoo": zoo_table()}


def filled(page: str) -> str:
    """The page with its tables between ``<!-- name -->`` and ``<!-- /name -->`` made anew."""
    for name, text in tables().items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        if opening in page:
            before, _, rest = page.partition(opening)
            page = f"{before}{opening}\n{text}\n{closing}{rest.partition(closing)[2]}"
    return page


def plot() -> str:
    """How many of the operators that a fold can remove are left, per network, as SVG."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    def count(row: dict[str, Any], method: str) -> int | None:
        found = row["methods"][method]
        return None if "failed" in found else sum(found[kind] for kind in KINDS)

    def share(row: dict[str, Any], method: str) -> float | None:
        found = count(row, method)
        return None if found is None else found / (count(row, "unfused") or 1)

    rows = sorted(networks(), key=lambda row: share(row, "fxexpand") or 0.0)
    figure = Figure(figsize=(8, 8.6), layout="constrained")
    axes = figure.subplots()
    for method, size in (("torch.fx", 44), ("timm", 26), ("fxexpand", 26)):
        points = [(share(row, method), place) for place, row in enumerate(rows)]
        kept = [(left, place) for left, place in points if left is not None]
        x, y = zip(*kept, strict=True)
        axes.scatter(x, y, s=size, color=COLOURS[method], label=method, zorder=3)
    axes.set_yticks(range(len(rows)), [row["name"].removeprefix("timm:") for row in rows], fontsize=7.5)
    axes.set_ylim(-1, len(rows))
    axes.set_xlim(0, 1.03)
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.set_xlabel("convolutions + linear + norms + additions left, as a share of the original")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "fusing", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata=nothing)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    PLOT.write_text(plot(), encoding="utf-8")
