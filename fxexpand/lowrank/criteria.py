"""Ranges of the options of a factorisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, TypeVar, get_args

from fxexpand.errors import SelectionError
from fxexpand.lowrank.cuts import SCHEMES, Cut
from fxexpand.lowrank.options import FactorizeOptions, Method
from fxexpand.lowrank.projection import rank_of_share

METHODS: tuple[Method, ...] = get_args(Method)
TRP_THRESHOLD = 5e-2  # the released code of TRP drops singular values below it at the end
Options = TypeVar("Options", bound=FactorizeOptions)


def _is_budget(value: float) -> bool:
    # A float is a share: a number of FLOPs written as a float would be no limit.
    return value > 0 and (isinstance(value, int) or value <= 1)


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "energy": (lambda value: 0.0 < value <= 1.0, "a share in (0, 1]"),
    "threshold": (lambda value: value >= 0.0, "a singular value, 0 or more"),
    "flops": (_is_budget, "a share of the model's FLOPs, in (0, 1], or a number of them, an int"),
    "params": (_is_budget, "a share of the model's parameters, in (0, 1], or a number of them, an int"),
    "latency": (lambda value: 0.0 < value < 1.0, "a share of the model's latency, in (0, 1)"),
}


def checked(options: Options) -> Options:
    """The options, with whole numbers as ints, and with the threshold of TRP where no criterion is given.

    Raises: SelectionError: not exactly one criterion, or an option out of range.
    """
    _require_approach(options)
    criteria = ("rank", *_RANGES)
    given = [name for name in criteria if getattr(options, name) is not None]
    if options.method == "trp" and not given:
        return replace(options, threshold=TRP_THRESHOLD)
    if len(given) != 1:
        names, got = ", ".join(criteria), ", ".join(given)
        raise SelectionError(f"factorize: give exactly one of {names}; got {got or 'none'}.")
    [name] = given
    value = getattr(options, name)
    if _whole(value):
        value = int(value)  # of numpy too: any other type is a share
    if name == "rank":
        _require_rank(value)
    elif isinstance(value, bool) or not isinstance(value, Real) or not _RANGES[name][0](value):
        raise SelectionError(f"{name}={value}: give {_RANGES[name][1]}.")
    return replace(options, **{name: value})


def _require_approach(options: FactorizeOptions) -> None:
    if options.method not in METHODS:
        raise SelectionError(f"method={options.method!r}: choose from {', '.join(METHODS)}.")
    if options.method != "lp" and (options.p, options.body) != (FactorizeOptions.p, FactorizeOptions.body):
        raise SelectionError(
            f"p={options.p}, body={options.body!r}: are those of l_p, but method={options.method!r}. "
            "Give method='lp'."
        )
    if options.scheme is not None and options.scheme not in SCHEMES:
        raise SelectionError(
            f"scheme={options.scheme!r}: choose from {', '.join(SCHEMES)}, or None for both."
        )


def _require_rank(value: Any) -> None:
    if isinstance(value, Mapping):
        for layer, each in value.items():
            cut_of(layer, each)
    elif isinstance(value, bool) or not (value == "effective" or isinstance(value, int | float)):
        raise SelectionError(f"rank={value!r}: choose an int, a share, a mapping or 'effective'.")
    elif isinstance(value, float):
        rank_of_share(value, 1)
    elif value != "effective" and value < 1:
        raise SelectionError(f"rank={value}: give 1 or more.")


def _whole(value: object) -> bool:
    """Whether a value is an int, numpy's included and bool excluded."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def cut_of(layer: str, value: Any) -> int | Cut:
    """The value of a mapping of ranks for one layer: a rank, or a cut.

    Raises: SelectionError: it is neither, or the rank is below 1.
    """
    found: int | Cut | None = None
    if _whole(value):
        found = int(value)
    elif isinstance(value, Cut):
        found = value
    elif isinstance(value, tuple | list) and len(value) == 2 and value[0] in SCHEMES:
        rank = cut_of(layer, value[1])
        found = Cut(value[0], rank) if isinstance(rank, int) else None
    if found is None or (found if isinstance(found, int) else found.rank) < 1:
        raise SelectionError(
            f"rank: {layer}: {value!r}: give a rank of 1 or more, or a scheme and a rank: ('channel', 8)."
        )
    return found
