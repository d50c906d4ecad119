"""Low rank in l_p against the SVD: ``python -m benchmarks.lp_low_rank [--quick]``

Matrices with a few outlier rows, over several draws, and a table of 30,000 x 768. Errors are relative, over
all entries, in l_1 and in l_2, without any further training; seconds include everything.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from fxexpand import factorize
from fxexpand.lowrank.criteria import METHODS
from fxexpand.lowrank.lp import LOWNER_UP_TO, lp_error, lp_spectrum
from fxexpand.lowrank.projection import Spectrum, spectrum
from fxexpand.reporting.table import table
from fxexpand.training.demo.findings import Spread

Way = Callable[[Tensor], Spectrum]
WAYS: dict[str, Way] = {
    "SVD": spectrum,
    "lp p=1.5": partial(lp_spectrum, p=1.5),
    "lp p=1": partial(lp_spectrum, p=1.0),
    "lp p=1, Löwner": partial(lp_spectrum, p=1.0, body="lowner"),
}


def drawn(rows: int, columns: int, rank: int, outliers: float, size: float, seed: int) -> Tensor:
    """Power-law singular values of ``rank`` directions, noise, and a share of rows that are outliers.

    Args:
        outliers: the share of rows to which a random direction is added.
        size: of that, in norms of an ordinary row.
    """
    generator = torch.Generator().manual_seed(seed)
    strength = torch.arange(1, rank + 1).float() ** -0.7
    left = torch.randn(rows, rank, generator=generator) * strength
    matrix = left @ torch.randn(rank, columns, generator=generator)
    norm = float(matrix.norm() / rows**0.5)
    matrix += 0.2 * norm / columns**0.5 * torch.randn(rows, columns, generator=generator)
    count = round(outliers * rows)
    odd = torch.randperm(rows, generator=generator)[:count]
    direction = torch.randn(count, columns, generator=generator)
    matrix[odd] += size * norm * direction / direction.norm(dim=1, keepdim=True)
    return matrix


def measure(name: str, matrix: Tensor, rank: int) -> dict[str, Any]:
    """Errors and seconds of one way on one matrix."""
    start = time.perf_counter()
    approximation = WAYS[name](matrix[None]).projected(rank)[0]
    seconds = time.perf_counter() - start
    errors = {f"l{p:g}": lp_error(matrix, approximation, p) for p in (1.0, 2.0)}
    return {"way": name, "seconds": seconds, **errors}


def sweep(cases: Sequence[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Every way on every draw of every case."""
    found = []
    for case in cases:
        print(f"{case} ...", file=sys.stderr, flush=True)
        for seed in range(case.get("seeds", seeds)):
            matrix = drawn(case["rows"], case["columns"], case["true"], case["outliers"], case["size"], seed)
            for name in WAYS:
                if "Löwner" not in name or case["columns"] <= LOWNER_UP_TO:
                    found.append({**case, "seed": seed, **measure(name, matrix, case["rank"])})
    return found


def as_layers(seeds: int) -> list[dict[str, Any]]:
    """``factorize`` on an Embedding with outlier rows: rank 8, by SVD and by l_1."""
    found = []
    for seed in range(seeds):
        layer = nn.Embedding(2000, 64, _weight=drawn(2000, 64, 8, 0.02, 30.0, seed))
        for method in METHODS[:2]:
            small: Any = factorize(nn.Sequential(layer), rank=8, method=method)
            weight = small[0].weight.detach()
            found.append({"seed": seed, "method": method, "l1": lp_error(layer.weight.detach(), weight, 1.0)})
    return found


def tables(rows: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]]) -> str:
    """One line per case and way, over the draws."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = row["rows"], row["columns"], row["rank"], row["outliers"], row["size"], row["way"]
        groups.setdefault(key, []).append(row)
    body = [
        (
            f"{n} x {d}",
            str(rank),
            f"{outliers:.0%} x{size:g}" if outliers else "none",
            way,
            *(Spread.of([row[p] for row in some]).text(3) for p in ("l1", "l2")),
            f"{sum(row['seconds'] for row in some) / len(some):.3g}",
            str(len(some)),
        )
        for (n, d, rank, outliers, size, way), some in groups.items()
    ]
    head = ("matrix", "rank", "outliers", "way", "error in l1", "in l2", "s", "draws")
    changes = {
        m: Spread.of([row["l1"] for row in layers if row["method"] == m]).text(3) for m in ("svd", "lp")
    }
    return (
        f"{table(head, body, left=(0, 2, 3))}\n\n"
        f"factorize(Embedding 2000x64 with 2% outliers x30, rank=8): error in l1 {changes['svd']} by svd, "
        f"{changes['lp']} by lp."
    )


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small matrices, nothing published")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/lp_low_rank.json")
    options = parser.parse_args(given)
    small = [
        {"rows": 500, "columns": d, "true": d // 4, "rank": d // 4, "outliers": o, "size": s}
        for d in (16, 32)
        for o, s in ((0.0, 0.0), (0.02, 30.0))
    ]
    cases = small[:2] if options.quick else small
    if not options.quick:
        cases += [
            {"rows": 3072, "columns": 768, "true": 96, "rank": 96, "outliers": o, "size": s, "seeds": 3}
            for o, s in ((0.0, 0.0), (0.01, 30.0))
        ]
        cases += [
            {"rows": 30_000, "columns": 768, "true": 200, "rank": 200, "outliers": o, "size": s, "seeds": 1}
            for o, s in ((0.0, 0.0), (0.01, 30.0))
        ]
    rows, layers = sweep(cases, 2 if options.quick else options.seeds), as_layers(2 if options.quick else 5)
    about, text = machine(), tables(rows, layers)
    print(f"{headline(about)}\n\n{text}")
    out = options.out or FOLDER / "results" / f"lp_low_rank{'-quick' if options.quick else ''}.json"
    save(out, {"benchmark": "lp_low_rank", "machine": about, "rows": rows, "layers": layers})
    if not options.quick and options.out is None:
        publish("lp_low_rank", f"{headline(about)}\n\n```\n{text}\n```")
    return 0


if __name__ == "__main__":
    sys.exit(main())
