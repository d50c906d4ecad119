"""Expand: every weight of a linear map becomes a product of trainable factors, in modules and in graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx, nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel, cast
from fxexpand.layers.expanded import Form, expand_layer
from fxexpand.layers.parametrized import LISTS, WeightExpansion, expand_weight
from fxexpand.layers.products import exact_products
from fxexpand.passes.planner import Step, commit, planned
from fxexpand.passes.result import Result, require_graph_module
from fxexpand.passes.sites import Site, find_sites
from fxexpand.recipes import Chain, Init, Recipe, fold
from fxexpand.recipes.selection import Select, Selection
from fxexpand.recipes.structure import leaves
from fxexpand.running.copying import copied
from fxexpand.running.finite import require_finite
from fxexpand.running.verify import Scratch, block_error, require_small
from fxexpand.tracing.edit import ModuleUses, expand_calls, finish, reread


@dataclass(frozen=True)
class Expand:
    """Expand what ``fxexpand.expand`` expands, in a graph; ``Fuse`` undoes it.

    A Linear or convolution becomes the block that a recipe builds for it: each of its calls becomes the calls
    of the factors. Layers that are more than their calls (with hooks, called inside another module, or with
    more than one argument) become expanded layers, as in ``expand``. Any other weight of a linear map is
    expanded in weight space: the graph calls a module that multiplies the factors where it read the weight.

    Attributes:
        recipe: builds the block of each site.
        select: which sites, as in ``fxexpand.expand``.
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
        step = Expansion(self.init, "auto", self.generator, ModuleUses(changed))
        plan = planned("expand", find_sites(changed), Selection(self.select, self.recipe), step)
        if not plan.steps:
            return Result(graph_module, False, plan.report)
        commit(plan)
        finish(changed)
        return Result(changed, True, plan.report)


class Expansion:
    """Makes the step that expands a site: builds its block and compares it with the kernel.

    Args:
        uses: of the graph whose calls become those of the factors; None where layers are to be expanded.
    """

    def __init__(
        self, init: Init, form: Form, generator: torch.Generator | None, uses: ModuleUses | None = None
    ) -> None:
        self._init, self._form, self._generator, self._uses = init, form, generator, uses
        self._scratch = Scratch()

    @torch.inference_mode(False)  # whose tensors never train
    def __call__(self, site: Site, recipe: Recipe) -> Step:
        """The step for a site that can be expanded.

        Raises:
            InexactError: the recipe cannot represent the kernel.
            UnusableWeightError: the weight holds NaN or Inf.
            VerificationError: the block computes something else than the kernel.
        """
        weight, module = site.weight, site.module
        assert weight is not None
        require_finite(weight, site.owners[0].name, site.kind)
        self._require_form(site, recipe)
        uses = self._uses
        if uses is not None and (site.space == "weight" or uses.call_blocker(module) is not None):
            uses = None
        kernel = site.kernel() if uses is not None else replace(site.kernel(), bias=None)
        block = self._block(site, recipe, kernel)
        if uses is None:
            block.requires_grad_(weight.requires_grad)
        error: float | None = None
        if self._init == "preserve" and not weight.is_meta:
            error = block_error(block, kernel, self._scratch)
            wide = partial(cast, kernel, torch.float64)
            require_small(
                error,
                weight.dtype,
                site.name,
                lambda: block_error(self._block(site, recipe, wide()), wide()),
            )
        row = replace(
            site.row("expanded", _into(site, recipe)),
            params_after=sum(parameter.numel() for parameter in block.parameters()),
            error=error,
        )
        if uses is None:
            return Step(row, self._edit(site, recipe, block), _touched(site))
        graph_module, path = uses.graph_module, site.owners[0].path
        row = replace(row, params_before=sum(parameter.numel() for parameter in module.parameters()))
        edit = partial(expand_calls, graph_module, path, block.train(module.training))
        return Step(row, edit, (graph_module, graph_module.get_submodule(path.rpartition(".")[0])))

    def _require_form(self, site: Site, recipe: Recipe) -> None:
        if site.space == "weight" and recipe.needs_activations:
            raise InexactError("it is expanded as a weight, and a BatchNorm needs activations")
        if site.space == "weight" and self._form == "chain":
            raise InexactError(
                "it is expanded as a weight, and form='chain' needs activations. Use form='auto'"
            )
        if self._form == "collapsed" and recipe.needs_activations:
            raise InexactError("form='collapsed' has no activations for a BatchNorm. Use form='auto'")

    def _block(self, site: Site, recipe: Recipe, kernel: Kernel) -> nn.Sequential:
        """The training-time block for a kernel."""
        with exact_products(kernel.weight):
            block = recipe.build(kernel, init=self._init, generator=self._generator)
        table = isinstance(site.module, nn.Embedding | nn.EmbeddingBag)
        padding = getattr(site.module, "padding_idx", None)
        if self._init != "preserve" and table and padding is not None:
            _silence(block, padding)
        return block

    def _edit(self, site: Site, recipe: Recipe, block: nn.Sequential) -> Callable[[], None]:
        if site.space == "layer":
            return partial(expand_layer, site.module, block, recipe, self._form)
        assert site.view is not None
        return partial(_expand_weight, site, WeightExpansion(site.view, recipe, block))


def _expand_weight(site: Site, expansion: WeightExpansion) -> None:
    expand_weight([(owner.module, owner.attribute, owner.generated) for owner in site.owners], expansion)
    for read in site.reads:
        path, _, attribute = str(read.node.target).rpartition(".")
        reread(read, "call_module", f"{path}.{LISTS}.{attribute}".lstrip("."))


def _touched(site: Site) -> tuple[nn.Module, ...]:
    return (*(owner.module for owner in site.owners), *(read.graph_module for read in site.reads))


def _silence(block: nn.Sequential, column: int) -> None:
    """Zero a column of the weight, which then stays zero, as nothing reaches it in training.

    Raises: InexactError: the block cannot keep it zero.
    """
    with torch.no_grad():
        leaves(block)[0].get_parameter("weight")[:, column] = 0.0
        if not next(block.parameters()).is_meta and bool(fold(block).weight[:, column].any()):
            raise InexactError("the row of padding_idx would not be zero with this recipe. Use Chain")


def _into(site: Site, recipe: Recipe) -> str:
    where = "" if site.space == "layer" else " in weight space"
    tied = f", shared by {', '.join(owner.name for owner in site.owners)}" if len(site.owners) > 1 else ""
    return f"{recipe}{where}{tied}"
