"""Does the low-rank bias of Huh et al. reproduce? ``python -m benchmarks.low_rank_bias [A B ...] [--quick]``

Each experiment writes its JSON, its plot and its table when it is done; one that has results of the same
settings is not run again (``--again`` runs it all the same), so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.evidence import FOLDER, headline, machine, publish
from benchmarks.low_rank_bias import (
    end_to_end_rule,
    initialisation,
    landscape,
    nonlinearities,
    optimisers,
    teachers,
    training_spectra,
)
from fxexpand.reporting.figures import styled, write_figure
from fxexpand.reporting.files import write_whole
from fxexpand.reporting.table import table

EXPERIMENTS: dict[str, Any] = {
    "A": initialisation,
    "B": teachers,
    "C": optimisers,
    "D": nonlinearities,
    "E": landscape,
    "F": training_spectra,
    "G": end_to_end_rule,
}
PNG = ("E",)  # a filled surface is smaller as pixels
README = Path(__file__).resolve().parent / "README.md"
RESULTS = FOLDER / "results" / "low_rank_bias"


def experiment(key: str, folder: Path, quick: bool) -> tuple[str, dict[str, Any]]:
    """Run one, and write its JSON and its plot."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    begin = time.perf_counter()
    found = EXPERIMENTS[key].run(quick)
    content = {
        "benchmark": f"low_rank_bias {key}",
        "machine": machine(),
        "quick": quick,
        "seconds": round(time.perf_counter() - begin, 1),
        **found,
    }
    save_short(folder / f"{key}.json", content)
    with styled():
        write_figure(EXPERIMENTS[key].plot(content), folder / f"{key}.{'png' if key in PNG else 'svg'}")
    return key, content


def save_short(path: Path, content: dict[str, Any]) -> None:
    """As every benchmark does, but lists of numbers stay on one line: thousands of them are for no reader."""
    whole = {"version": 1, **content}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in whole.items()]
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


def text_of(key: str, content: dict[str, Any]) -> str:
    """The table of one experiment, and how long it took."""
    module = EXPERIMENTS[key]
    first = f"{module.TITLE} ({content['seconds']:.0f} s)"
    return f"{first}\n\n{table(module.HEAD, module.table_rows(content))}"


def known(folder: Path, key: str, quick: bool) -> dict[str, Any] | None:
    """The results of an earlier run of the same kind, if there are any."""
    path = folder / f"{key}.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content if content.get("quick") == quick else None


def page(contents: dict[str, dict[str, Any]]) -> str:
    """The text between the markers of the README: a table and a plot per experiment."""
    parts = [headline(next(iter(contents.values()))["machine"])]
    for key, content in contents.items():
        title, _, rest = text_of(key, content).partition("\n\n")
        suffix = "png" if key in PNG else "svg"
        picture = f"![{title}](../results/low_rank_bias/{key}.{suffix})"
        parts.append(f"### {title}\n\n```\n{rest}\n```\n\n{picture}")
    return "\n\n".join(parts)


def main(given: Sequence[str] | None = None) -> int:
    """Run, print, save; 1 if a claim of the paper does not hold here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="A..G", help="which; all of them by default")
    parser.add_argument("--quick", action="store_true", help="a small part of each, nothing published")
    parser.add_argument("--again", action="store_true", help="run what has results too")
    parser.add_argument("--jobs", type=int, default=1, help="experiments at a time, a process each")
    parser.add_argument(
        "--out", type=Path, help="a folder; default: benchmarks/results/low_rank_bias[-quick]"
    )
    options = parser.parse_args(given)
    wanted = options.experiments or list(EXPERIMENTS)
    if unknown := [key for key in wanted if key not in EXPERIMENTS]:
        parser.error(f"no experiment {unknown[0]!r}: choose from {' '.join(EXPERIMENTS)}")
    folder: Path = options.out or (RESULTS.with_name("low_rank_bias-quick") if options.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    found = {key: None if options.again else known(folder, key, options.quick) for key in wanted}
    todo = [key for key in wanted if found[key] is None]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"experiments {' '.join(todo) or 'done before'}", total=len(todo))
        run = partial(experiment, folder=folder, quick=options.quick)
        if options.jobs > 1 and len(todo) > 1:
            with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
                for future in as_completed([pool.submit(run, key) for key in todo]):
                    key, content = future.result()
                    found[key] = content
                    progress.advance(bar)
        else:
            for key in todo:
                found[key] = run(key)[1]
                progress.advance(bar)
    contents = {key: content for key, content in found.items() if content is not None}
    print("\n\n".join(text_of(key, content) for key, content in contents.items()))
    if not options.quick and options.out is None:
        every = {key: known(folder, key, False) for key in EXPERIMENTS}
        publish("low_rank_bias", page({k: c for k, c in every.items() if c is not None}), README)
    wrong = [line for key, content in contents.items() for line in EXPERIMENTS[key].failures(content)]
    print("\n" + "\n".join(wrong or ["Every claim that is checked holds."]))
    return 0 if options.quick else int(bool(wrong))
