"""What it takes to run a model on a backend: eagerly, compiled, or exported into onnxruntime."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand import inputs
from fxexpand.errors import SelectionError
from fxexpand.export import export_onnx, feeds, open_session
from fxexpand.inputs import ExampleInputs, tensors
from fxexpand.outputs import tensors_of

BACKENDS = ("eager", "compile", "onnxruntime")


@dataclass(frozen=True)
class Candidate:
    """A model made ready on a backend; ``run`` is one call, ``outputs`` the tensors of one call."""

    model: str
    backend: str
    run: Callable[[], Any]
    outputs: Callable[[], list[Tensor]]


def prepare(
    name: str, model: nn.Module, backend: str, given: ExampleInputs, device: torch.device, folder: Path
) -> Candidate:
    """``model`` ready to run ``given`` on ``backend``; both are on ``device``, the model in evaluation mode.

    Args:
        folder: does not exist yet; may be created for files that live as long as the candidate.

    Raises:
        FxExpandError: the backend is not installed.
        SelectionError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise SelectionError(f"backend {backend!r}: choose from {', '.join(BACKENDS)}.")
    given = inputs.copy(given)  # a model that writes to its inputs must not disturb the others
    if backend == "onnxruntime":
        return _prepare_session(name, model, given, device, folder)
    args, kwargs = inputs.as_call(given)
    run = model if backend == "eager" else _compiled(model)
    return Candidate(name, backend, lambda: run(*args, **kwargs), lambda: tensors_of(run(*args, **kwargs)))


def _compiled(model: nn.Module) -> Callable[..., Any]:
    """``model`` compiled through an entry point of its own.

    torch.compile keeps its code by the code object that was called. Models of one class would share theirs:
    each call would try the other's guards, and after eight models torch would silently fall back to eager.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = entry.__code__.replace(co_name=f"entry_{id(model)}")
    own = types.FunctionType(code, entry.__globals__, code.co_name, None, entry.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, dynamic=False)
    return compiled


def _prepare_session(
    name: str, model: nn.Module, given: ExampleInputs, device: torch.device, folder: Path
) -> Candidate:
    folder.mkdir()
    path = folder / "model.onnx"
    export_onnx(model, path, given, dynamic_batch=False, verify=False)
    threads = torch.get_num_threads() if device.type == "cpu" else None
    session = open_session(path, device, threads)
    arrays = feeds(session, given)
    if device.type == "cpu":
        return Candidate(
            name,
            "onnxruntime",
            lambda: session.run(None, arrays),
            lambda: [torch.from_numpy(value) for value in session.run(None, arrays)],
        )
    binding = session.io_binding()  # inputs and outputs stay on the device, as for the other backends
    held = dict(zip(arrays, (tensor.contiguous() for tensor in tensors(given)), strict=True))
    for key, tensor in held.items():
        kind = arrays[key].dtype
        binding.bind_input(key, "cuda", device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr())
    for value in session.get_outputs():
        binding.bind_output(value.name, "cuda", device.index or 0)

    def run(kept: dict[str, Tensor] = held) -> None:  # `kept`: the binding holds bare addresses
        session.run_with_iobinding(binding)

    def outputs() -> list[Tensor]:
        run()
        return [torch.from_numpy(value) for value in binding.copy_outputs_to_cpu()]

    return Candidate(name, "onnxruntime", run, outputs)
