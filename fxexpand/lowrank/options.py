"""The options of ``factorize``, read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from fxexpand.reporting.options import option

if TYPE_CHECKING:
    from fxexpand.lowrank.cuts import Cut, Scheme
    from fxexpand.lowrank.lp import Body

Method: TypeAlias = Literal["svd", "lp", "trp"]
Ranks: TypeAlias = "int | float | Literal['effective'] | Mapping[str, int | Cut | tuple[Scheme, int]]"
BUDGETS = ("flops", "params", "latency")


@dataclass(frozen=True)
class FactorizeOptions:
    """How ranks are chosen, by exactly one of the first six, and how weights are approximated.

    They are explained at ``fxexpand.factorize``.
    """

    rank: Ranks | None = option(None, "Rank of every layer.", int)
    energy: float | None = option(None, "Share of each squared norm to keep.", float)
    threshold: float | None = option(None, "Keep the singular values above this.", float)
    flops: float | None = option(None, "Share of the model's FLOPs to keep.", float)
    params: float | None = option(None, "Share of its parameters to keep.", float)
    latency: float | None = option(None, "Share of its time on this machine to keep.", float)
    method: Method = option("svd", "svd, lp or trp.")
    p: float = option(1.0, "Of the norm of lp, from 1 to 2.")
    body: Body = option("lewis", "Ellipsoid of lp: lewis or lowner.")
    scheme: Scheme | None = option(
        None, "Cut of convolutions: channel or spatial; left out, the cheaper.", str
    )

    @property
    def budget(self) -> str | None:
        """``"flops"``, ``"params"`` or ``"latency"``; None where each layer is judged by itself."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)
