"""Models made ready on a backend: eager, compiled, or exported into another runtime."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.deploy.onnx import export_onnx
from fxexpand.deploy.options import EVERY_BACKEND
from fxexpand.deploy.sessions import feeds, open_session
from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.running import inputs
from fxexpand.running.inputs import ExampleInputs, batch_size, tensors
from fxexpand.running.outputs import tensors_of


@dataclass(frozen=True)
class Candidate:
    """A model made ready on a backend; ``run`` is one call, ``outputs`` the tensors of one call.

    ``error`` is how far the outputs are from those they were compared with.
    """

    model: str
    backend: str
    run: Callable[[], Any]
    outputs: Callable[[], list[Tensor]]
    batch: int | None = None
    error: float | None = None

    @property
    def queued(self) -> bool:
        """Whether a call on CUDA returns before the work is done: onnxruntime waits for it."""
        return self.backend not in ("onnxruntime", "tensorrt")

    @property
    def on_torch_memory(self) -> bool:
        """Whether torch's allocator sees what a call allocates; a CUDA graph holds its memory for good."""
        return self.backend in ("eager", "compile", "aotinductor")


def prepare(
    name: str, model: nn.Module, backend: str, given: ExampleInputs, device: torch.device, folder: Path
) -> Candidate:
    """``model`` ready to run ``given`` on ``backend``; both are on ``device``, the model in evaluation mode.

    Args:
        backend: ``"eager"``; ``"compile"``: torch.compile; ``"onnxruntime"``: its CPU or CUDA provider;
            ``"aotinductor"``: torch.export, compiled ahead of time; ``"cudagraphs"``: the eager kernels,
            captured once and replayed; ``"tensorrt"``: onnxruntime's TensorRT provider.
        folder: does not exist yet; may be created for files that live as long as the candidate.

    Raises:
        FxExpandError: the backend is not installed, or is not for this device.
        SelectionError: an unknown backend.
    """
    if backend not in EVERY_BACKEND:
        raise SelectionError(f"backend {backend!r}: choose from {', '.join(EVERY_BACKEND)}.")
    given = inputs.copy(given)  # a model may write to its inputs; the others must not see that
    batch = batch_size(given)
    if backend in ("onnxruntime", "tensorrt"):
        return Candidate(name, backend, *_session(model, given, device, folder, backend == "tensorrt"), batch)
    if backend == "cudagraphs":
        return Candidate(name, backend, *_captured(model, given, device), batch)
    args, kwargs = inputs.as_call(given)
    ready: Callable[..., Any] = model
    if backend == "compile":
        ready = _compiled(model)
    elif backend == "aotinductor":
        ready = _packaged(model, given, folder)

    def run() -> Any:
        return ready(*args, **kwargs)

    return Candidate(name, backend, run, lambda: tensors_of(run()), batch)


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


def _packaged(model: nn.Module, given: ExampleInputs, folder: Path) -> Callable[..., Any]:
    """``model`` exported, compiled ahead of time into a package, and loaded from it."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    folder.mkdir()
    args, kwargs = inputs.as_call(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about itself
        program = torch.export.export(model, args, kwargs)
        path = aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        loaded: Callable[..., Any] = aoti_load_package(path)
    return loaded


def _captured(
    model: nn.Module, given: ExampleInputs, device: torch.device
) -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
    """The kernels of one call, captured; a replay runs them without the CPU launching each."""
    if device.type != "cuda":
        raise FxExpandError(f"cudagraphs: needs a CUDA device, not {device.type}.")
    args, kwargs = inputs.as_call(given)
    with torch.cuda.device(device):
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # libraries choose their kernels before the capture, which forbids it
            for _ in range(3):
                model(*args, **kwargs)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = model(*args, **kwargs)

    def outputs() -> list[Tensor]:
        graph.replay()
        torch.cuda.synchronize(device)
        return [tensor.clone() for tensor in tensors_of(result)]

    def run(kept: Any = (args, kwargs, result)) -> None:  # the graph holds bare addresses
        graph.replay()

    return run, outputs


def _session(
    model: nn.Module, given: ExampleInputs, device: torch.device, folder: Path, tensorrt: bool
) -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
    folder.mkdir()
    path = folder / "model.onnx"
    export_onnx(model, path, given, dynamic_batch=False, verify=False)
    threads = torch.get_num_threads() if device.type == "cpu" else None
    session = open_session(path, device, threads, tensorrt=tensorrt)
    arrays = feeds(session, given)
    if device.type == "cpu":
        return (
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

    return run, outputs
