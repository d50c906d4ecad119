"""Write a model as an ONNX file, and prove that the file computes the same.

The file is written, checked and compared in a folder of its own beside the target and moved into place only
when everything holds, so a failure leaves neither a broken file nor a changed one.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxexpand.errors import FxExpandError, RefusedError, SelectionError, VerificationError
from fxexpand.evaluating import evaluating
from fxexpand.inputs import ExampleInputs, as_call, batch_size, call, move, resize_batch, tensors
from fxexpand.outputs import tensors_of, worst_error
from fxexpand.table import short, table

if TYPE_CHECKING:
    import onnx
    import onnxruntime

# A protobuf message cannot be larger than 2 GiB; past this the weights go to a second file beside the first.
SINGLE_FILE_BYTES = 1_900_000_000

# Largest relative error of the outputs in onnxruntime; its kernels add in another order than torch's.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and what was proved of it.

    ``inputs`` and ``outputs`` map names to shapes, where a name in place of a length is a free dimension.
    ``error`` is the largest relative error over ``batch_sizes``; None where ``verify=False``.
    """

    path: Path
    size: int
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    operators: Mapping[str, int]
    batch_sizes: tuple[int, ...]
    error: float | None
    tolerance: float | None

    def __str__(self) -> str:
        shapes = [("input", name, _shape(shape)) for name, shape in self.inputs.items()]
        shapes += [("output", name, _shape(shape)) for name, shape in self.outputs.items()]
        if self.error is None:
            proof = "not compared with the model (verify=False)"
        else:
            sizes = ", ".join(map(str, self.batch_sizes)) or "as given"
            proof = (
                f"relative error {self.error:.1e} <= {self.tolerance:.0e} in onnxruntime, batch sizes {sizes}"
            )
        operators = table(("operator", "count"), [(name, str(n)) for name, n in self.operators.items()])
        return (
            f"{self.path}: {short(self.size)}B, opset {self.opset}\n{proof}\n\n"
            f"{table(('', 'name', 'shape'), shapes, left=(0, 1, 2))}\n\n{operators}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": str(self.path),
            "size": self.size,
            "opset": self.opset,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "outputs": {name: list(shape) for name, shape in self.outputs.items()},
            "operators": dict(self.operators),
            "batch_sizes": list(self.batch_sizes),
            "error": self.error,
            "tolerance": self.tolerance,
        }


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    verify: bool = True,
    opset: int | None = None,
    tolerance: float | None = None,
) -> OnnxReport:
    """Write ``model`` to ``path`` as ONNX.

    Args:
        model: in evaluation mode, on any device.
        path: the file to write; replaced only when everything succeeded. Weights above 1.9 GB go to a second
            file, ``path`` + ``.data``.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        dynamic_batch: leave the first dimension free, of every tensor where it is as long as the first's.
        verify: compare with the model in onnxruntime, at batch sizes 1, that of the inputs, and one more.
        opset: of the default ONNX domain; None takes torch's default.
        tolerance: largest relative error; None takes 1e-4 in float32 (``TOLERANCES``).

    Raises:
        RefusedError: the model, or a module in it, is in training mode.
        SelectionError: no batch dimension to leave free, or no folder to write to.
        VerificationError: the file computes something else, or its batch dimension is fixed.
        FxExpandError: onnx, onnxscript or (to verify) onnxruntime is not installed.
    """
    target = Path(path)
    onnx = _required("onnx")
    _required("onnxscript")
    if verify:
        _required("onnxruntime")
    _refuse_training(model)
    if not target.parent.is_dir():
        raise SelectionError(f"{target}: the folder {target.parent} does not exist. Create it first.")
    batch = batch_size(example_inputs)
    if dynamic_batch and batch == 1:
        example_inputs, batch = (
            resize_batch(example_inputs, 2),
            2,
        )  # torch.export takes a length of 1 as fixed
    dynamic = _dynamic_shapes(model, example_inputs) if dynamic_batch else None
    if tolerance is None:
        tolerance = TOLERANCES[_dtype(model, example_inputs)]

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        draft = Path(folder) / target.name
        with evaluating(model), _quiet():
            _write(model, draft, example_inputs, dynamic, opset)
        onnx.checker.check_model(str(draft), full_check=True)
        program = onnx.load(str(draft), load_external_data=False)
        if dynamic_batch:
            _require_free_batch(program)
        sizes = tuple(sorted({1, batch, batch + 1})) if dynamic_batch and batch else ()
        error = _verified(model, draft, example_inputs, sizes, tolerance) if verify else None
        files = sorted(Path(folder).iterdir(), key=lambda file: file == draft)  # the weights first
        size = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, target.parent / file.name)
    return OnnxReport(
        path=target,
        size=size,
        opset=next(entry.version for entry in program.opset_import if entry.domain in ("", "ai.onnx")),
        inputs={value.name: _dimensions(value) for value in program.graph.input},
        outputs={value.name: _dimensions(value) for value in program.graph.output},
        operators=_operators(program),
        batch_sizes=sizes,
        error=error,
        tolerance=tolerance if verify else None,
    )


