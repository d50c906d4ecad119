"""A command that fails prints one line on stderr and ends with an exit code; a traceback is on request."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import NoReturn

import typer

_LONGEST = 400  # characters of the message of another library: those of torch run to pages


def fail(message: str, code: int = 1) -> NoReturn:
    """End the command with one line on stderr."""
    typer.echo(f"fxexpand: {' '.join(_of_worker(message).split())}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn every exception of the body into one line and an exit code; with ``debug``, let it through."""
    if debug:
        yield
        return
    from fxexpand.errors import FxExpandError, SelectionError

    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        fail("interrupted. Files that were not finished are not there.")
    except SelectionError as error:
        fail(str(error), code=2)
    except FxExpandError as error:
        fail(str(error))
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # the reader went away (`| head`), and typer knows what to do
        fail(f"{error.filename}: {error.strerror}." if error.filename else str(error))
    except MemoryError:
        fail("out of memory. Take a smaller --input, or another --device.")
    except Exception as error:  # one line for any error, with the way to see all of it
        fail(f"{type(error).__name__}: {first_cause(error)} (all of it: fxexpand --debug ...)")


def first_cause(error: BaseException) -> str:
    """The first line of the innermost cause of an error; the type of the cause where it has no text."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = _of_worker(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0][:_LONGEST]


def _of_worker(message: str) -> str:
    """The last line of an error of a process that reads images, whose traceback torch passes on."""
    _, passed_on, traceback = message.partition("\nOriginal Traceback (most recent call last):\n")
    if not passed_on:
        return message
    last = traceback.strip().splitlines()[-1]
    return last.partition(": ")[2] or last
