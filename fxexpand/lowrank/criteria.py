"""Criteria of a factorisation: how ranks are chosen, and how weights are approximated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

from fxexpand.errors import SelectionError
from fxexpand.lowrank.cuts import SCHEMES, Cut, Scheme
from fxexpand.lowrank.lp import Body
from fxexpand.lowrank.projection import rank_of_share

Method: TypeAlias = Literal["svd", "lp", "trp"]
METHODS: tuple[Method, ...] = get_args(Method)
Ranks: TypeAlias = "int | float | Literal['effective'] | Mapping[str, int | Cut | tuple[Scheme, int]]"
BUDGETS = ("flops", "params", "latency")
TRP_THRESHOLD = 5e-2  # the released code of TRP drops singular values below it at the end


@dataclass(frozen=True)
class Criterion:
    """How ranks are chosen, by exactly one of these; see ``fxexpand.factorize``."""

    rank: Ranks | None = None
    energy: float | None = None
    threshold: float | None = None
    flops: float | None = None
    params: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise SelectionError(f"factorize: give exactly one of {names}; got {', '.join(given) or 'none'}.")
        name, value = given[0], getattr(self, given[0])
        if _whole(value):
            value = int(value)  # of numpy too: any other type is a share
            object.__setattr__(self, name, value)
        if name == "rank":
            self._require_ranks(value)
            return
        _require(isinstance(value, Real) and not isinstance(value, bool), name, value)
        if name == "energy":
            _require(0.0 < value <= 1.0, name, value)
        elif name == "threshold":
            _require(value >= 0.0, name, value)
        elif name == "latency":
            _require(0.0 < value < 1.0, name, value)
        else:  # a float is a share: a number of FLOPs written as a float would be no limit
            _require(value > 0 and (isinstance(value, int) or value <= 1), name, value)

    @staticmethod
    def _require_ranks(value: Any) -> None:
        if isinstance(value, Mapping):
            for layer, each in value.items():
                cut_of(layer, each)
        elif isinstance(value, bool) or not (value == "effective" or isinstance(value, int | float)):
            raise SelectionError(f"rank={value!r}: choose an int, a share, a mapping or 'effective'.")
        elif isinstance(value, float):
            rank_of_share(value, 1)
        elif isinstance(value, int):
            _require(value >= 1, "rank", value)

    @property
    def budget(self) -> str | None:
        """``"flops"``, ``"params"`` or ``"latency"``; None where each layer is judged by itself."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)


@dataclass(frozen=True, eq=False)
class Approach:
    """How weights are approximated; see ``fxexpand.factorize``."""

    method: Method = "svd"
    p: float = 1.0
    body: Body = "lewis"
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SelectionError(f"method={self.method!r}: choose from {', '.join(METHODS)}.")
        if self.method != "lp" and (self.p, self.body) != (Approach.p, Approach.body):
            raise SelectionError(
                f"p={self.p}, body={self.body!r}: are those of l_p, but method={self.method!r}. "
                "Give method='lp'."
            )
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise SelectionError(
                f"scheme={self.scheme!r}: choose from {', '.join(SCHEMES)}, or None for both."
            )


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


def _require(holds: bool, name: str, value: object) -> None:
    if not holds:
        ranges = {
            "rank": "1 or more",
            "energy": "a share in (0, 1]",
            "threshold": "a singular value, 0 or more",
            "flops": "a share of the model's FLOPs, in (0, 1], or a number of them, an int",
            "params": "a share of the model's parameters, in (0, 1], or a number of them, an int",
            "latency": "a share of the model's latency, in (0, 1)",
        }
        raise SelectionError(f"{name}={value}: give {ranges[name]}.")