def open_session(
    path: Path, device: torch.device | str = "cpu", threads: int | None = None
) -> onnxruntime.InferenceSession:
    """An onnxruntime session for the file, on the CPU or on a CUDA device.

    Raises: FxExpandError: onnxruntime is not installed, or was built without CUDA.
    """
    runtime = _required("onnxruntime")
    device = torch.device(device)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings about unused initialisers go to stderr otherwise
    if threads is not None:
        options.intra_op_num_threads = threads
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in runtime.get_available_providers():
            raise FxExpandError("onnxruntime: built without CUDA. Run pip install onnxruntime-gpu.")
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    elif device.type != "cpu":
        raise FxExpandError(f"onnxruntime: no provider for {device.type}. Use device='cpu'.")
    return runtime.InferenceSession(str(path), options, providers=providers)


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


def _required(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FxExpandError(f'{name} is not installed. Run pip install "fxexpand[onnx]".') from error


def _refuse_training(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.training:
            where = f"{path} ({type(module).__name__})" if path else type(model).__name__
            raise RefusedError(f"{where}: in training mode; ONNX is for inference. Call model.eval() first.")


def _dtype(model: nn.Module, example_inputs: ExampleInputs) -> torch.dtype:
    """The coarsest floating-point dtype in play; float32 where there is none that has a tolerance."""
    found = {tensor.dtype for tensor in (*model.parameters(), *tensors(example_inputs))}
    return max(found & TOLERANCES.keys(), key=lambda dtype: TOLERANCES[dtype], default=torch.float32)


def _dynamic_shapes(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    """For each parameter of ``forward``: dimension 0 is "batch" in the tensors that have one."""
    batch = batch_size(example_inputs)
    if not batch:
        raise SelectionError("example_inputs: no tensor with a batch dimension. Use dynamic_batch=False.")
    dimension = torch.export.Dim("batch")

    def shape(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return {0: dimension} if batched else None

    args, kwargs = as_call(example_inputs)
    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: tree_map(shape, value) for name, value in arguments.items()}


def _write(
    model: nn.Module,
    path: Path,
    example_inputs: ExampleInputs,
    dynamic: dict[str, Any] | None,
    opset: int | None,
) -> None:
    weights = sum(
        tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())
    )
    args, kwargs = as_call(example_inputs)
    try:
        torch.onnx.export(
            model,
            args,
            str(path),
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=dynamic,
            opset_version=opset,
            external_data=weights > SINGLE_FILE_BYTES,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        if dynamic is not None:
            error.add_note(
                "If the model fixes its batch size (a reshape to constants), use dynamic_batch=False."
            )
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings that torch.onnx and the libraries under it raise about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _require_free_batch(program: onnx.ModelProto) -> None:
    if not any(isinstance(shape[0], str) for shape in map(_dimensions, program.graph.input) if shape):
        raise VerificationError("onnx: the batch dimension came out fixed. Use dynamic_batch=False.")


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
        with evaluating(reference):
            given = feeds(session, inputs)
            actual = [torch.from_numpy(np.asarray(value)) for value in session.run(None, given)]
            expected = tensors_of(call(reference, inputs))
        error = worst_error(actual, expected)
        if not error <= tolerance:
            where = "" if size is None else f" at batch size {size}"
            raise VerificationError(
                f"{path.name}: relative error {error:.3g}{where} in onnxruntime is above {tolerance:.3g}. "
                "Nothing was written."
            )
        worst = max(worst, error)
    return worst


def _operators(program: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, most frequent first, subgraphs and functions included."""
    counts: Counter[str] = Counter()

    def visit(nodes: Any) -> None:
        for node in nodes:
            counts[node.op_type] += 1
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    visit(graph.node)

    visit(program.graph.node)
    for function in program.functions:
        visit(function.node)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _dimensions(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def _shape(shape: tuple[int | str, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
