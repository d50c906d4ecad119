"""Graphs that hold in one mode: they say so, and raise in the other."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

from torch import fx, nn

from fxexpand.tracer import UntraceableError

Mode: TypeAlias = Literal["train", "eval"]

GUARD = "fxexpand_mode"  # the ModeGuard of a graph that holds in one mode


class ModeGuard(nn.Module):
    """Part of a graph: raises unless the graph is in the mode that it was traced in."""

    _is_impure = True  # what keeps fx from removing it as dead code
    keeps_mode: ClassVar[bool] = True  # for ``evaluating``

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.mode = mode
        self.training = mode == "train"

    def forward(self) -> None:
        """Check the training flag, which follows that of the graph module."""
        if self.training != (self.mode == "train"):
            raise UntraceableError(
                f"this graph was traced in {self.mode} mode and holds in that mode only. "
                "Trace the model again in the other mode."
            )


def mode_of(graph_module: fx.GraphModule) -> Mode | None:
    """The only mode in which a graph made by ``trace`` holds; None where it holds in both."""
    return next((module.mode for module in graph_module.modules() if isinstance(module, ModeGuard)), None)


def guard(graph_module: fx.GraphModule) -> None:
    """Have the graph raise in any mode but the present one; unlike a hook, this is pickled with it."""
    graph_module.add_module(GUARD, ModeGuard("train" if graph_module.training else "eval"))
    graph = graph_module.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.call_module(GUARD)
    graph_module.recompile()
