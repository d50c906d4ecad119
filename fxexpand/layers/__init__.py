"""Layers that train as a product of factors, and the tools of their training.

``effective`` lets one write into a weight that factors compute, ``rewritten`` is the base of layers that were
rewritten in place, ``expanded`` has those of ``expand``,
``parametrized`` the parameters that ``expand`` computes in weight space; ``products`` multiplies factors in
the cheapest order, ``accumulation`` shares their products over micro-batches, ``param_groups`` sets weight
decay per factor, ``sharding`` knows FSDP.
"""

from fxexpand.layers.expanded import EXPANDED, FORMS, Expanded, Form, expand_layer
from fxexpand.layers.rewritten import Rewritten, restore_layer

__all__ = ["EXPANDED", "FORMS", "Expanded", "Form", "Rewritten", "expand_layer", "restore_layer"]


def __getattr__(name: str) -> type[Expanded]:
    """The class of an expanded layer by its name, such as ``ExpandedLinear``."""
    for kind in EXPANDED.values():
        if kind.__name__ == name:
            return kind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
