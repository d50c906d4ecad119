"""Progress on stderr, for work that may take more than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

T = TypeVar("T")


def bars(progress: bool | None, *columns: ProgressColumn | str, **options: Any) -> Progress:
    """rich's bars on stderr, gone at the end: always, never, or (None) on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    shown = sys.stderr.isatty() if progress is None else progress
    # sys.stderr is read here: while models run, their own output to stderr is redirected.
    return Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not shown, **options)


def progress_bar(title: str, progress: bool | None) -> Callable[[Iterable[T]], Iterable[T]]:
    """Show a progress bar on stderr: always, never, or on a terminal once two seconds have passed."""

    def track(items: Iterable[T]) -> Iterator[T]:
        listed = list(items)
        start, shown = time.monotonic(), progress is True
        with bars(progress) as bar:
            task = bar.add_task(title, total=len(listed), visible=shown)
            for item in listed:
                yield item
                shown = shown or time.monotonic() - start > 2.0
                bar.update(task, advance=1, visible=shown)

    return track


@contextmanager
def at_work(title: str, progress: bool | None) -> Iterator[Callable[[str], None]]:
    """A progress bar for an unknown amount of work; the function that it gives shows the name of a step."""
    from rich.markup import escape
    from rich.progress import BarColumn, TimeElapsedColumn

    start = time.monotonic()
    with bars(progress, "{task.description}", BarColumn(), TimeElapsedColumn(), "{task.fields[name]}") as bar:
        task = bar.add_task(title, total=None, visible=progress is True, name="")

        def show(name: str) -> None:
            visible = progress is True or time.monotonic() - start > 2.0
            bar.update(task, name=escape(name), visible=visible)

        yield show
