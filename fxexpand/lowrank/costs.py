"""Costs of a weight, whole and cut in two: FLOPs, parameters, seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxexpand.kernel.algebra import FLOATING, Kernel
from fxexpand.layers.rewritten import kernel_like
from fxexpand.lowrank.calibration import CallSizes
from fxexpand.lowrank.cuts import Cut, Extent, Scheme, macs_of, parameters_of, unit_extent
from fxexpand.lowrank.factored import FACTORIZED, factors
from fxexpand.lowrank.projection import Spectrum, rank_of_share
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs

TIMED_RANKS = 6  # number of ranks that are timed per scheme and layer, for a budget of latency


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that can be factored, with all modules that hold it: layers first, then embeddings.

    Attributes:
        paths: paths of these modules; a mapping of ranks may have any of them in place of ``name``.
    """

    name: str
    kind: str
    modules: tuple[nn.Module, ...]
    weight: Tensor
    paths: tuple[str, ...] = ()

    @property
    def table(self) -> bool:
        """Whether only look-ups read it, which cost no FLOPs."""
        return all(isinstance(module, nn.Embedding) for module in self.modules)


def unfit(modules: Sequence[nn.Module], weight: Tensor) -> str | None:
    """Why a weight with these owners cannot be factored; None if it can."""
    for module in modules:
        if type(module) not in FACTORIZED or module._parameters.get("weight") is not weight:
            return f"it is also the weight of a {type(module).__name__}, which has no factored form"
        if "forward" in vars(module):
            return "it has a forward of its own, set on the instance"
    if weight.is_meta:
        return "it is on the meta device and has no values"
    if weight.dtype not in FLOATING:
        return f"{weight.dtype} weights have no factors in their own dtype"
    first = modules[0]
    convolutions = [isinstance(module, nn.modules.conv._ConvNd) for module in modules]
    if any(convolutions):
        shapes = {getattr(module, "groups", 0) for module in modules}
        if not all(convolutions) or len(shapes) > 1 or len({type(module) for module in modules}) > 1:
            return "layers of different kinds share it, and their factors would differ"
    return None if min(kernel_like(first, weight.detach()).weight.shape[:2]) > 0 else "the weight is empty"


class Costs:
    """FLOPs and parameters of a target, whole and cut.

    Args:
        measured: FLOPs are those of ``calls``; else those of one position of the output.
    """

    def __init__(self, target: Target, calls: Mapping[nn.Module, CallSizes], measured: bool) -> None:
        self._target, self._measured = target, measured
        self.params = target.weight.numel()
        self._owners: list[tuple[Kernel, Extent, bool]] = []  # the last: whether it is a look-up
        for module in target.modules:
            kernel = kernel_like(module, target.weight.detach())
            found = calls[module].extent if module in calls else Extent(0.0, 0.0)
            extent = found if measured else unit_extent(kernel.geometry)
            self._owners.append((kernel, extent, isinstance(module, nn.Embedding)))
        whole = 2.0 * self.params
        self.flops = sum((whole * extent.outputs for _, extent, table in self._owners if not table), 0.0)

    def params_of(self, cut: Cut) -> int:
        """Parameters of the factors; shared by all owners."""
        return parameters_of(self._owners[0][0].geometry, cut)

    def flops_of(self, cut: Cut) -> float:
        """FLOPs of the factors, over all owners; of a look-up, those of the second factor."""
        macs = 0.0
        for kernel, extent, table in self._owners:
            second = cut.rank * kernel.in_channels * extent.outputs
            macs += second if table else macs_of(kernel.geometry, cut, extent)
        return 2.0 * macs

    def saves(self, cut: Cut) -> bool:
        """Whether a cut has fewer FLOPs; for a target without FLOPs, such as a table, fewer parameters."""
        if self._target.table or self.flops == 0:
            return self.params_of(cut) < self.params
        return self.flops_of(cut) < self.flops

    def estimated(self, cut: Cut) -> bool:
        """Whether the FLOPs that the cut saves depend on sizes that are not known."""
        tables = sum(table for *_, table in self._owners)
        return not self._measured and (cut.scheme == "spatial" or 0 < tables < len(self._owners))


def totals(model: nn.Module) -> int:
    """The number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))


def whole_cost(
    model: nn.Module, name: str, example_inputs: ExampleInputs | None, total: float | None
) -> float:
    """The cost of the whole model, in the unit of a budget."""
    if name == "params":
        return float(totals(model))
    if name == "flops":
        assert total is not None
        return total
    assert example_inputs is not None
    given = copy_inputs(example_inputs)  # before the timer runs, which would time a copy in each call
    with evaluating(model):
        return _seconds(lambda: call(model, given))


def timed_cuts(
    target: Target, spectra: Mapping[Scheme, Spectrum], calls: Mapping[nn.Module, CallSizes]
) -> tuple[float, list[tuple[Cut, float]]]:
    """Seconds of a target as it is, and at some ranks of each scheme, for the sizes of its calls."""
    [module] = target.modules
    weight, count = target.weight, calls[module].calls
    with evaluating(module):  # restores the random state too
        x = torch.randn(calls[module].shape, dtype=weight.dtype, device=weight.device)
        before = count * _seconds(lambda: type(module).forward(module, x))
    timed: list[tuple[Cut, float]] = []
    for scheme, each in spectra.items():
        ranks = sorted({rank_of_share(share / TIMED_RANKS, each.full) for share in range(1, TIMED_RANKS + 1)})
        for rank in ranks:
            cut = Cut(scheme, rank)
            first, second = factors(module, cut, *each.factors(rank))
            with evaluating(first), evaluating(second):
                time = _seconds(lambda f=first, s=second: s(f(x)))  # type: ignore[misc]
                timed.append((cut, count * time))
    return before, timed


def _seconds(run: Callable[[], Any]) -> float:
    """The shortest time of a call: other work on the machine can only add to it."""
    from torch.utils.benchmark import Timer  # at import it looks for a CUDA compiler, and may complain

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(min(timer.blocked_autorange(min_run_time=0.05).times))
