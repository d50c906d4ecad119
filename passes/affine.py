"""Affine interpretation of a graph: which values are one kernel of an earlier value.

The graph is walked once, in order. What a node computes is known as "kernel K of the source s": affine calls
compose, sums of two maps of one source add, everything else is a new source. There are no patterns. Two maps
become one only where that is exact and costs no more multiply-adds.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxexpand.errors import InexactError
from fxexpand.graph import Census, operand, site_of, works_in_place
from fxexpand.kernel import Kernel, add, compose, identity, macs
from fxexpand.lower import to_module
from fxexpand.ops import LAYERS, kernel_of
from fxexpand.passes.dimensions import dimensions
from fxexpand.recipes.structure import LastDimBatchNorm

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
ADDITIONS = (operator.add, torch.add, "add")
ADDITIONS_IN_PLACE = (operator.iadd, "add_")


@dataclass(frozen=True, eq=False)
class Run:
    """A value of the graph as a kernel of an earlier one.

    Attributes:
        source: the value it is a kernel of.
        nodes: what computes it, in the graph's order.
        shape: the kernel on the meta device: its geometry.
        fold: gives the kernel, in float64.
        work: multiply-adds per position of the source.
        density: positions of the output per position of the source.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    shape: Kernel
    fold: Callable[[], Kernel]
    work: Fraction
    density: Fraction


