"""Verdicts on the rows of ``benchmarks.fuse_zoo``, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxexpand.reporting.table import short, table

COMPARED = ("conv", "linear", "norm", "add")  # fuse leaves no more of these than timm's own method

LIMIT64 = 1e-10
WRONG = 1e-3  # above this an error is no matter of rounding


def exact_enough(row: dict[str, Any], method: str) -> bool:
    """Whether a method kept the outputs, in every dtype that it can be used in."""
    found = row["methods"][method]
    return (
        "failed" not in found and found["error32"] <= row["limit32"] and found.get("error64", 0.0) <= LIMIT64
    )


def _trouble(row: dict[str, Any], method: str) -> str:
    """The failure or the error of a method; "" for none."""
    found = row["methods"][method]
    if "failed" in found:
        return f"fails: {found['failed']}"
    if "failed64" in found and exact_enough(row, method):
        return f"fails in float64: {found['failed64']}"
    if exact_enough(row, method):
        return ""
    error = max(found["error32"], found.get("error64", 0.0))
    if error > WRONG:
        return f"wrong: {error:.2g} relative error"
    dtype = "float32" if found["error32"] > row["limit32"] else "float64"
    return f"inexact: {found[f'error{dtype[5:]}']:.2g} relative error in {dtype}"


def failures(row: dict[str, Any]) -> list[str]:
    """The conditions that ``fxexpand.fuse`` does not meet; empty for a good row.

    A peer that crashes or changes the outputs is no measure of what should be left.
    """
    trouble, mine = _trouble(row, "fxexpand"), row["methods"]["fxexpand"]
    if "failed" in mine:
        return [trouble]
    found = [trouble] if trouble else []
    unfused, timm = row["methods"]["unfused"], row["methods"]["timm"]
    # Parameters may grow: a bias takes the place of a norm without parameters, and a shared layer is two.
    compared: dict[str, tuple[str, ...]] = {"unfused": ("conv", "linear", "norm", "flops")}
    if exact_enough(row, "timm") and any(timm[kind] != unfused[kind] for kind in (*COMPARED, "params")):
        compared["timm"] = (*COMPARED, "params", "flops")
    for method, kinds in compared.items():
        theirs = row["methods"][method]
        found += [
            f"{kind}: {mine[kind]}, {method} {theirs[kind]}" for kind in kinds if mine[kind] > theirs[kind]
        ]
    return found


def summary(rows: Sequence[dict[str, Any]], lacking: Sequence[str] = ()) -> str:
    """The table of all rows, and lines that count."""
    head = (
        *("network", "method", "conv", "linear", "norm", "add", "params", "FLOPs"),
        *("float32", "float64", "eager", "ort", "s", "verdict"),
    )
    lines = []
    for row in sorted(rows, key=lambda row: row["name"]):
        if "methods" not in row:
            lines.append((row["name"], *["-"] * 12, "; ".join(row["failures"])))
            continue
        for method, found in row["methods"].items():
            verdict = _trouble(row, method)
            if method == "fxexpand":
                verdict = "; ".join(row["failures"]) or "holds"
            if "failed" in found:
                lines.append((row["name"], method, *["-"] * 11, verdict))
                continue
            lines.append(
                (
                    row["name"],
                    method,
                    *(str(found[kind]) for kind in COMPARED),
                    short(found["params"]),
                    short(found["flops"]),
                    f"{row['noise32']:.0e}*" if method == "unfused" else f"{found['error32']:.0e}",
                    f"{found['error64']:.0e}" if "error64" in found else "-",
                    *(_ratio(found.get(backend)) for backend in ("eager", "onnxruntime")),
                    f"{found['seconds']:.2f}" if method != "unfused" else "-",
                    verdict,
                )
            )
    good = sum(not row["failures"] for row in rows)
    text = f"{table(head, lines, left=(0, 1, 13))}\n\n{good} of {len(rows)} networks: everything holds."
    for method in ("torch.fx", "timm"):
        found = [_trouble(row, method) for row in rows if "methods" in row]
        failed = sum(reason.startswith("fails") for reason in found)
        wrong = sum(reason.startswith(("wrong", "inexact")) for reason in found)
        text += f"\n{method}: {failed} fail, {wrong} wrong or inexact."
    return f"{text}\nNot in this timm: {', '.join(lacking)}." if lacking else text


def _ratio(found: Any) -> str:
    if found is None:
        return "-"
    return f"{found['ratio']:.2f}" if isinstance(found, dict) else "fails"


def growth_table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds to fuse, and per node."""
    head = ("network", "nodes", "left", "params", "fuse s", "ms / node")
    lines = [
        (
            row["name"],
            str(row["nodes"]),
            str(row["left"]),
            short(row["params"]),
            f"{row['seconds']:.2f}",
            f"{1e3 * row['seconds'] / row['nodes']:.2f}",
        )
        for row in rows
    ]
    return table(head, lines)
