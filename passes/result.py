"""The result of a pass."""

from __future__ import annotations

from typing import cast

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxexpand.reporting.rows import Report


class Result(PassResult):
    """The outcome of a pass, as torch.fx's pass managers take it.

    Attributes:
        graph_module: the rewritten graph module; the very input where nothing was changed.
        modified: whether anything was changed.
        report: what was done to each site, and why others were refused.
    """

    report: Report

    def __new__(cls, graph_module: nn.Module, modified: bool, report: Report | None = None) -> Result:
        """See the class."""
        self = cast(Result, super().__new__(cls, graph_module, modified))
        self.report = report or Report("", ())
        return self


def require_graph_module(given: object, name: str) -> None:
    """Raises: TypeError: ``given`` is no GraphModule; ``name`` is the pass that wants one."""
    if not isinstance(given, fx.GraphModule):
        raise TypeError(
            f"{name} rewrites a GraphModule and got {type(given).__name__}. "
            "Make one by fxexpand.tracing.trace(model)."
        )
