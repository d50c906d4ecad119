"""Observations of layers while a model runs: sizes, for costs, and second moments, for fits to data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from fxexpand.lowrank.factored import METADATA
from fxexpand.lowrank.projection import moment_side
from fxexpand.recipes.factors import gram
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, as_call, call
from fxexpand.running.inputs import copy as copy_inputs

Hook = Callable[[nn.Module, Tensor, Tensor], None]


@dataclass(frozen=True)
class CallSizes:
    """Positions of all calls of a layer in one run, and of the first call, with the shape of its input."""

    extent: Extent
    first: Extent
    shape: tuple[int, ...]

    @property
    def calls(self) -> float:
        """All calls as a number of calls of the size of the first."""
        return self.extent.outputs / self.first.outputs if self.first.outputs else 1.0


class OutsideReads(TorchFunctionMode):
    """Records the weights that are read outside of calls of their layers, by more than ``METADATA``.

    Attributes:
        weights: the ids of these weights.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.weights: set[int] = set()
        self._inside: dict[int, int] = {id(layer.weight): 0 for layer in layers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; a weight among its arguments is read."""
        kwargs = kwargs or {}
        if func not in METADATA:
            given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            self.weights |= {weight for weight in given & self._inside.keys() if not self._inside[weight]}
        return func(*args, **kwargs)

    def entered(self, layer: nn.Module, *_: Any) -> None:
        """The hook before the forward of a layer."""
        self._inside[id(layer.weight)] += 1

    def left(self, layer: nn.Module, *_: Any) -> None:
        """The hook after the forward of a layer."""
        self._inside[id(layer.weight)] -= 1


def observe_calls(
    model: nn.Module, layers: Sequence[nn.Module], example_inputs: ExampleInputs
) -> tuple[dict[nn.Module, CallSizes], set[int]]:
    """The sizes of the calls of ``layers`` in one run, and the ids of the weights that others read too.

    Layers that are not called are missing. The run is in evaluation mode and changes nothing.
    """
    calls: dict[nn.Module, CallSizes] = {}
    reads = OutsideReads(layers)

    def note(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        extent = _extent(layer, x, y)
        before = calls.get(layer)
        if before is None:
            calls[layer] = CallSizes(extent, extent, tuple(x.shape))
        else:
            both = (before.extent, extent)
            total = Extent(sum(e.outputs for e in both), sum(e.between for e in both))
            calls[layer] = replace(before, extent=total)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(reads.entered))
            hooks.enter_context(layer.register_forward_hook(reads.left, prepend=True))
        with evaluating(model), _watched(layers, note), reads:
            call(model, copy_inputs(example_inputs))
    return calls, reads.weights


@dataclass(eq=False)
class Moment:
    """A second moment that grows with every call of a layer, for one scheme of its kernel.

    Attributes:
        sum: ``u u^T`` summed over positions, in float64, per group. ``u`` is the input as the first factor
            reads it, or the matrix times this input: see ``lowrank.projection.moment_side``.
        count: number of positions.
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
            return  # an empty batch has no positions
        y = apply(reads, x.to(reads.weight.dtype))
        channels = -1 if self.kernel.rank == 0 else y.ndim - 1 - self.kernel.rank
        rows = y.movedim(channels, 0).reshape(groups, -1, y.numel() // y.shape[channels])
        for block in torch.split(rows, 65536, -1):
            wide = block.to(torch.float64)
            self.sum += gram(wide)
        self.count += rows.shape[-1]

    @property
    def mean(self) -> Tensor | None:
        """The second moment; None if there was no position."""
        return self.sum / self.count if self.count else None


@dataclass(eq=False)
class Tokens:
    """How often each row of an Embedding was read, plus one, so that every row has some weight."""

    count: Tensor

    def add(self, x: Tensor) -> None:
        """Take in the inputs of one call."""
        self.count += torch.bincount(x.flatten().long(), minlength=len(self.count)).to(self.count)


def observe_moments(
    model: nn.Module,
    observers: Mapping[nn.Module, Sequence[Moment | Tokens]],
    calibration: Iterable[ExampleInputs],
) -> None:
    """Run ``model`` on every batch of ``calibration``; the observers of each layer take in its inputs.

    Raises: SelectionError: ``calibration`` is a batch instead of a list, or has no batches (an iterator that
        was used up), or the inputs of a layer hold NaN or Inf.
    """
    if isinstance(calibration, Tensor | Mapping):
        raise SelectionError(
            f"calibration: got a {type(calibration).__name__}, one batch: give a list of batches, [batch]."
        )

    def take(layer: nn.Module, x: Tensor, _: Tensor) -> None:
        for observer in observers[layer]:
            observer.add(x)

    with evaluating(model), _watched(observers, take):
        batches = 0
        for example_inputs in calibration:
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
        for observer in observers.get(module, ()):
            if isinstance(observer, Moment) and not bool(torch.isfinite(observer.sum).all()):
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

    with ExitStack() as hooks:
        for layer in layers:  # before all other hooks, which may pool or wrap the output of the layer
            hooks.enter_context(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))
        yield


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
