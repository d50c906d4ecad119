"""Suggestions for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean a, b or c?", or nothing when no name is close."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if not found:
        return ""
    *first, last = found
    return f" Did you mean {', '.join(first)}{' or ' if first else ''}{last}?"
