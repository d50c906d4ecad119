"""Values during a trace, computed for example inputs without their contents: shapes, lengths, numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

# The methods that fx replaces while it traces.
PATCHED = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}


class UnknownValue(Exception):
    """A value depends on the contents of tensors, or on code that cannot run without them."""


class Sizes:
    """The values in a graph during its trace, for example inputs without contents.

    Args:
        root: the model that is traced.
        given: the example inputs by the names of the placeholders.
    """

    def __init__(self, root: nn.Module, given: Mapping[str, Any]) -> None:
        self._root = root
        self._given = given
        self._values: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The value of a node; each node runs at most once.

        Raises: UnknownValue.
        """
        if node not in self._values:
            with _as_before(), torch.device("meta"), torch.no_grad():
                self._run_all(node)
        value = self._values[node]
        if isinstance(value, UnknownValue):
            raise value
        return value

    def _run_all(self, node: fx.Node) -> None:
        """Run a node after its inputs; a loop, as graphs are deeper than Python's stack."""
        todo = [node]
        while todo:
            last = todo[-1]
            missing = [each for each in last.all_input_nodes if each not in self._values]
            todo += missing
            if not missing:
                todo.pop()
                if last not in self._values:
                    self._values[last] = self._run(last)

    def _run(self, node: fx.Node) -> Any:
        """The value, or the reason why it is unknown."""
        inputs = [self._values[each] for each in node.all_input_nodes]
        unknown = next((value for value in inputs if isinstance(value, UnknownValue)), None)
        if unknown is not None:
            return unknown
        args: Any = map_arg(node.args, self._values.__getitem__)
        kwargs: Any = map_arg(node.kwargs, self._values.__getitem__)
        try:
            return self._computed(node, args, kwargs)
        except Exception as error:  # whatever the code of a model raises for tensors without contents
            return UnknownValue(str(error))

    def _computed(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if node.op == "placeholder":
            value = self._given[target] if target in self._given else args[0]
            return tree_map(_without_contents, value)
        if node.op == "get_attr":
            return _without_contents(attrgetter(target)(self._root))
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        module = self._root.get_submodule(target)
        if any(vars(module)[name] for name in ("_forward_hooks", "_forward_pre_hooks")):
            raise UnknownValue("hooks are for real calls")
        tensors = chain(module.named_parameters(), module.named_buffers())
        held = {name: _without_contents(tensor) for name, tensor in tensors}
        return functional_call(module, held, args, kwargs) if held else module(*args, **kwargs)


def _without_contents(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@contextmanager
def _as_before() -> Iterator[None]:
    """Call modules as usual inside, although fx traces."""
    patched = {name: getattr(nn.Module, name) for name in PATCHED}
    try:
        for name, method in PATCHED.items():
            setattr(nn.Module, name, method)
        yield
    finally:
        for name, method in patched.items():
            setattr(nn.Module, name, method)
