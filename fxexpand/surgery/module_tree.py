"""Which modules of a tree make the nodes of a graph, by their paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Set
from functools import cached_property

from torch import fx, nn

from fxexpand.passes.affine.extraction import Extraction
from fxexpand.passes.norms import owner_name


class ModuleTree:
    """The modules of ``root`` and the nodes that their calls make in its graph.

    Args:
        multi_argument_calls: see ``Traced``.

    Attributes:
        computed: by path, the nodes that compute something and are made by calls of the module.
    """

    def __init__(self, extraction: Extraction, root: nn.Module, multi_argument_calls: Iterable[str]) -> None:
        self._order = extraction.order
        self.computed: dict[str, list[fx.Node]] = {}
        self._calls: dict[str, set[str]] = {}
        for node in extraction.order:
            computes = node.op.startswith("call") and node not in extraction.reader.constants
            for call, (path, _) in node.meta.get("nn_module_stack", {}).items():
                self._calls.setdefault(path, set()).add(call)
                if computes:
                    self.computed.setdefault(path, []).append(node)
        self._kept = {*multi_argument_calls}  # modules for which no layer of one argument can stand in
        for node in extraction.graph_module.graph.find_nodes(op="get_attr"):
            self._kept.update(self._read_by_others(node))
        self._paths = dict(root.named_modules(remove_duplicate=False))
        self._names = Counter(self._paths.values())

    def _read_by_others(self, node: fx.Node) -> Iterator[str]:
        """The modules that hold the tensor ``node`` reads, where code outside of them uses it."""
        for path in _prefixes(str(node.target).rpartition(".")[0]):
            if any(path not in self.stack(user) for user in node.users):
                yield path

    def stack(self, node: fx.Node) -> list[str]:
        """The modules whose forward makes the call, from the root on."""
        stack = _modules_around(node)
        return ["", *(stack[:-1] if node.op == "call_module" else stack)]

    def owner(self, nodes: Iterable[fx.Node]) -> str:
        """The smallest module whose forward makes all of these calls."""
        levels = zip(*(self.stack(node) for node in nodes), strict=False)
        shared: list[str] = [level[0] for level in levels if len(set(level)) == 1]
        return shared[-1]

    def named_once(self, path: str) -> bool:
        """Whether the module is registered under one name."""
        return self._names[self._paths[path]] == 1

    def computes_only(self, path: str, nodes: Set[fx.Node], calls: int) -> bool:
        """Whether a module, not the root, does no more than ``nodes``, at so many calls with one argument."""
        if not path or path in self._kept:
            return False
        once = nodes >= set(self.computed.get(path, ())) and len(self._calls.get(path, ())) == calls
        return once and self.named_once(path)

    def uses(self, paths: Iterable[str]) -> list[fx.Node]:
        """The nodes that call one of the modules, or one around it, or read a tensor of it."""
        touching, calls = self._by_module
        nodes: dict[fx.Node, None] = {}
        for path in paths:
            nodes |= dict.fromkeys(touching.get(path, ()))
            for around in _prefixes(path):
                nodes |= dict.fromkeys(calls.get(around, ()))
        return list(nodes)

    @cached_property
    def _by_module(self) -> tuple[dict[str, list[fx.Node]], dict[str, list[fx.Node]]]:
        """By path, the nodes that touch a module or a part of it, and those that call it."""
        touching: dict[str, list[fx.Node]] = {}
        calls: dict[str, list[fx.Node]] = {}
        for node in self._order:
            target = owner_name(str(node.target)) if node.op in ("call_module", "get_attr") else ""
            for path in {*_prefixes(target), *_modules_around(node)}:
                touching.setdefault(path, []).append(node)
            if node.op == "call_module":
                calls.setdefault(target, []).append(node)
        return touching, calls


def made_inside(node: fx.Node, paths: Iterable[str]) -> bool:
    """Whether the node is made by a call of one of the modules, or is that call."""
    around = set(_modules_around(node))
    return any(path in around for path in paths)


def _prefixes(path: str) -> list[str]:
    """The path and those of the modules around it, but the root."""
    names = path.split(".") if path else []
    return [".".join(names[: i + 1]) for i in range(len(names))]


def _modules_around(node: fx.Node) -> list[str]:
    """The paths of the modules whose calls make the node, the outermost first, a called module last."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def within(path: str, owner: str) -> bool:
    """Whether the module at ``path`` is that at ``owner``, or inside it."""
    return not owner or path == owner or path.startswith(f"{owner}.")


def within_any(path: str, owners: Iterable[str]) -> bool:
    """Whether the module at ``path`` is one of these, or inside of one."""
    return any(within(path, owner) for owner in owners)


def outermost(paths: Collection[str]) -> list[str]:
    """Those that are inside no other of them."""
    return [
        path for path in sorted(paths) if not any(path != other and within(path, other) for other in paths)
    ]
