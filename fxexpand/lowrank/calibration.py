"""What layers see while a model runs: sizes, for costs, and second moments, for approximations by data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxexpand.errors import SelectionError
from fxexpand.kernel.algebra import Kernel, apply
from fxexpand.lowrank.cuts import Extent, Scheme, factors_of, matrix_of
from fxexpand.lowrank.factored import FACTS
from fxexpand.lowrank.projection import moment_side
from fxexpand.recipes.factors import gram
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, as_call, call
from fxexpand.running.inputs import copy as copy_inputs

Hook = Callable[[nn.Module, Tensor, Tensor], None]


@dataclass(frozen=True)
class Seen:
    """What a layer was called with: positions of all calls, and of the first, with the shape of its input."""

    extent: Extent
    first: Extent
    shape: tuple[int, ...]

    @property
    def calls(self) -> float:
        """How many calls of the size of the first they were."""
        return self.extent.outputs / self.first.outputs if self.first.outputs else 1.0


class Reads(TorchFunctionMode):
    """Notes which weights are read outside of the calls of the layers that hold them, but for their facts.

    Attributes:
        found: the ids of these weights.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.found: set[int] = set()
        self._inside: dict[int, int] = {id(layer.weight): 0 for layer in layers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; a weight among its arguments is read."""
        kwargs = kwargs or {}
        if func not in FACTS:
            given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            self.found |= {weight for weight in given & self._inside.keys() if not self._inside[weight]}
        return func(*args, **kwargs)

    def entered(self, layer: nn.Module, *_: Any) -> None:
        """A hook before the forward of a layer."""
        self._inside[id(layer.weight)] += 1

    def left(self, layer: nn.Module, *_: Any) -> None:
        """A hook after it."""
        self._inside[id(layer.weight)] -= 1


def sizes(
    model: nn.Module, layers: Sequence[nn.Module], example_inputs: ExampleInputs
) -> tuple[dict[nn.Module, Seen], set[int]]:
    """What each of ``layers`` is called with in one run, and the ids of weights that are read otherwise, too.

    Layers that are not called are missing. The run is in evaluation mode and leaves no trace.
    """
    seen: dict[nn.Module, Seen] = {}
    reads = Reads(layers)

    def note(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        extent = _extent(layer, x, y)
        before = seen.get(layer)
        if before is None:
            seen[layer] = Seen(extent, extent, tuple(x.shape))
        else:
            both = (before.extent, extent)
            total = Extent(sum(e.outputs for e in both), sum(e.between for e in both))
            seen[layer] = replace(before, extent=total)

    around = [layer.register_forward_pre_hook(reads.entered) for layer in layers]
    around += [layer.register_forward_hook(reads.left, prepend=True) for layer in layers]
    try:
        with evaluating(model), _watched(layers, note), reads:
            call(model, copy_inputs(example_inputs))
    finally:
        for handle in around:
            handle.remove()
    return seen, reads.found


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

    @property
    def mean(self) -> Tensor | None:
        """The second moment itself; None where no position was seen."""
        return self.sum / self.count if self.count else None


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

    Raises: SelectionError: it is one batch and no list of them, there is none (an iterator that was used up),
        or a layer's inputs hold NaN or Inf.
    """
    if isinstance(calibration, Tensor | Mapping):
        raise SelectionError(
            f"calibration: got a {type(calibration).__name__}, one batch: give a list of batches, [batch]."
        )

    def take(layer: nn.Module, x: Tensor, _: Tensor) -> None:
        for taker in takers[layer]:
            taker.add(x)

    with evaluating(model), _watched(takers, take):
        batches = 0
        for example_inputs in progress(calibration):
            try:
                as_call(example_inputs)
            except SelectionError as error:
                which = f"calibration: batch {batches}"
                raise SelectionError(str(error).replace("example_inputs", which, 1)) from None
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

    # First of all hooks: what the layer itself gives, before others pool or wrap it.
    handles = [layer.register_forward_hook(hook, with_kwargs=True, prepend=True) for layer in layers]
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
