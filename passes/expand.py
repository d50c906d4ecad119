"""Expand: every call of a Linear or convolution becomes the calls of a block of factors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import FLOATING, Kernel
from fxexpand.kernel.modules import LAYERS, describe, kernel_of
from fxexpand.passes.result import Result, require_graph_module
from fxexpand.recipes import Chain, Init, Recipe
from fxexpand.recipes.selection import Select, Selection
from fxexpand.reporting.rows import Report, Row
from fxexpand.running.copying import copied
from fxexpand.running.finite import require_finite
from fxexpand.running.verify import block_error, require_small
from fxexpand.tracing.edit import ModuleUses, expand_calls, finish, operand, site_of

ELSEWHERE = "Use fxexpand.expand on the model before tracing"


@dataclass(frozen=True)
class Expand:
    """Replace each Linear and convolution that the graph calls by the block that a recipe builds for it.

    Only layers whose calls are all there is to them: those with hooks, shared tensors or a forward of their
    own are refused, and so are weights used in any other way. What ``Fuse`` undoes.

    Attributes:
        recipe: what to build.
        select: which layers, as in ``fxexpand.expand``.
        init: initial values of the factors; ``"preserve"`` keeps the function.
        generator: of random draws.
        inplace: change the graph module that is given, not a copy of it.
    """

    recipe: Recipe = field(default_factory=Chain)
    select: Select = None
    init: Init = "preserve"
    generator: torch.Generator | None = None
    inplace: bool = False

    def __call__(self, graph_module: fx.GraphModule) -> Result:
        """Run the pass; all blocks are built before the first edit.

        Raises:
            SelectionError: a pattern of ``select`` matches nothing.
            UnusableWeightError: a selected weight holds NaN or Inf.
            VerificationError: a block computes something else than its layer.
        """
        require_graph_module(graph_module, "Expand")
        changed = graph_module if self.inplace else copied(graph_module)
        blocks, report = self._plan(changed)
        if not blocks:
            return Result(graph_module, False, report)
        for target, block in blocks.items():
            expand_calls(changed, target, block)
        finish(changed)
        return Result(changed, True, report)

    def _plan(self, graph_module: fx.GraphModule) -> tuple[dict[str, nn.Sequential], Report]:
        selection = Selection(self.select, self.recipe)
        uses = ModuleUses(graph_module)
        rows: dict[str, Row] = {}
        blocks: dict[str, nn.Sequential] = {}
        for node in graph_module.graph.nodes:
            name = str(node.target)
            if node.op == "get_attr" and name not in rows:
                rows.update(_plain_tensor(graph_module, name))
            if node.op != "call_module" or name in rows:
                continue
            module = graph_module.get_submodule(name)
            row = _row(name, module)
            if row is None:
                continue
            rows[name] = row
            recipe = selection.recipe_for(name, module)
            if site_of(name, module) is not None:
                rows[name] = replace(row, action="left", reason="a factor of an expanded layer")
            elif recipe is None:
                rows[name] = replace(row, action="left", reason="not selected")
            else:
                try:
                    kernel = _kernel(uses, name, module)
                    block = recipe.build(kernel, init=self.init, generator=self.generator)
                except InexactError as error:
                    rows[name] = replace(row, reason=str(error))
                else:
                    error_of_block = self._error(name, block, kernel)
                    blocks[name] = block.train(module.training)
                    after = sum(parameter.numel() for parameter in block.parameters())
                    rows[name] = replace(
                        row, action="expanded", reason=str(recipe), params_after=after, error=error_of_block
                    )
        selection.require_used(rows)
        return blocks, Report("expand", tuple(rows.values()))

    def _error(self, name: str, block: nn.Sequential, kernel: Kernel) -> float | None:
        if self.init != "preserve" or kernel.weight.is_meta:
            return None
        return require_small(block_error(block, kernel), kernel.weight.dtype, name)


def _row(name: str, module: nn.Module) -> Row | None:
    """A refusal to start from; None for a module that holds no matrix."""
    parameters = list(module.parameters())
    if not any(is_lazy(parameter) or parameter.ndim >= 2 for parameter in parameters):
        return None
    count = sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))
    reason = f"no Linear or convolution, or a subclass with a forward of its own. {ELSEWHERE}"
    return Row(name, describe(module), "refused", reason, params_before=count, params_after=count)


def _plain_tensor(graph_module: fx.GraphModule, name: str) -> dict[str, Row]:
    """The row of a parameter that the graph reads itself."""
    path, _, attribute = name.rpartition(".")
    tensor = getattr(graph_module.get_submodule(path), attribute)
    if not isinstance(tensor, nn.Parameter) or is_lazy(tensor) or tensor.ndim < 2:
        return {}
    kind, count = "x".join(map(str, tensor.shape)), tensor.numel()
    reason = f"read by the graph itself. {ELSEWHERE}"
    return {name: Row(name, kind, "refused", reason, params_before=count, params_after=count)}


def _kernel(uses: ModuleUses, name: str, module: nn.Module) -> Kernel:
    """The kernel of a layer that can be replaced.

    Raises: InexactError: it cannot; UnusableWeightError: NaN or Inf.
    """
    if type(module) not in LAYERS:
        raise InexactError(
            f"{type(module).__name__} is no Linear or convolution of torch itself. {ELSEWHERE}"
        )
    blocker = uses.blocker(module)
    if blocker is not None:
        raise InexactError(f"{blocker}. {ELSEWHERE}")
    if any(operand(call) is None for call in uses.calls[id(module)]):
        raise InexactError(f"it is called with more than its input. {ELSEWHERE}")
    kernel = kernel_of(module)
    if kernel.weight.dtype not in FLOATING:
        raise InexactError(f"{kernel.weight.dtype} weights cannot be trained")
    require_finite(kernel.weight, f"{name}.weight", describe(module))
    return kernel
