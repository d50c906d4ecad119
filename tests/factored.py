"""Layers of exact rank, and the rows of a factorisation's report."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxexpand
from fxexpand.kernel.modules import kernel_of
from fxexpand.lowrank.cuts import Scheme, matrix_of, weight_of
from fxexpand.lowrank.factorize_report import FactorizeReport, FactorRow
from fxexpand.lowrank.projection import spectrum


def of_rank(module: nn.Module, rank: int, scheme: Scheme = "channel") -> Any:
    """The layer with a weight that has this rank exactly, in float64."""
    module = module.double()
    with torch.no_grad():
        weight = module.get_parameter("weight")
        kernel = kernel_of(module) if not isinstance(module, nn.Embedding) else None
        if kernel is None:
            weight.copy_(spectrum(weight[None]).projected(rank)[0])
        else:
            weight.copy_(weight_of(kernel, scheme, spectrum(matrix_of(kernel, scheme)).projected(rank)))
    return module


def rows_of(model: nn.Module) -> dict[str, FactorRow]:
    found = fxexpand.report(model)
    assert isinstance(found, FactorizeReport)
    return {row.site: row for row in found.rows if isinstance(row, FactorRow)}
