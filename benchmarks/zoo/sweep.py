"""Does every architecture survive? ``python -m benchmarks.zoo LIBRARY|NAME... [--quick]``

One row per architecture of timm, torchvision or transformers: expanded, trained for three steps, folded back
and fused, in float64. Rows are measured in processes of their own with a bound on memory and time: a crash,
a hang or a lack of memory is a row. Each row is on the disk as soon as it is measured; a run that was killed
goes on where it stopped. Without a name: publishes what is there, of a sweep that still runs too, in
``benchmarks/results/zoo.jsonl`` and benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, headline, machine, publish
from benchmarks.processes import rows_of
from benchmarks.zoo.models import LIBRARIES, Entry
from benchmarks.zoo.names import chosen, quick
from benchmarks.zoo.row import RECIPE, measure
from benchmarks.zoo.summary import summary
from fxexpand.reporting.files import write_whole

OUT = FOLDER / "results" / "zoo.jsonl"
RESULT = ("sites", "weights", "covered", "nodes", "params", "flops")  # what a row says even where it is 0


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """``(what the file says of itself, rows by name)``; of two rows of one name the later one counts.

    A line that was cut off by a kill is passed over.
    """
    about: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "benchmark" in found:
            about = found
        else:
            rows[found["name"]] = found
    return about, rows


def append(path: Path, content: dict[str, Any]) -> None:
    """Add one line, which is on the disk when this returns."""
    with open(path, "ab+") as file:
        torn = file.tell() > 0 and _last_byte(file) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(content).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    byte: bytes = file.read(1)
    return byte


def journal_of(out: Path) -> Path:
    """The file that takes rows one by one; the published results change only together with their table."""
    return out.with_stem(f"{out.stem}-journal")


def known(out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """As ``read``, of the results and the journal."""
    (about, rows), (later, more) = read(out), read(journal_of(out))
    return later or about, rows | more


def settle(out: Path) -> None:
    """Take the journal into the results: one line per architecture, in alphabetical order."""
    journal, taken = journal_of(out), out.with_stem(f"{out.stem}-taken")
    if not journal.exists():
        return
    os.replace(journal, taken)  # a sweep that runs begins a new one
    (about, rows), (later, more) = read(out), read(taken)
    rows |= more
    lines = [later or about, *(rows[name] for name in sorted(rows))]
    write_whole(out, "".join(json.dumps(line) + "\n" for line in lines))
    taken.unlink()


def slim(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is written: two digits of each error, and nothing that a good row has by definition."""
    kept: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, bool) or key in ("losses", "missed"):
            continue
        if isinstance(value, float):
            value = float(f"{value:.2g}") if key != "seconds" else round(value, 1)
        if value or key in RESULT or isinstance(value, float) or key == "failures":
            kept[key] = value
    return kept


def sweep(entries: Sequence[Entry], out: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure, write and yield a row for each architecture."""
    about = {"benchmark": "zoo", "version": 1, "machine": {**machine(), "threads": 1}, "recipe": str(RECIPE)}
    append(journal_of(out), about)
    found = rows_of(measure, entries, jobs=options.workers, timeout=options.timeout, memory=options.memory)
    for row in found:
        line = slim(row)
        append(journal_of(out), line)
        yield line


def shown(rows: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """The rows, with a progress bar on a terminal, else with a line for each on stderr."""
    if not sys.stderr.isatty():
        for count, row in enumerate(rows, 1):
            verdict = "; ".join(row["failures"]) or "holds"
            print(
                f"[{count}/{total}] {row['name']} {row['seconds']} s: {verdict}", file=sys.stderr, flush=True
            )
            yield row
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("zoo", total=total)
        for row in rows:
            if row["failures"]:
                bar.console.print(
                    f"{row['name']}: {'; '.join(row['failures'])}", markup=False, highlight=False
                )
            bar.update(task, advance=1, description=row["name"])
            yield row


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"{', '.join(LIBRARIES)}, or names or globs: timm:vit_*")
    parser.add_argument("--quick", action="store_true", help="sixty architectures, nothing published")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--memory", type=float, default=4.0, help="GB that a row may take")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds on the clock for a row")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a row")
    parser.add_argument(
        "--failed",
        action="store_true",
        help="measure again what has a row that failed; without a name all of them",
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/zoo[-quick].jsonl")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, publish; 1 if a promise does not hold of what was asked for."""
    options = _arguments(given)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # advice on configurations, of every process
    out = options.out or (OUT.with_stem("zoo-quick") if options.quick else OUT)
    out.parent.mkdir(parents=True, exist_ok=True)
    if options.quick:
        for path in (out, journal_of(out)):
            path.unlink(missing_ok=True)
    rows = known(out)[1]
    names = options.names or [name for name, row in rows.items() if options.failed and row["failures"]]
    entries = quick() if options.quick else chosen(names)
    done = set() if options.fresh else {name for name, row in rows.items() if not row["failures"]}
    if not options.fresh and not options.failed:
        done = set(rows)
    rest = [entry for entry in entries if str(entry) not in done]
    started = time.monotonic()
    for _ in shown(sweep(rest, out, options), len(rest)) if rest else ():
        pass
    settle(out)
    about, rows = read(out)
    text = summary(list(rows.values()))
    print(f"{headline(about['machine'])}; {about['recipe']}." if about else "")
    print(f"{len(rest)} rows in {time.monotonic() - started:.0f} s, {options.workers} processes\n\n{text}")
    if options.out is None and not options.quick and about:
        publish("zoo", f"{headline(about['machine'])}; {about['recipe']}.\n\n```\n{text}\n```")
    asked = {str(entry) for entry in entries}
    return int(any(row["failures"] for name, row in rows.items() if name in asked))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end too
    sys.exit(main())
