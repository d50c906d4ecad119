"""Values that a forward keeps on its modules: a trace notices them, and looks at the next call."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxexpand.running.evaluation import containers, content_of, refill


@fx.has_side_effect
def stored(value: Any) -> None:
    """A node that reads a value which the code keeps on a module, where other code may read it."""


def _is_proxy(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)


class Change(NamedTuple):
    """A change of an attribute or of a container: the old content of all of it, and the new value."""

    name: str
    container: Any
    old: Any
    value: Any

    @property
    def before(self) -> Any:
        """The old value: that of the name, or all of a list or set."""
        return self.old.get(self.name) if isinstance(self.old, dict) else self.old


class Stores:
    """The attributes and containers of a model before a trace, compared with those after it."""

    def __init__(self, model: nn.Module) -> None:
        held = [vars(module) for module in model.modules()]
        registered = {id(each[key]) for each in held for key in ("_parameters", "_buffers", "_modules")}
        self._attributes = {id(each) for each in held}
        self._before = [(each, content_of(each)) for each in containers(held) if id(each) not in registered]

    def changed(self, constants: set[str]) -> Iterator[Change]:
        """Each change; counters, and the constants of fx, are left out."""
        for container, old in self._before:
            if isinstance(container, dict):
                for name, value in container.items():
                    number = isinstance(old.get(name), int | float)
                    if value is not old.get(name) and not number and name not in constants:
                        yield Change(name, container, old, value)
            elif len(container) != len(old) or any(_is_proxy(each) for each in container):
                yield Change("of a list or set", container, old, list(container))

    def restore(self, changes: list[Change]) -> None:
        """Put the changed attributes and containers back."""
        for name, container, old, _ in changes:
            if id(container) not in self._attributes:
                refill(container, old)
            elif name in old:
                container[name] = old[name]
            else:
                container.pop(name, None)


def stand_in(changes: list[Change]) -> None:
    """Put tensors in place of the proxies that were kept, as the next call finds them."""
    for change in changes:
        tensor = change.before if isinstance(change.before, Tensor) else torch.empty(0)
        new = tree_map(lambda each, t=tensor: t if _is_proxy(each) else each, change.value)
        if isinstance(change.container, dict):
            change.container[change.name] = new
        else:
            refill(change.container, type(change.old)(new))


def is_cache(change: Change, every: list[Change], model: nn.Module) -> bool:
    """Whether all that is kept is computed from constants, none of which changes, as a position bias.

    The model is as before the changes.
    """
    waiting = [each.node for each in tree_leaves(change.value) if _is_proxy(each)]
    varying = {id(leaf) for each in every for leaf in tree_leaves(each.before) if isinstance(leaf, Tensor)}
    seen = {*waiting}
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return False
        if node.op == "get_attr" and id(attrgetter(str(node.target))(model)) in varying:
            return False
        waiting += set(node.all_input_nodes) - seen
        seen.update(node.all_input_nodes)
    return bool(seen)


def replaces_constant(change: Change) -> bool:
    """Whether a constant tensor takes the place of another one, which a graph has instead."""
    pairs = zip(tree_leaves(change.before), tree_leaves(change.value), strict=False)
    tensors = [
        pair for pair in pairs if all(isinstance(each, Tensor) and not _is_proxy(each) for each in pair)
    ]
    return any(old.shape != new.shape or not torch.equal(old.to(new), new) for old, new in tensors)


def kept_nodes(changes: list[Change]) -> list[fx.Node]:
    """The nodes of the values that were kept, but for a constant that is kept in another dtype or place."""
    kept = [(each.name, leaf.node) for each in changes for leaf in tree_leaves(each.value) if _is_proxy(leaf)]
    return [node for name, node in kept if not _casts(node, name)]


def _casts(node: fx.Node, name: str) -> bool:
    """Whether it casts or moves the constant of this name."""
    first = node.args[0] if node.args and node.target in ("to", "type_as") else None
    return isinstance(first, fx.Node) and first.op == "get_attr" and str(first.target).split(".")[-1] == name


def keys(graph: fx.Graph) -> list[object]:
    """The operations of a graph, to compare those of two calls."""
    return [(node.op, node.target, repr(node.args), repr(node.kwargs)) for node in graph.nodes]
