"""Trained Rank Pruning: projections to low rank during training, so that factoring later costs little.

Every few steps the weight of each layer is replaced by its truncated SVD, which keeps a share of its squared
norm; the gradient is taken there, and ``lam U V^T`` is added to it, the sub-gradient of the nuclear norm over
the directions that were kept. Steps in between are those of plain training.

Source: Xu et al., "TRP: Trained Rank Pruning for Efficient Deep Neural Networks" (arXiv 2004.14566), as in
the released code: period 5, energy 0.9, lam 3e-4; the sub-gradient acts on the projection steps alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.layers.rewritten import kernel_like
from fxexpand.lowrank.cuts import SCHEMES, Scheme, matrix_of, schemes_of, weight_of
from fxexpand.lowrank.factored import FACTORIZED
from fxexpand.lowrank.projection import spectrum
from fxexpand.recipes import Chain
from fxexpand.recipes.selection import Select, Selection

Excluded: TypeAlias = Literal["first", "pointwise", "last", "strided"]
EXCLUDED: tuple[Excluded, ...] = get_args(Excluded)


@dataclass(frozen=True)
class Projected:
    """A projection of one layer: the rank after it, and the share of the squared norm that it removed."""

    layer: str
    rank: int
    full_rank: int
    lost: float


class TrainedRankPruning:
    """A callback that keeps the layers of a model near low rank while an optimizer trains them.

    ``attach`` it to the optimizer and train with any loop; call ``finish`` at the end, then
    ``fxexpand.factorize(model, method="trp", scheme=..., select=trp.names)``::

        trp = TrainedRankPruning(model, every=20, energy=0.95).attach(optimizer)
        train(model, optimizer)
        trp.finish()
        small = fxexpand.factorize(model, energy=0.999, scheme=trp.scheme, select=trp.names)

    The weights are projected before the first step and after every ``every``-th one, so that the next
    forward has the projected weight. Where torch.distributed runs, each layer is projected by one process
    and sent to the others, so that all have the same bits.

    Args:
        model: its Linear layers and convolutions are projected, except frozen, expanded and factored ones and
            those whose weight is no parameter (``weight_norm``, ``prune``). Among layers that share a weight,
            only the first is.
        every: steps from one projection to the next.
        energy: the share of the squared norm that a projection keeps.
        nuclear: lam, the weight of the nuclear norm; 0 leaves it out.
        everywhere: add the sub-gradient at the current weight on every step, as in the released script for
            the nuclear norm alone.
        scheme: how convolutions are read as matrices; layers without a spatial cut are read channel-wise.
        exclude: ``"first"`` and ``"last"`` layer, ``"pointwise"`` and ``"strided"`` convolutions.
        select: which layers; see ``fxexpand.recipes.selection.Selection``.

    Raises: SelectionError: an option out of range, or no layer is left.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 5,
        energy: float = 0.9,
        nuclear: float = 3e-4,
        everywhere: bool = False,
        scheme: Scheme = "channel",
        exclude: Iterable[Excluded] = ("first", "pointwise", "last"),
        select: Select = None,
    ) -> None:
        given = tuple(exclude)
        if every < 1 or not 0.0 < energy <= 1.0 or nuclear < 0.0:
            raise SelectionError(
                f"TRP: every={every}, energy={energy}, nuclear={nuclear}: give every of 1 or more, "
                "an energy in (0, 1] and a weight of the nuclear norm of 0 or more."
            )
        if scheme not in SCHEMES or not set(given) <= set(EXCLUDED):
            raise SelectionError(
                f"TRP: scheme={scheme!r}, exclude={given!r}: schemes are {', '.join(SCHEMES)}, "
                f"layers to exclude are {', '.join(EXCLUDED)}."
            )
        self.every, self.energy, self.nuclear, self.everywhere = every, energy, nuclear, everywhere
        self.scheme: Scheme = scheme
        self.layers = _layers(model, given, select)
        self.steps = 0
        self.last: tuple[Projected, ...] = ()
        self._subgradients: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        if not self.layers:
            raise SelectionError("TRP: no layer is left to project. Exclude less, or select others.")

    @property
    def names(self) -> list[str]:
        """The names of the projected layers."""
        return list(self.layers)

    def attach(self, optimizer: torch.optim.Optimizer) -> TrainedRankPruning:
        """Project now, and from now on with the steps of the optimizer.

        Raises: SelectionError: it is attached already.
        """
        if self._handles:
            raise SelectionError("TRP: is attached already. Call finish first.")

        def before(stepping: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[1] if len(args) > 1 else kwargs.get("closure")
            if given is None:
                # A fused optimizer divides the gradients by the scale of AMP in its own step.
                self.add_subgradients(getattr(stepping, "grad_scale", None))
                return None
            kept = self._subgradients

            def closure() -> Any:  # computes the gradients; Lightning gives one, and LBFGS calls it often
                loss = given()
                self._subgradients = kept
                self.add_subgradients()
                return loss

            if len(args) > 1:
                return (args[0], closure, *args[2:]), kwargs
            return args, {**kwargs, "closure": closure}

        def after(*_: Any) -> None:
            self.steps += 1
            if self.steps % self.every == 0:
                self.project()

        self.project()
        self._handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        return self

    def finish(self) -> tuple[Projected, ...]:
        """Project for the last time and detach from the optimizer; returns the projections."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.project()
        self._subgradients = {}
        return self.last

    @torch.no_grad()
    def project(self) -> None:
        """Replace each weight by its truncated SVD, in place, and keep the sub-gradient for the next step.

        Raises: UnusableWeightError: a weight holds NaN or Inf; no weight is changed.
        """
        for name, module in self.layers.items():
            self._require_finite(name, module.get_parameter("weight"))
        done, process, processes = [], 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            process, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for i, (name, module) in enumerate(self.layers.items()):
            weight = module.get_parameter("weight")
            subgradient = torch.empty_like(weight)
            figures = torch.zeros(2, dtype=torch.float64, device=weight.device)  # rank, lost
            if i % processes == process:
                new, slope, rank, lost = self._truncated(module, weight)
                weight.copy_(new)
                subgradient.copy_(slope)
                figures[0], figures[1] = rank, lost
            if processes > 1:
                for tensor in (weight, subgradient, figures):
                    torch.distributed.broadcast(tensor.data, src=i % processes)
            if self.nuclear:
                self._subgradients[name] = subgradient
            full = min(matrix_of(kernel_like(module, weight), self._scheme(module)).shape[-2:])
            done.append(Projected(name, int(figures[0]), full, float(figures[1])))
        self.last = tuple(done)

    @torch.no_grad()
    def add_subgradients(self, scale: Tensor | None = None) -> None:
        """Add ``lam U V^T`` to the gradients: that of the last projection, once; or of the current weights.

        Args:
            scale: the factor by which the gradients are scaled at this time.
        """
        if self.everywhere and self.nuclear:
            for name, module in self.layers.items():
                weight = module.get_parameter("weight")
                self._require_finite(name, weight)
                self._subgradients[name] = self._truncated(module, weight, energy=1.0)[1].to(weight)
        for name, subgradient in self._subgradients.items():
            gradient = self.layers[name].get_parameter("weight").grad
            if gradient is not None:
                scaled = subgradient if scale is None else subgradient * scale.to(subgradient)
                gradient.add_(scaled, alpha=self.nuclear)
        self._subgradients = {}

    def _require_finite(self, name: str, weight: Tensor) -> None:
        if not bool(torch.isfinite(weight).all()):
            raise UnusableWeightError(f"TRP: {name}.weight holds NaN or Inf after {self.steps} steps.")

    def _scheme(self, module: nn.Module) -> Scheme:
        possible = schemes_of(kernel_like(module, module.get_parameter("weight")))
        return self.scheme if self.scheme in possible else possible[0]

    def _truncated(
        self, module: nn.Module, weight: Tensor, energy: float | None = None
    ) -> tuple[Tensor, Tensor, int, float]:
        """The projected weight, ``U V^T`` over the kept directions, their number, and the lost energy."""
        kernel, scheme = kernel_like(module, weight), self._scheme(module)
        singular = spectrum(matrix_of(kernel, scheme))
        rank = singular.rank_for(self.energy if energy is None else energy)
        left, right = singular.factors(rank)
        # U = left / |left|, V = right / |right|, column by column: both factors contain sqrt(s).
        columns, rows = left.norm(dim=-2, keepdim=True), right.norm(dim=-1, keepdim=True)
        kept = (columns.squeeze(-2) * rows.squeeze(-1)).unsqueeze(-2) > 1e-12 * (singular.scale or 1.0)
        sign = torch.where(kept, left / columns.clamp(min=1e-300), 0.0) @ (right / rows.clamp(min=1e-300))
        lost = float(singular.errors[rank])
        return weight_of(kernel, scheme, left @ right), weight_of(kernel, scheme, sign), rank, lost


def _layers(model: nn.Module, exclude: tuple[Excluded, ...], select: Select) -> dict[str, nn.Module]:
    """The layers to project, by name.

    Raises: SelectionError: a pattern of ``select`` matches no layer.
    """
    selection = Selection(select, Chain())
    matrices: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in FACTORIZED and not isinstance(module, nn.Embedding)
    ]
    selected = {name: selection.recipe_for(name, module) is not None for name, module in matrices}
    selection.require_used(selected)
    layers: dict[str, nn.Module] = {}
    taken: set[int] = set()
    for i, (name, module) in enumerate(matrices):
        parameter = module._parameters.get("weight")
        if parameter is None or not parameter.requires_grad or id(parameter) in taken:
            continue  # a hook computes it before each forward, or it is frozen, or shared
        convolution = isinstance(module, nn.modules.conv._ConvNd)
        kinds: dict[Excluded, bool] = {
            "first": i == 0,
            "pointwise": convolution and set(module.kernel_size) == {1},
            "last": i == len(matrices) - 1,
            "strided": convolution and set(module.stride) != {1},
        }
        if selected[name] and not any(kinds[kind] for kind in exclude):
            layers[name] = module
            taken.add(id(parameter))
    return layers
