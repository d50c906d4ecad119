"""Fields of dataclasses that are options, with the help that the command line and the docs show."""

from __future__ import annotations

from dataclasses import field
from typing import Any

METADATA = "option"  # the entry of a field's metadata


def option(default: Any, help: str, kind: Any = None, *, flag: str = "", **shown: Any) -> Any:
    """A field of a frozen dataclass that a command offers as an option.

    The module of such a dataclass loads no torch, so that ``--help`` answers at once. Hence ``kind``: the
    annotations of the field may name types that are not loaded.

    Args:
        default: of the field, and so of the option.
        help: one line, as ``--help`` shows it.
        kind: the type that is read from the command line; None is that of ``default``.
        flag: ``"--name"``; empty is that of the field. A flag of a bool sets the opposite of ``default``.
        shown: more for typer: ``metavar``, ``min``; ``argument=True`` is no option, but an argument.
    """
    entry = {"help": help, "kind": kind or type(default), "flag": flag, "shown": shown}
    return field(default=default, metadata={METADATA: entry})
