"""What a user asks of a factorisation: how ranks are chosen, and how weights are approximated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

from fxexpand.errors import SelectionError
from fxexpand.lowrank.cuts import SCHEMES, Cut, Scheme
from fxexpand.lowrank.lp import Body
from fxexpand.lowrank.projection import rank_of_share

Method: TypeAlias = Literal["svd", "lp", "trp"]
METHODS: tuple[Method, ...] = get_args(Method)
Ranks: TypeAlias = "int | float | Literal['effective'] | Mapping[str, int | Cut | tuple[Scheme, int]]"
BUDGETS = ("flops", "params", "latency")
TRP_THRESHOLD = 5e-2  # singular values that the released code of TRP drops in its final decomposition


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
        if name == "rank":
            if isinstance(value, str) and value != "effective":
                raise SelectionError(f"rank={value!r}: choose an int, a share, a mapping or 'effective'.")
            if isinstance(value, int | float) and not isinstance(value, bool):
                rank_of_share(value, 1) if isinstance(value, float) else _require(value >= 1, "rank", value)
        elif name == "energy":
            _require(0.0 < value <= 1.0, name, value)
        elif name == "threshold":
            _require(value >= 0.0, name, value)
        elif name == "latency":
            _require(0.0 < value < 1.0, name, value)
        else:
            _require(value > 0, name, value)

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
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise SelectionError(
                f"scheme={self.scheme!r}: choose from {', '.join(SCHEMES)}, or None for both."
            )


def _require(holds: bool, name: str, value: object) -> None:
    if not holds:
        ranges = {
            "rank": "1 or more",
            "energy": "a share in (0, 1]",
            "threshold": "a singular value, 0 or more",
            "flops": "a share of the model's FLOPs, or an int",
            "params": "a share of the model's parameters, or an int",
            "latency": "a share of the model's latency, in (0, 1)",
        }
        raise SelectionError(f"{name}={value}: give {ranges[name]}.")
