"""The compiler passes of fxexpand; import them as ``fxexpand.passes``.

A pass is a frozen dataclass with its options as fields. Called on a GraphModule it returns a ``Result``:
the new graph module, whether it changed, and a report of every site. All of them run inside torch.fx's pass
managers. ``expand``, ``fuse`` and ``factorize`` are the passes, ``result`` is the type they return, and
``contract`` holds the rules that all keep.

``sites`` finds the weights of linear maps in a model or graph, ``uses`` how the code uses them,
``forward_code`` code that needs them as parameters, and ``readings`` how they are read as kernels;
``planner`` plans sites, commits plans and repeats rounds, for passes and for functions on models, and
``folding`` plans the way back. ``fusions`` makes the layers of ``fuse``, and ``norms`` splits norms while a
graph is fused; ``operators`` and ``affine`` are rooms inside.
"""

from fxexpand.passes.contract import check
from fxexpand.passes.expand import Expand
from fxexpand.passes.factorize import Factorize
from fxexpand.passes.fuse import Fuse
from fxexpand.passes.result import Result

__all__ = ["Expand", "Factorize", "Fuse", "Result", "check"]
