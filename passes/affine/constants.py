"""Which values of a graph do not depend on its inputs, and what they are, in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import apply
from fxexpand.kernel.modules import LAYERS, kernel_of
from fxexpand.passes.affine.writes import Writes
from fxexpand.tracing.edit import tensor_at


class Constants:
    """The constants of a graph: its parameters and buffers, and what is computed of nothing else.

    They are evaluated when asked for, once: ``W1 + W2``, a standardised weight, ``γ / sqrt(σ² + ε)``.
    """

    def __init__(self, graph_module: fx.GraphModule, writes: Writes) -> None:
        self.graph_module = graph_module
        self._values: dict[tuple[fx.Node, bool], Any] = {}
        self._shapes: dict[fx.Node, torch.Size] = {}
        self._known: set[fx.Node] = set()
        for node in graph_module.graph.nodes:
            inputs = node.all_input_nodes
            calls = node.op in ("call_function", "call_method") and bool(inputs)
            if node.op == "call_module" and inputs and not node.kwargs:
                calls = type(graph_module.get_submodule(str(node.target))) in LAYERS
            if not writes.memory[node] & writes.written and (
                node.op == "get_attr" or (calls and all(each in self._known for each in inputs))
            ):
                self._known.add(node)

    def __contains__(self, value: object) -> bool:
        """Whether it is a node that is constant."""
        return value in self._known

    def sources(self, node: fx.Node) -> list[str]:
        """The names of the parameters and buffers that a constant is made of."""
        if node.op == "get_attr":
            return [str(node.target)]
        own = []
        if node.op == "call_module":
            held = self.graph_module.get_submodule(str(node.target))._parameters
            own = [f"{node.target}.{name}" for name, tensor in held.items() if tensor is not None]
        return own + [name for each in node.all_input_nodes for name in self.sources(each)]

    def shape(self, node: fx.Node) -> torch.Size:
        """The shape of a constant tensor.

        Raises: InexactError: it is no tensor.
        """
        if node.op == "get_attr":
            return tensor_at(self.graph_module, str(node.target)).shape
        if node not in self._shapes:
            self._shapes[node] = self.value(node).shape
        return self._shapes[node]

    def dtype(self, node: fx.Node) -> torch.dtype:
        """That of a constant tensor, where the graph computes it.

        Raises: InexactError: as for ``value``.
        """
        if node.op == "get_attr":
            return tensor_at(self.graph_module, str(node.target)).dtype
        return self._tensor(node, wide=False).dtype

    def value(self, node: fx.Node) -> Tensor:
        """A constant tensor, in float64 (integers stay), without gradients.

        Raises: InexactError: it is no tensor, draws random numbers, or cannot be computed in float64.
        """
        value = self._tensor(node, wide=True)
        return value.double() if value.is_floating_point() else value

    def wide(self, node: fx.Node) -> bool:
        """Whether a constant tensor is in float64 where what it is computed of is."""
        return node.op == "get_attr" or self._tensor(node, wide=True).dtype == torch.float64

    def _tensor(self, node: fx.Node, wide: bool) -> Tensor:
        value = self._evaluated(node, wide)
        if not isinstance(value, Tensor):
            raise InexactError("it takes a constant that is no tensor.")
        return value

    def _evaluated(self, node: fx.Node, wide: bool) -> Any:
        """A constant as the graph computes it; ``wide``: of parameters and buffers in float64."""
        if (node, wide) in self._values:
            return self._values[node, wide]
        value: Any
        if node.op == "get_attr":
            tensor = tensor_at(self.graph_module, str(node.target)).detach()
            value = tensor.double() if wide and tensor.is_floating_point() else tensor
        else:
            evaluated = partial(self._evaluated, wide=wide)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), evaluated)
            state = torch.get_rng_state()
            try:
                with torch.no_grad():
                    if node.op == "call_module":
                        layer = self.graph_module.get_submodule(str(node.target))
                        given: Any = args
                        value = apply(kernel_of(layer, dtype=torch.float64 if wide else None), *given)
                    elif node.op == "call_function":
                        assert callable(node.target)
                        value = node.target(*args, **kwargs)
                    else:
                        value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            except (RuntimeError, TypeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise InexactError(f"a constant it takes cannot be computed alone: {reason}") from error
            if not torch.equal(state, torch.get_rng_state()):
                torch.set_rng_state(state)
                raise InexactError("a constant it takes is drawn at random.")
        if node.op != "get_attr":
            self._values[node, wide] = value
        return value
