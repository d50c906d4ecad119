"""Compare an ONNX file in onnxruntime with the model that it was written from."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fxexpand.deploy.free_sizes import larger
from fxexpand.deploy.onnx_report import shape_text
from fxexpand.deploy.onnx_writing import FIXED, ExportedCall
from fxexpand.deploy.sessions import feeds, open_session, required
from fxexpand.errors import VerificationError
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, call, move, resize_batch, tensors
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.running.outputs import tensors_of, worst_error

# Largest relative error of the outputs in onnxruntime; its kernels add in another order than torch's.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def proved_error(
    model: nn.Module, path: Path, written: ExportedCall, tolerance: float, *, sizes: bool
) -> float:
    """The largest relative error at all batch sizes, and at larger inputs where spatial sizes are free.

    Raises: VerificationError: it is above ``tolerance``, or the model or the file does not take a size.
    """
    error = _verified(model, path, written.inputs, written.batch_sizes, tolerance)
    if sizes:
        error = max(error, _verified(model, path, larger(written.inputs), (), tolerance))
    return error


def tolerance_of(model: nn.Module, example_inputs: ExampleInputs) -> float:
    """The tolerance of the coarsest floating-point dtype; of float32 where none has a tolerance."""
    found = {tensor.dtype for tensor in (*model.parameters(), *tensors(example_inputs))}
    return max((TOLERANCES[each] for each in found & TOLERANCES.keys()), default=TOLERANCES[torch.float32])


def _verified(
    model: nn.Module, path: Path, example_inputs: ExampleInputs, sizes: tuple[int, ...], tolerance: float
) -> float:
    """The largest relative error between the file in onnxruntime and the model, both on the CPU."""
    session = open_session(path)
    worst = 0.0
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    reference = model if devices <= {"cpu"} else copy.deepcopy(model).cpu()  # no TF32 in the reference
    example_inputs = move(example_inputs, "cpu")
    for size in sizes or (None,):
        inputs = example_inputs if size is None else resize_batch(example_inputs, size)
        shapes = ", ".join(shape_text(tuple(tensor.shape)) for tensor in tensors(inputs))
        with evaluating(reference):
            given = feeds(session, inputs)
            try:
                # A copy: the model may write to its inputs, and neither user nor session may see that.
                expected = tensors_of(call(reference, copy_inputs(inputs)))
            except (RuntimeError, ValueError, IndexError, AssertionError) as problem:
                raise VerificationError(
                    f"{path.name}: the model does not take {shapes}. {FIXED}"
                ) from problem
            try:
                actual = [torch.from_numpy(np.asarray(value)) for value in session.run(None, given)]
            except required("onnxruntime").capi.onnxruntime_pybind11_state.InvalidArgument as problem:
                raise VerificationError(f"{path.name}: does not run with {shapes}. {FIXED}") from problem
        error = worst_error(actual, expected)
        if not error <= tolerance:
            where = "" if size is None else f" at batch size {size}"
            raise VerificationError(
                f"{path.name}: relative error {error:.3g}{where} in onnxruntime is above {tolerance:.3g}. "
                "Nothing was written."
            )
        worst = max(worst, error)
    return worst
