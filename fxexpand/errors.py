"""The errors of fxexpand. Every message says where, what, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxExpandError(Exception):
    """Base class of all errors of fxexpand."""


class InexactError(FxExpandError, ValueError):
    """A kernel law is not exact for its arguments; the message is the reason, without the name of a site."""


class RefusedError(FxExpandError):
    """A site was refused while ``strict=True``; the message names the site and the reason."""


class SelectionError(FxExpandError, ValueError):
    """A ``select`` pattern, a recipe or an option is out of range or matches nothing."""


class UnusableWeightError(FxExpandError, ValueError):
    """A parameter has NaN or Inf, so it has no factors; the message names the parameter."""


class VerificationError(FxExpandError, AssertionError):
    """A measured error exceeds its tolerance; the message has both numbers."""


class ContractError(FxExpandError, AssertionError):
    """A pass breaks the contract of ``fxexpand.passes.check``; the message lists every clause it breaks."""


def closest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean a, b or c?", or nothing when no name is close."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if not found:
        return ""
    *first, last = found
    return f" Did you mean {', '.join(first)}{' or ' if first else ''}{last}?"
