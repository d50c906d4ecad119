"""Reads the nodes of a graph as affine steps: layers by their kernels, everything else by the operator
table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from fxexpand.errors import InexactError
from fxexpand.passes.affine.module_maps import (
    BLOCKS,
    computes_weight,
    is_layer,
    is_norm,
    module_map,
    passes_on,
)
from fxexpand.passes.affine.shapes import GraphValues, noted
from fxexpand.passes.affine.steps import Affine, Identity, Step, Sum
from fxexpand.recipes import Branches
from fxexpand.recipes.structure import LastDimBatchNorm
from fxexpand.running.finite import is_finite
from fxexpand.tracing.edit import ModuleUses, tensor_at
from fxexpand.tracing.tracer import hooked


class Reader:
    """Reads the nodes of a graph; see ``step``.

    Attributes:
        values: the values of the graph: their shapes, and which are constant.
        dtypes: for each node that was read, the dtypes of its weight, and of the constants that decide on
            the dtype
            of its result: neither numbers, nor tensors without dimensions, nor those of a norm.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.uses = ModuleUses(graph_module)
        self.values = GraphValues(graph_module)
        self.constants = self.values.constants
        self.dtypes: dict[fx.Node, frozenset[torch.dtype]] = {}
        held = (*graph_module.parameters(), *graph_module.buffers())
        self._mixed = len({tensor.dtype for tensor in held if tensor.is_floating_point()}) > 1

    def read(self, node: fx.Node) -> list[str]:
        """The names of the parameters and buffers that a function or a method reads."""
        if node.op == "call_module":
            return []
        read = [each for each in node.all_input_nodes if each in self.constants]
        return [name for each in read for name in self.constants.sources(each)]

    def tensors(self, node: fx.Node) -> list[Tensor]:
        """The parameters and buffers that a node holds or reads."""
        if node.op == "call_module":
            module = self.graph_module.get_submodule(str(node.target))
            return [*module.parameters(), *module.buffers()]
        return [tensor_at(self.graph_module, name) for name in self.read(node)]

    def step(self, node: fx.Node) -> Step | None:
        """The affine step of a node; None of one that is not affine.

        Raises: InexactError: it is an affine operator that cannot be folded, and why.
        """
        step = None if node in self.constants else self._step(node)
        if step is not None:
            self._require_finite(node)
        return step

    def _require_finite(self, node: fx.Node) -> None:
        """A number that is none spreads over all that it is merged with."""
        if node.op == "call_module":
            module = self.graph_module.get_submodule(str(node.target))
            held = [*module.named_parameters(), *module.named_buffers()]
        else:
            held = list(zip(self.read(node), self.tensors(node), strict=True))
        for name, tensor in held:
            if not is_finite(tensor):
                raise InexactError(f"its {name} holds NaN or Inf. Load a sound checkpoint")

    def _step(self, node: fx.Node) -> Step | None:
        if node.op == "call_module":
            given = [*node.args, *node.kwargs.values()]
            if len(given) != 1 or not isinstance(given[0], fx.Node):
                return None
            return self._of_module(node, self.graph_module.get_submodule(str(node.target)), given[0])
        call = self.values.call(node)
        step = self._of_row(node)
        writes = self.values.writes
        if step is not None and node in writes.nodes and not writes.replaceable(node):
            raise InexactError("it writes into a value that is read elsewhere.")
        if isinstance(step, Affine | Sum) and call is not None:
            if call.name != "batch_norm":
                read = [each for each in node.all_input_nodes if each in self.constants]
                self.dtypes[node] = self._deciding(read)
            self._require_dtype(node, step)
        return step

    def _of_row(self, node: fx.Node) -> Step | None:
        call = self.values.call(node)
        if call is None or call.operator.step is None:
            return None
        several = call.operator.keeps in ("larger", "parts")
        return call.operator.step(call, self.values) if several or self.values.varies(call.first) else None

    def _of_module(self, node: fx.Node, module: nn.Module, x: fx.Node) -> Step | None:
        if passes_on(module):
            return Identity(x) if self.uses.blocker(module) is None else None
        has_macs = is_layer(module) or isinstance(module, Branches)
        if not (has_macs or is_norm(module) or isinstance(module, BLOCKS)):
            return None if hooked(module) else self._of_row(node)
        blocker = self.uses.blocker(module)
        if blocker is not None:
            raise InexactError(blocker)
        rank = self._rank_of_norm(module, x) if is_norm(module) else None
        if has_macs:
            matrices = (held for held in module.parameters() if held.ndim > 1)  # no norm inside
            self.dtypes[node] = frozenset(held.dtype for held in matrices)
        return Affine(x, module_map(module, rank), has_macs, has_macs and computes_weight(module))

    def _rank_of_norm(self, module: nn.Module, x: fx.Node) -> int | None:
        if isinstance(module, LastDimBatchNorm):
            return 0
        if type(module) not in (nn.BatchNorm1d, nn.SyncBatchNorm):
            return None
        ndim = self.values.ndim(x)
        if ndim is None:
            raise InexactError(
                "whether its channels are the last dimension or the one before is not known, so it is not "
                "merged. Trace with example_inputs."
            )
        return ndim - 2

    def _deciding(self, constants: Sequence[fx.Node]) -> frozenset[torch.dtype]:
        found = (self.constants.dtype(each) for each in constants if len(self.constants.shape(each)))
        return frozenset(dtype for dtype in found if dtype.is_floating_point)

    def _require_dtype(self, node: fx.Node, step: Affine | Sum) -> None:
        """A merged layer wants its own dtype: an image of bytes that is scaled first must stay apart."""
        now = noted(node, "dtype")
        for value in [step.operand] if isinstance(step, Affine) else [term for term, _ in step.terms]:
            before = noted(value, "dtype")
            if (known := None not in (before, now)) and before != now:
                raise InexactError(f"it turns {before} into {now}.".replace("torch.", ""))
            has_macs = isinstance(step, Affine) and step.has_macs
            if self._mixed and self.dtypes.get(node) and not known and not has_macs:
                raise InexactError("whether it changes the dtype is not known. Trace with example_inputs.")
