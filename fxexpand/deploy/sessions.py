"""Sessions of onnxruntime: the provider for a device, and the inputs by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxexpand.errors import FxExpandError
from fxexpand.running.inputs import ExampleInputs, tensors
from fxexpand.zoo import required

if TYPE_CHECKING:
    import onnxruntime


def onnx_installed() -> bool:
    """Whether all libraries of the extra ``onnx`` are installed."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def open_session(
    path: Path, device: torch.device | str = "cpu", threads: int | None = None, *, tensorrt: bool = False
) -> onnxruntime.InferenceSession:
    """An onnxruntime session for the file, on the CPU or on a CUDA device.

    Args:
        threads: on the CPU; None leaves the choice to onnxruntime.
        tensorrt: the TensorRT provider, before the CUDA provider.

    Raises: FxExpandError: onnxruntime is not installed, was built without the provider, or cannot load it, or
        cannot run the file (it has no kernels for an operator in that dtype).
    """
    runtime = required("onnxruntime", "onnx")
    device = torch.device(device)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings about unused initialisers go to stderr otherwise
    # After a run its threads would go on waiting for work at full speed, on the cores of whoever is next:
    # sessions in turns took two to four times as long, identical ones by up to 1.6 unlike each other.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = []
    if device.type == "cuda":
        wanted = ["TensorrtExecutionProvider"] * tensorrt + ["CUDAExecutionProvider"]
    elif device.type != "cpu":
        raise FxExpandError(f"onnxruntime: no provider for {device.type}. Use device='cpu'.")
    elif tensorrt:
        raise FxExpandError("tensorrt: needs a CUDA device, not cpu.")
    for name in wanted:
        if name not in runtime.get_available_providers():
            kind = name.removesuffix("ExecutionProvider")
            raise FxExpandError(f"onnxruntime: built without {kind}. Run pip install onnxruntime-gpu.")
    providers: list[Any] = [(name, {"device_id": device.index or 0}) for name in wanted]
    try:
        session = runtime.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        reason = str(error).partition("\n")[0]
        raise FxExpandError(
            f"{path.name}: onnxruntime cannot run it: {reason}. Try another dtype or opset, or export "
            "without a comparison: verify=False."
        ) from error
    if wanted and session.get_providers()[0] != wanted[0]:  # it only logs that, and runs on the CPU
        raise FxExpandError(f"onnxruntime: cannot load {wanted[0]}. Install the CUDA and cuDNN it needs.")
    return session


def feeds(
    session: onnxruntime.InferenceSession, example_inputs: ExampleInputs
) -> dict[str, np.ndarray[Any, Any]]:
    """The session's inputs by name, as arrays that share memory with CPU tensors.

    Raises: FxExpandError: the program takes another number of tensors, or numpy lacks a dtype (bfloat16).
    """
    names = [value.name for value in session.get_inputs()]
    values = tensors(example_inputs)
    if len(names) != len(values):
        raise FxExpandError(
            f"onnx: the program takes {len(names)} tensors ({', '.join(names)}), the example inputs hold "
            f"{len(values)}. Leave out arguments that the model does not use."
        )
    if any(value.dtype == torch.bfloat16 for value in values):
        raise FxExpandError("onnxruntime: numpy has no bfloat16. Use float32 or float16, or verify=False.")
    return {
        name: value.detach().cpu().contiguous().numpy() for name, value in zip(names, values, strict=True)
    }
