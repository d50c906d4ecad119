"""Is there a network that ``fuse`` gets wrong? ``python -m benchmarks.fuzz_fuse [--quick] [--show SEED]``

Random graphs of affine and other operators (``tests/dags.py``), in float64 and in evaluation mode. Of each,
``fxexpand.fuse`` must keep the outputs to a relative 1e-10 and the network it is given as it is, must not add
FLOPs, and must find nothing more to do in its own result. A network that it gets wrong is made smaller and
shown with its seed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evidence import FOLDER, headline, machine, publish, save
from benchmarks.fusing.fuse_zoo import folded
from benchmarks.fusing.operators import KINDS, operators
from fxexpand import report
from fxexpand.reporting.table import table
from fxexpand.running.outputs import tensors_of, worst_error
from tests.dag_operators import seeded_dag
from tests.dags import Dag
from tests.networks import assert_untouched, snapshot

LIMIT = 1e-10
GRAPHS = 10_000
CHUNK = 20  # graphs that a process takes at once
SHOWN = 12  # reasons in the table; all are saved


def check(network: nn.Module, x: Tensor, **options: Any) -> dict[str, Any]:
    """The result of fusing a network, and under ``failures`` the conditions that it breaks.

    The keys before the colon of a failure name what was broken.
    """
    row: dict[str, Any] = {"failures": []}
    failures: list[str] = row["failures"]
    expected, before = _outputs(network, x), snapshot(network)
    row["before"] = operators(network, x)
    stage = "fuse"
    try:
        fused = folded(network, x, **options)
        stage = "the fused network"
        after, executed, flops = _outputs(fused, x), operators(fused, x), _flops(fused, x)
        stage = "fuse again"
        failures += _again(fused, x, executed, options)
    except Exception as error:  # whatever it is
        failures.append(f"{stage} raises {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return row
    found = report(fused)
    row["after"], row["error"] = executed, worst_error(after, expected)
    row["fused"] = dict(Counter(r.kind.split()[0] for r in found.changed if r.kind))
    row["refused"] = dict(Counter(_reason(r.reason) for r in found.refusals))
    row["left"] = dict(Counter(_reason(r.reason) for r in found.rows if r.action == "left"))
    if not row["error"] <= LIMIT:
        failures.insert(0, f"outputs: relative error {row['error']:.3g}")
    if flops > _flops(network, x):
        failures.append(f"FLOPs: {_flops(network, x)} before, {flops} after")
    try:
        assert_untouched(network, before)
    except AssertionError:
        failures.append("input: its state or its modules changed")
    if not all(torch.equal(a, b) for a, b in zip(_outputs(network, x), expected, strict=True)):
        failures.append("input: its outputs changed")
    return row


def _again(fused: nn.Module, x: Tensor, executed: dict[str, int], options: dict[str, Any]) -> list[str]:
    """Failures of a second pass, which must change nothing."""
    once = _outputs(fused, x)
    twice = folded(fused, x, **options)
    found = [f"again: fuses {row.site} ({row.reason})" for row in report(twice).changed]
    if operators(twice, x) != executed:
        found.append(f"again: {executed} before, {operators(twice, x)} after")
    if not all(torch.equal(a, b) for a, b in zip(_outputs(twice, x), once, strict=True)):
        found.append("again: other outputs")
    return found


def smaller(network: Dag, x: Tensor, fails: Callable[[Dag], bool]) -> Dag:
    """A network of fewer steps of which ``fails`` is true too: no single step can go."""
    shrunk = True
    while shrunk:
        shrunk = False
        for candidate in _candidates(network):
            if _runs(candidate, x) and fails(candidate):
                network, shrunk = candidate, True
                break
    return network


def _candidates(network: Dag) -> Iterator[Dag]:
    """With one output; without a step that nothing reads; with a step passed by."""
    steps, returned = network.steps, network.returned
    if len(returned) > 1:
        for i in returned:
            yield network.with_steps(steps, [i])
    for place, step in enumerate(steps):
        rest = [*steps[:place], *steps[place + 1 :]]
        read = {i for other in rest for i in other.inputs}.union(returned)
        if not read.intersection(step.outputs):
            yield network.with_steps(rest, returned)
            continue
        for source in dict.fromkeys(step.inputs):
            instead = {i: source for i in step.outputs}
            passed = [replace(other, inputs=tuple(instead.get(i, i) for i in other.inputs)) for other in rest]
            yield network.with_steps(passed, [instead.get(i, i) for i in returned])


def _runs(network: Dag, x: Tensor) -> bool:
    """Whether it runs, gives numbers that can be compared, and leaves its input as it is."""
    given = x.clone()
    try:
        with torch.no_grad():
            found = tensors_of(network(given))
    except (RuntimeError, ValueError, IndexError):  # shapes that do not fit
        return False
    sound = all(bool(y.isfinite().all()) and float(y.abs().max()) > 1e-3 for y in found)
    return sound and torch.equal(given, x)


def measure(seed: int) -> dict[str, Any]:
    """The row of a seed; a failure comes with the smallest network that was found to fail alike."""
    network, x = seeded_dag(seed)
    row = {"seed": seed, "steps": len(network.steps), **check(network, x)}
    if row["failures"]:
        kind = _kind(row["failures"][0])
        small = smaller(network, x, lambda net: kind in map(_kind, check(net, x)["failures"]))
        row["listing"] = small.listing()
    return row


def _kind(failure: str) -> str:
    return failure.split(":")[0]


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [y.clone() for y in tensors_of(model(x.clone()))]


def _flops(model: nn.Module, x: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(x.clone())
    return int(counter.get_total_flops())


def _reason(reason: str) -> str:
    """Without the numbers and names of one network."""
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "N", re.sub(r"\b[mpv]\d+\b", "it", reason)).rstrip(".")


def _chunk(seeds: Sequence[int]) -> list[dict[str, Any]]:
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return [measure(seed) for seed in seeds]


def rows_of(seeds: Sequence[int], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of the seeds, in order."""
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    if jobs == 1:
        for chunk in chunks:
            yield from _chunk(chunk)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(_chunk, chunks):
            yield from rows


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all graphs."""
    counts: dict[str, Counter[str]] = {
        key: Counter() for key in ("before", "after", "fused", "refused", "left")
    }
    good = [row for row in rows if "after" in row]
    for row in good:
        for key, counter in counts.items():
            counter.update(row[key])
    return {
        "graphs": len(rows),
        "steps": sum(row["steps"] for row in rows),
        "changed": sum(bool(row["fused"]) for row in good),
        "worst_error": max((row["error"] for row in good), default=0.0),
        **{key: dict(counter.most_common()) for key, counter in counts.items()},
        "failures": dict(Counter(_kind(failure) for row in rows for failure in row["failures"])),
        "failed": [row for row in rows if row["failures"]],
    }


def summary(found: dict[str, Any]) -> str:
    """The counts as tables, and what fails."""
    executed = [(kind, str(found["before"].get(kind, 0)), str(found["after"].get(kind, 0))) for kind in KINDS]
    layers = [(kind, str(count)) for kind, count in found["fused"].items()]
    reasons = [
        (str(count), key, reason)
        for key in ("refused", "left")
        for reason, count in list(found[key].items())[:SHOWN]
    ]
    broken = ", ".join(f"{kind} {count}" for kind, count in found["failures"].items())
    return (
        f"{found['graphs']} graphs of {found['steps']} operators; {found['changed']} changed; "
        f"worst relative error {found['worst_error']:.1e}.\n"
        f"Failures: {len(found['failed'])} graphs{f' ({broken})' if broken else ''}.\n\n"
        f"{table(('operators executed', 'before', 'after'), executed)}\n\n"
        f"{table(('new layers', 'count'), layers)}\n\n"
        f"{table(('count', 'sites', 'reason'), reasons, left=(1, 2))}"
    )


def shown(row: dict[str, Any]) -> str:
    """A failing row, to reproduce it."""
    failures = "\n".join(row["failures"])
    return f"seed {row['seed']}:\n{failures}\n{row['listing']}\n"


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="200 graphs, nothing published")
    parser.add_argument("--graphs", type=int, default=GRAPHS)
    parser.add_argument("--seed", type=int, default=0, help="of the first graph")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--show", type=int, metavar="SEED", help="check the network of one seed and print it")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/fuzz_fuse[-quick].json")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if a network fails."""
    options = _arguments(given)
    if options.show is not None:
        network, row = seeded_dag(options.show)[0], measure(options.show)
        print(f"{network.listing()}\n\n{shown(row) if row['failures'] else 'holds'}")
        return int(bool(row["failures"]))
    count = 200 if options.quick else options.graphs
    rows = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("graphs", total=count)
        for row in rows_of(range(options.seed, options.seed + count), options.jobs):
            rows.append(row)
            bar.advance(task)
            if row["failures"]:
                console.print(shown(row), markup=False, highlight=False, soft_wrap=True)
    about, found = machine(), totals(rows)
    text = summary(found)
    print(f"{headline(about)}\n\n{text}")
    out = options.out or FOLDER / "results" / ("fuzz_fuse-quick.json" if options.quick else "fuzz_fuse.json")
    save(out, {"benchmark": "fuzz_fuse", "machine": about, "seed": options.seed, **found})
    if options.out is None and not options.quick and count >= GRAPHS:
        publish("fuzz_fuse", f"{headline(about)}.\n\n```\n{text}\n```")
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
