"""What layers see while a model runs: sizes, for costs, and second moments, for approximations by data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.errors import SelectionError
from fxexpand.evaluating import evaluating
from fxexpand.inputs import ExampleInputs, call
from fxexpand.inputs import copy as copy_inputs
from fxexpand.kernel import Kernel, apply
from fxexpand.lowrank.cuts import Extent, Scheme, factors_of, matrix_of
from fxexpand.lowrank.projection import moment_side
from fxexpand.recipes.factors import gram

Hook = Callable[[nn.Module, Tensor, Tensor], None]


@dataclass(frozen=True)
class Seen:
    """What a layer was called with: positions over all calls, and the shape of the first input."""

    extent: Extent
    shape: tuple[int, ...]


def sizes(
    model: nn.Module, layers: Iterable[nn.Module], example_inputs: ExampleInputs
) -> dict[nn.Module, Seen]:
    """What each of ``layers`` is called with in one run; layers that are not called are missing.

    The run is in evaluation mode and leaves no trace.
    """
    seen: dict[nn.Module, Seen] = {}

    def note(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        extent = _extent(layer, x, y)
        before = seen.get(layer)
        if before is None:
            seen[layer] = Seen(extent, tuple(x.shape))
        else:
            both = (before.extent, extent)
            total = Extent(sum(e.outputs for e in both), sum(e.between for e in both))
            seen[layer] = replace(before, extent=total)

    with evaluating(model), _watched(layers, note):
        call(model, copy_inputs(example_inputs))
    return seen


@dataclass(eq=False)
class Moment:
    """A second moment that grows with every call of a layer, for one scheme of its kernel.

    Attributes:
        sum: of ``u u^T`` over positions, in float64, per group: of the layer's inputs u as the first factor
            reads them, or of the matrix times them; ``lowrank.projection.moment_side`` says which. Of an
            Embedding the sum over tokens of their rows, with a row for each token that was not seen.
        count: of positions.
    """

    kernel: Kernel
    scheme: Scheme
    sum: Tensor = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        matrix = matrix_of(self.kernel, self.scheme)
        groups, rows, columns = matrix.shape
        self._outputs = moment_side(matrix) == "outputs"
        side = rows if self._outputs else columns
        self.sum = matrix.new_zeros((groups, side, side), dtype=torch.float64)
        if self._outputs:
            right = matrix
        else:
            right = torch.eye(columns, dtype=matrix.dtype, device=matrix.device).expand(groups, -1, -1)
        nothing = matrix.new_zeros((groups, rows, side))
        self._reads = factors_of(self.kernel, self.scheme, nothing, right)[0]

    def add(self, x: Tensor) -> None:
        """Take in the inputs of one call."""
        reads, groups = self._reads, self.kernel.groups
        if not x.numel():
            return  # an empty batch says nothing
        y = apply(reads, x.to(reads.weight.dtype))
        channels = -1 if self.kernel.rank == 0 else y.ndim - 1 - self.kernel.rank
        rows = y.movedim(channels, 0).reshape(groups, -1, y.numel() // y.shape[channels])
        for block in torch.split(rows, 65536, -1):
            wide = block.to(torch.float64)
            self.sum += gram(wide)
        self.count += rows.shape[-1]


@dataclass(eq=False)
class Tokens:
    """How often each row of an Embedding was read; one time more, so that no row is forgotten."""

    count: Tensor

    def add(self, x: Tensor) -> None:
        """Take in the inputs of one call."""
        self.count += torch.bincount(x.flatten().long(), minlength=len(self.count)).to(self.count)


def watch_moments(
    model: nn.Module,
    takers: dict[nn.Module, list[Moment] | list[Tokens]],
    calibration: Iterable[ExampleInputs],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Run ``model`` on every batch of ``calibration``; each layer's moments take in its inputs.

    Raises: SelectionError: there is no batch (an iterator that was used up), or a layer's inputs hold NaN or
        Inf.
    """

    def take(layer: nn.Module, x: Tensor, _: Tensor) -> None:
        for taker in takers[layer]:
            taker.add(x)

    with evaluating(model), _watched(takers, take):
        batches = 0
        for example_inputs in progress(calibration):
            call(model, copy_inputs(example_inputs))
            batches += 1
    if not batches:
        raise SelectionError(
            "calibration: no batches. Give a list of them, or leave it out to go by weights."
        )
    for name, module in model.named_modules():
        for taker in takers.get(module, ()):
            if isinstance(taker, Moment) and not bool(torch.isfinite(taker.sum).all()):
                raise SelectionError(
                    f"calibration: the inputs of {name or type(module).__name__} hold NaN or Inf. Leave the "
                    "batches that make them out."
                )


@contextmanager
def _watched(layers: Iterable[nn.Module], note: Hook) -> Iterator[None]:
    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and isinstance(output, Tensor):
            note(layer, x, output)

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _extent(layer: nn.Module, x: Tensor, y: Tensor) -> Extent:
    if isinstance(layer, nn.Embedding):
        return Extent(float(x.numel()), float(x.numel()))
    if isinstance(layer, nn.Linear):
        positions = x.numel() / layer.in_features
        return Extent(positions, positions)
    size: Sequence[int] = layer.kernel_size  # type: ignore[assignment]
    after, before = y.shape[-len(size) :], x.shape[-len(size) :]
    batch = y.numel() / (prod(after) * y.shape[-len(size) - 1]) if y.numel() else 0.0
    return Extent(batch * prod(after), batch * after[0] * prod(before[1:]))
