"""The report of a factorisation: its rows and totals."""

from __future__ import annotations

from dataclasses import dataclass

from fxexpand.lowrank.cuts import Cut
from fxexpand.reporting.rows import Report, Row
from fxexpand.reporting.table import short


@dataclass(frozen=True)
class FactorRow(Row):
    """One site, with figures of one forward pass on the example inputs.

    Attributes:
        cut: scheme and rank; None if the site was not factored.
        full_rank: the largest rank of such a cut.
        flops_before, flops_after: without example inputs, for one position of the output.
        data_error: relative error of the layer's outputs on the calibration inputs, as predicted by the
            dropped part of their second moment; None without these.
    """

    cut: Cut | None = None
    full_rank: int = 0
    flops_before: float = 0.0
    flops_after: float = 0.0
    data_error: float | None = None


@dataclass(frozen=True)
class FactorizeReport(Report):
    """The rows and totals.

    Attributes:
        params_before, params_after: of the whole model, shared ones once.
        flops_before, flops_after: of the whole model, predicted; None without example inputs.
        error: ``sqrt(sum |W - W'|^2 / sum |W|^2)`` over the factored weights.
        output_error: relative error of the model's outputs, measured; None without example inputs.
    """

    params_before: int = 0
    params_after: int = 0
    flops_before: float | None = None
    flops_after: float | None = None
    error: float | None = None
    output_error: float | None = None

    @property
    def summary(self) -> str:
        """One line, with the totals."""
        parts = [f"params {short(self.params_before)} -> {short(self.params_after)}"]
        if self.flops_before is not None and self.flops_after is not None:
            parts.append(f"FLOPs {short(self.flops_before)} -> {short(self.flops_after)}")
        if self.error is not None:
            parts.append(f"relative error of the weights {self.error:.3g}")
        if self.output_error is not None:
            parts.append(f"of the outputs {self.output_error:.3g}")
        return f"{super().summary}; {', '.join(parts)}"
