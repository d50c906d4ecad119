"""Get models ready to be timed: on the device, in the precision, on each backend, proved to be the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.deploy.latency.backends import Candidate, prepare
from fxexpand.deploy.latency.timing import tracked
from fxexpand.errors import FxExpandError, SelectionError, VerificationError
from fxexpand.running import inputs
from fxexpand.running.copying import copied
from fxexpand.running.inputs import ExampleInputs, call, resize_batch, tensors
from fxexpand.running.outputs import tensors_of, worst_error

# Largest relative difference of two models' outputs; wide enough for TF32 and for another order of addition.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Unavailable:
    """A backend on which a model could not be measured, and why."""

    model: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}, {self.model}: not available: {self.reason}"


@dataclass(frozen=True)
class Conditions:
    """Device, precision and memory format of a measurement, and the tolerance of outputs.

    ``dtype`` None keeps each tensor's own; ``tolerance`` None takes ``TOLERANCES``.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False
    tolerance: float | None = None

    def place(self, model: nn.Module) -> nn.Module:
        """The model itself where it meets the conditions already, else a copy."""
        if self.dtype is None and not self.channels_last and device_of(model) == self.device:
            return model
        model = copied(model).to(device=self.device, dtype=self.dtype)
        if self.channels_last:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = _channels_last(tensor.data)
        return model

    def lay_out(self, given: ExampleInputs) -> ExampleInputs:
        """The inputs under these conditions."""
        given = inputs.move(given, self.device, self.dtype)
        if not self.channels_last:
            return given
        return inputs.mapped(_channels_last, given)

    def limit(self, model: nn.Module, given: ExampleInputs) -> float:
        """The largest relative difference of outputs."""
        if self.tolerance is not None:
            return self.tolerance
        return TOLERANCES.get(dtype_of(model, given), 1e-3)


def ready(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    backends: Sequence[str],
    sizes: Sequence[int | None],
    conditions: Conditions,
    folder: Path,
    skip_unavailable: bool,
    progress: bool | None = False,
) -> tuple[list[Candidate], list[Unavailable]]:
    """A candidate for each batch size, backend and model, each called once and its outputs compared.

    In another precision than its own a model may be twice as far from the outputs of the first in its own
    precision as the first itself is: where a network amplifies rounding, two forms of one function differ.

    Args:
        models: in evaluation mode.
        sizes: of the batch; None leaves the inputs as they are.
        folder: an empty one, for files that live as long as the candidates.

    Raises:
        VerificationError: outputs differ.
        FxExpandError: no model can be run on any backend.
    """
    first = next(iter(models))
    here = Conditions(conditions.device, tolerance=conditions.tolerance)
    own, given = {name: here.place(model) for name, model in models.items()}, here.lay_out(example_inputs)
    expected = {size: _outputs(own[first], _sized(given, size)) for size in sizes}
    placed = {name: conditions.place(model) for name, model in own.items()}
    if conditions.dtype is not None:
        for name, model in own.items():
            outputs = _outputs(model, _sized(given, sizes[0]))
            _error(name, "eager", outputs, expected[sizes[0]], first, here.limit(model, given))

    sized = {size: conditions.lay_out(_sized(given, size)) for size in sizes}
    limits = {size: conditions.limit(placed[first], each) for size, each in sized.items()}
    if conditions.dtype is not None:
        for size, each in sized.items():
            rounding = worst_error(_outputs(placed[first], each), expected[size])
            limits[size] = max(limits[size], 2 * rounding)
    candidates: list[Candidate] = []
    unavailable: list[Unavailable] = []
    work = list(itertools.product(sizes, dict.fromkeys(backends), placed.items()))
    for i, (size, backend, (name, model)) in enumerate(tracked(work, "preparing", progress)):
        try:
            candidate = prepare(name, model, backend, sized[size], conditions.device, folder / str(i))
            outputs = candidate.outputs()
        except SelectionError:
            raise
        except Exception as error:  # any error of a compiler, an exporter or a runtime becomes a row
            if not skip_unavailable:
                raise
            reason = _one_line(error).removeprefix(f"{backend}: ")
            unavailable.append(Unavailable(name, backend, reason))
            continue
        found = _error(name, backend, outputs, expected[size], first, limits[size])
        candidates.append(replace(candidate, error=found))
    if not candidates:
        raise FxExpandError("latency: " + "; ".join(dict.fromkeys(map(str, unavailable))))
    return candidates, list(dict.fromkeys(unavailable))


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first tensor.

    Raises: FxExpandError: it is the meta device.
    """
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    if device.type == "meta":
        raise FxExpandError("latency: a model on the meta device cannot run. Materialise it first.")
    return device


def dtype_of(model: nn.Module, given: ExampleInputs) -> torch.dtype:
    """The first floating-point dtype of the parameters and the inputs."""
    tensor = next((t for t in (*model.parameters(), *tensors(given)) if t.is_floating_point()), None)
    return torch.get_default_dtype() if tensor is None else tensor.dtype


def _error(
    model: str, backend: str, found: list[Tensor], expected: list[Tensor], first: str, tolerance: float
) -> float:
    where = f"{model} on {backend}"
    try:
        error = worst_error(found, expected)
    except VerificationError as problem:
        raise VerificationError(f"{where} is not {first}: {problem}") from None
    if not error <= tolerance:
        raise VerificationError(
            f"{where}: outputs differ from {first} on eager by a relative {error:.3g}, above "
            f"{tolerance:.3g}. Compare models that compute the same function."
        )
    return error


def _outputs(model: nn.Module, given: ExampleInputs) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_of(call(model, inputs.copy(given)))]


def _sized(given: ExampleInputs, size: int | None) -> ExampleInputs:
    return given if size is None else resize_batch(given, size)


def _channels_last(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim not in _LAYOUTS:
        return leaf
    return leaf.contiguous(memory_format=_LAYOUTS[leaf.ndim])


def _one_line(error: BaseException) -> str:
    """The cause of an error, without the pages that compilers and exporters put around it."""
    while error.__cause__ is not None and not isinstance(error, FxExpandError):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, FxExpandError) else f"{type(error).__name__}: {text}"
