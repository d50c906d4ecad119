"""Folds of one graph of a module that would be wrong at its other calls: other arguments, or other sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from fxexpand.passes.affine.extraction import Extraction
from fxexpand.passes.fusions import grouped
from fxexpand.passes.norms import split_norms
from fxexpand.surgery.module_tree import ModuleTree, made_inside, outermost, within
from fxexpand.surgery.placement import Placements
from fxexpand.tracing.recording import Traced
from fxexpand.tracing.submodules import Parts, Reading


@dataclass(frozen=True)
class Conflicts:
    """The folds that other calls forbid.

    Attributes:
        reasons: by the names of groups, why they are not to be fused.
        alone: the modules to be read by themselves instead: all that differs is inside their own calls, so
            that the arguments and sizes which they get decide.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)


def conflicts(module: nn.Module, reading: Reading, placements: Placements, parts: Parts) -> Conflicts:
    """Compare the placements in the graph of a module with those in the graphs of its other calls."""
    placed = [group for group in placements.groups if placements.of(group) is not None]
    reasons: dict[str, str] = {}
    outside: set[str] = set()  # modules that are called from outside of their owners too
    for reason, traced in parts.others(module, reading) if placed else ():
        if traced is None:
            return Conflicts({group.name: reason for group in placed} | reasons)
        with split_norms(traced.graph_module):
            other = _OtherCall(traced, module, reading.failure is not None)
            for group in placed:
                paths, owner = placements.paths(group), placements.owners[group.name]
                if other.differs(paths, placements.outlines[group.name], owner):
                    reasons.setdefault(group.name, reason)
                    outside.update(() if other.calls_from(owner, paths) else paths)
    refused = {placements.owners[name] for name in reasons} - {""}
    apart = [owner for owner in refused if not any(within(path, owner) for path in outside)]
    return Conflicts(reasons, outermost(apart))


class _OtherCall:
    """The placements in the graph of another call."""

    def __init__(self, traced: Traced, module: nn.Module, one_path: bool) -> None:
        extraction = Extraction(traced.graph_module)
        self._tree = ModuleTree(extraction, module, traced.multi_argument_calls)
        placements = Placements(extraction, grouped(extraction), self._tree, one_path)
        self._partial = traced.partial
        self._outlines: dict[frozenset[str], list[object]] = {}
        for group in placements.groups:
            paths = frozenset(placements.paths(group))
            self._outlines.setdefault(paths, []).append(placements.outlines[group.name])

    def differs(self, paths: tuple[str, ...], outline: object, owner: str) -> bool:
        """Whether the modules at ``paths`` are used, and not replaced by the layer of the same outline."""
        used = self._tree.uses(paths)
        # Where the module's own code fails, that of the parts which it has called by then is known.
        unknown = self._partial and (not used or owner == "")
        return unknown or (bool(used) and outline not in self._outlines.get(frozenset(paths), ()))

    def calls_from(self, owner: str, paths: tuple[str, ...]) -> bool:
        """Whether nothing but the code of ``owner`` is known to use the modules at ``paths``."""
        return not self._partial and all(made_inside(node, [owner]) for node in self._tree.uses(paths))
