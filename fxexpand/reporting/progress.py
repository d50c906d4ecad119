"""Progress on stderr, for work that may take more than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def shows(progress: bool | None) -> bool:
    """Whether to show progress: as asked for, and for None if stderr is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def progress_bar(title: str, progress: bool | None) -> Callable[[Iterable[T]], Iterable[T]]:
    """Show a progress bar on stderr: always, never, or on a terminal once two seconds have passed."""

    def track(items: Iterable[T]) -> Iterator[T]:
        listed = list(items)
        if not shows(progress):
            yield from listed
            return
        from rich.console import Console
        from rich.progress import Progress

        start, shown = time.monotonic(), progress is True
        with Progress(console=Console(stderr=True), transient=True, disable=False) as bar:
            task = bar.add_task(title, total=len(listed), visible=shown)
            for item in listed:
                yield item
                shown = shown or time.monotonic() - start > 2.0
                bar.update(task, advance=1, visible=shown)

    return track


@contextmanager
def at_work(title: str, progress: bool | None) -> Iterator[Callable[[str], None]]:
    """A progress bar for an unknown amount of work; the function that it gives shows the name of a step."""
    if not shows(progress):
        yield lambda name: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    now = TextColumn("{task.fields[name]}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), now)
    start = time.monotonic()
    # sys.stderr is read here: while models run, their own output to stderr is redirected.
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=None, visible=progress is True, name="")

        def show(name: str) -> None:
            visible = progress is True or time.monotonic() - start > 2.0
            bar.update(task, name=escape(name), visible=visible)

        yield show