class Walk:
    """One walk over a graph: its runs, and why they go no further.

    Attributes:
        order: every node with its place.
        notes: by the target of a call: whether something was refused, and the reason it stayed apart.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        self.notes: dict[str, tuple[bool, str]] = {}
        self._census = Census(graph_module)
        self._dimensions = dimensions(graph_module)
        self._writes = [node for node in self.order if works_in_place(graph_module, node)]
        self._values: dict[fx.Node, Run] = {}
        for node in self.order:
            run = self._value(node)
            if run is not None:
                self._values[node] = run

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.graph_module.get_submodule(str(node.target))

    def kernels(self, nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
        """The calls of affine modules among ``nodes``."""
        return [node for node in nodes if node.op == "call_module" and not self._passes(node)]

    def layers(self, nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
        """The calls of Linear and convolutions among ``nodes``."""
        return [node for node in self.kernels(nodes) if type(self.module(node)) in LAYERS]

    def maximal_runs(self) -> dict[str, list[Run]]:
        """The runs to fuse: by the name of the new layer, one run per call of it."""
        taken: set[fx.Node] = set()
        by_key: dict[tuple[object, ...], list[Run]] = {}
        for node in reversed(self.order):
            run = self._values.get(node)
            if run is not None and node not in taken and not self._passes(node):
                taken.update(run.nodes)
                if self._worthwhile(run):
                    by_key.setdefault(tuple(inner.target for inner in run.nodes), []).insert(0, run)
        found: dict[str, list[Run]] = {}
        for runs in reversed(by_key.values()):
            calls = self.kernels(runs[0].nodes)
            if all(self._times_called(node) == len(runs) for node in calls):
                found[self._name(runs[0])] = runs
                continue
            for node in calls:
                self._note(node, True, "it is called several times, and not in the same place of a run")
        return found

    def _worthwhile(self, run: Run) -> bool:
        """Whether fusing changes anything: several nodes become one, or an expanded layer of one factor."""
        layers = self.layers(run.nodes)
        several = len([node for node in run.nodes if not self._passes(node)]) > 1
        return bool(layers) and (several or self._name(run) != layers[0].target)

    def _name(self, run: Run) -> str:
        """That of the first layer, or of the expanded layer all of whose factors are in the run."""
        first = self.layers(run.nodes)[0]
        site = site_of(str(first.target), self.module(first))
        if site is None:
            return str(first.target)
        mine = {str(node.target) for node in run.nodes}
        factors = {str(node.target) for node in self.order if str(node.target).startswith(f"{site}.")}
        return site if factors <= mine else str(first.target)

    def _value(self, node: fx.Node) -> Run | None:
        summed = node.target in ADDITIONS or node.target in ADDITIONS_IN_PLACE
        if summed and node.op in ("call_function", "call_method") and not node.kwargs:
            return self._sum(node)
        source = operand(node)
        if node.op != "call_module" or source is None:
            return None
        if self._passes(node):
            inner = self._values.get(source)
            alone = list(source.users) == [node]
            return replace(inner, nodes=(*inner.nodes, node)) if inner is not None and alone else None
        if not isinstance(self.module(node), (*LAYERS, _BatchNorm)):
            return None
        return self._call(node, source)

    def _call(self, node: fx.Node, source: fx.Node) -> Run | None:
        module = self.module(node)
        obstacle = self._census.obstacle(module)
        if obstacle is not None:
            self._note(node, True, obstacle)
            return None
        try:
            shape = _on_meta(self._kernel(node))
        except InexactError as error:
            self._note(node, True, str(error))
            return None
        steps = math.prod(shape.stride)
        run = Run(
            source=source,
            nodes=(node,),
            shape=shape,
            fold=lambda: self._kernel(node, torch.float64),
            work=Fraction(shape.out_channels) if isinstance(module, _BatchNorm) else _work(shape),
            density=Fraction(steps) if shape.transposed else Fraction(1, steps),
        )
        return self._extended(run)

    def _sum(self, node: fx.Node) -> Run | None:
        """A sum of two maps of one source, one of which may be the source itself."""
        ends = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if len(ends) != 2 or ends[0] is ends[1]:
            return None
        parts = [self._values[end] for end in ends if end in self._values and list(end.users) == [node]]
        if len(parts) == 2 and parts[0].source is parts[1].source:
            one, two = parts
        elif len(parts) == 1 and parts[0].source in ends:
            if node.target in ADDITIONS_IN_PLACE and ends[0] is parts[0].source:
                return None  # it writes into the source
            one, two = parts[0], self._identity(parts[0])
        else:
            return None
        nodes = tuple(sorted((*one.nodes, *two.nodes, node), key=self.order.__getitem__))
        start, stop = self.order[nodes[0]], self.order[node]
        if any(start < self.order[write] < stop for write in self._writes if write not in nodes):
            self._note(nodes[0], True, "something is written in place between the branches of a sum")
            return None
        run = self._merged(
            replace(one, nodes=nodes, work=one.work + two.work, fold=lambda: add(one.fold(), two.fold())),
            lambda: add(one.shape, two.shape),
            nodes[0],
        )
        return None if run is None else self._extended(run)

    def _identity(self, beside: Run) -> Run:
        """The source itself, as the other term of a sum."""
        shape = beside.shape
        device = _tensors(self.module(beside.nodes[0]))[0].device

        def direct(like: Tensor) -> Kernel:
            return identity(shape.in_channels, shape.rank, like=like, groups=shape.groups)

        return replace(
            beside,
            nodes=(),
            shape=direct(shape.weight),
            fold=lambda: direct(torch.empty((), dtype=torch.float64, device=device)),
            work=Fraction(0),
        )

    def _extended(self, run: Run) -> Run:
        """The run with as many of the runs before it as can be merged in."""
        inner = self._values.get(run.source)
        if inner is None:
            return run
        if not set(run.source.users) <= set(run.nodes):
            self._note(run.nodes[0], False, "its input is also read elsewhere")
            return run
        both = Run(
            source=inner.source,
            nodes=(*inner.nodes, *run.nodes),
            shape=run.shape,
            fold=lambda: compose(run.fold(), inner.fold()),
            work=inner.work + run.work * inner.density,
            density=inner.density * run.density,
        )
        merged = self._merged(both, lambda: compose(run.shape, inner.shape), run.nodes[0])
        return run if merged is None else self._extended(merged)

    def _merged(self, run: Run, shape: Callable[[], Kernel], at: fx.Node) -> Run | None:
        """``run``, which holds the work of its parts, with its own shape and work; None, with a note."""
        try:
            self._require_mergeable(run.nodes)
            merged = shape()
            to_module(merged)
        except InexactError as error:
            self._note(at, True, self._unknown_rank(run.nodes) or str(error))
            return None
        work = _work(merged)
        if work > run.work:
            factor = float(work / run.work)
            self._note(at, False, f"one kernel would cost {factor:.3g} times the multiply-adds")
            return None
        return replace(run, shape=merged, work=work)

    def _require_mergeable(self, nodes: tuple[fx.Node, ...]) -> None:
        """Raises: InexactError: modules that are called several times, or are on different devices.

        What is called several times merges with what is called along with it, at each call: the other factors
        of the same expanded layer.
        """
        calls = self.kernels(nodes)
        sites = {site_of(str(node.target), self.module(node)) for node in calls}
        repeated = len({node.target for node in calls}) < len(calls)
        alone = all(self._times_called(node) == 1 for node in calls)
        if not alone and (repeated or len(sites) > 1 or None in sites):
            raise InexactError("a module that is called several times keeps its weights to itself.")
        if len({tensor.device for node in calls for tensor in _tensors(self.module(node))}) > 1:
            raise InexactError("they are on different devices.")

    def _kernel(self, node: fx.Node, dtype: torch.dtype | None = None) -> Kernel:
        """The kernel of a call.

        BatchNorm1d of a matrix has its channels where a Linear has them; otherwise, and where that is not
        known, it has them where Conv1d has them, which is taken to get batches.
        """
        module, source = self.module(node), operand(node)
        if type(module) is LastDimBatchNorm:
            return kernel_of(module.stock(), rank=0, dtype=dtype)
        if type(module) is nn.BatchNorm1d and source is not None:
            return kernel_of(module, rank=0 if self._dimensions[source] == 2 else 1, dtype=dtype)
        return kernel_of(module, dtype=dtype)

    def _unknown_rank(self, nodes: tuple[fx.Node, ...]) -> str | None:
        """The reason for a failure that shapes would have prevented."""
        calls = self.kernels(nodes)
        norms = [node for node in calls if type(self.module(node)) is nn.BatchNorm1d]
        linear = any(type(self.module(node)) is nn.Linear for node in calls)
        if not linear or all(self._dimensions[node] is not None for node in norms):
            return None
        return (
            "BatchNorm1d normalises the channels of a Linear only in a matrix, and whether it gets one is "
            "not known. Trace with example_inputs."
        )

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node returns what it gets."""
        if node.op != "call_module":
            return False
        module = self.module(node)
        idle = type(module) in DROPOUTS and (not module.training or vars(module)["p"] == 0.0)
        return (type(module) is nn.Identity or idle) and self._census.obstacle(module) is None

    def _times_called(self, node: fx.Node) -> int:
        return len(self._census.calls[id(self.module(node))])

    def _note(self, node: fx.Node, refused: bool, reason: str) -> None:
        self.notes.setdefault(str(node.target), (refused, reason))


def _on_meta(kernel: Kernel) -> Kernel:
    bias = None if kernel.bias is None else kernel.bias.detach().to("meta")
    return replace(kernel, weight=kernel.weight.detach().to("meta"), bias=bias)


def _work(kernel: Kernel) -> Fraction:
    """Multiply-adds per position of the input; a Linear has no groups to save any."""
    if kernel.rank == 0:
        return Fraction(kernel.out_channels * kernel.in_channels)
    return Fraction(macs(kernel), 1 if kernel.transposed else math.prod(kernel.stride))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
