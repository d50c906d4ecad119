"""Write a model as an ONNX file, and prove that the file computes the same.

The file is written, checked and compared in a folder of its own beside the target and moved into place only
when everything holds, so a failure leaves neither a broken file nor a changed one.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fxexpand import __version__
from fxexpand.deploy.free_sizes import larger
from fxexpand.deploy.onnx_files import (
    count_operators,
    dimensions,
    fingerprint,
    move_together,
    second_file,
)
from fxexpand.deploy.onnx_report import OnnxReport, shape_text
from fxexpand.deploy.onnx_writing import FIXED, ExportedCall, check_onnx, exported_call, write_onnx
from fxexpand.deploy.options import OnnxOptions
from fxexpand.deploy.sessions import feeds, open_session
from fxexpand.errors import FxExpandError, RefusedError, SelectionError, VerificationError
from fxexpand.passes.planner import combined
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, call, move, resize_batch, tensors
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.running.outputs import tensors_of, worst_error
from fxexpand.surgery.fuse import fuse as fuse_model
from fxexpand.surgery.fuse_plan import ONE_GRAPH
from fxexpand.surgery.transaction import REPORT
from fxexpand.surgery.transaction import report as report_of
from fxexpand.tracing.export import program_of
from fxexpand.tracing.tracer import FAILURES
from fxexpand.zoo import required

if TYPE_CHECKING:
    import onnx

# Largest relative error of the outputs in onnxruntime; its kernels add in another order than torch's.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    verify: bool = True,
    opset: int | None = None,
    tolerance: float | None = None,
    fuse: bool = False,
    dynamic_spatial: bool = False,
    dynamic_shapes: Any = None,
    external_data: bool | None = None,
    compare_with: nn.Module | None = None,
    metadata: Mapping[str, str] | None = None,
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
) -> OnnxReport:
    """Write ``model`` to ``path`` as ONNX.

    Args:
        model: in evaluation mode, on any device.
        path: the file to write; replaced only when everything succeeded.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        dynamic_batch: leave dimension 0 free in each tensor where it is as long as in the first.
        verify: compare with the model in onnxruntime, at batch sizes 1, that of the inputs, and one more;
            with free spatial sizes, at larger ones too.
        opset: of the default ONNX domain; None takes torch's default.
        tolerance: largest relative error; None takes 1e-4 in float32 (``TOLERANCES``).
        fuse: call ``fxexpand.fuse`` first, then fuse the program of this call where the model has no single
            graph; ``model`` is not changed, and the file is compared with it.
        dynamic_spatial: leave dimensions from 2 on free, of floating-point tensors with 3 to 5 dimensions.
        dynamic_shapes: the dimensions to leave free instead, as ``torch.export`` takes them.
        external_data: put the weights into a second file, ``path`` + ``.data``; None does so above 1.9 GB.
            The second file of a replaced file is removed.
        compare_with: count the operators of this model too, exported in the same way.
        metadata: more entries beside the versions, the class, the SHA-256 of the weights of ``model`` as
            given, and the fused sites.
        translations: ONNX functions (onnxscript) for operators of torch that have none, by operator.

    Raises:
        RefusedError: the model, or a module in it, is in training mode.
        SelectionError: an empty batch, no such dimension to leave free, no folder to write to, or an opset
            that torch cannot write the model in.
        VerificationError: the file computes something else, or its batch dimension is fixed.
        FxExpandError: torch cannot export the model, it returns something that is no tensor, or onnx,
            onnxscript or (to verify) onnxruntime is not installed.
    """
    options = OnnxOptions(
        dynamic_batch, verify, opset, tolerance, fuse, dynamic_spatial, dynamic_shapes, external_data,
        compare_with, metadata, translations,
    )  # fmt: skip
    for library in ("onnx", "onnxscript", *(["onnxruntime"] if verify else [])):
        required(library, "onnx")
    for name, module in model.named_modules():
        if module.training:
            where = f"{name} ({type(module).__name__})" if name else type(model).__name__
            raise RefusedError(f"{where}: in training mode; ONNX is for inference. Call model.eval() first.")
    target = _target(Path(path))
    return _exported(model, target, exported_call(model, example_inputs, options), options)


def _exported(model: nn.Module, target: Path, written: ExportedCall, options: OnnxOptions) -> OnnxReport:
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = _tolerance(model, written.inputs)
    source = fused(model, written.inputs, written.free) if options.fuse else model
    entries = _metadata(model, source) | dict(options.metadata or {})
    error = before = None
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        draft = Path(folder) / "new" / target.name
        program = write_onnx(source, draft, written, options, entries)
        if options.compare_with is not None:
            other = Path(folder) / "original" / target.name
            before = count_operators(write_onnx(options.compare_with, other, written, options, {}))
        check_onnx(draft)
        opset = _opset(program, options.opset)
        if options.dynamic_batch and options.dynamic_shapes is None:
            _require_free_batch(program)
        if options.verify:
            error = _verified(model, draft, written.inputs, written.batch_sizes, tolerance)
            if options.dynamic_spatial and options.dynamic_shapes is None:
                error = max(error, _verified(model, draft, larger(written.inputs), (), tolerance))
        size = sum(file.stat().st_size for file in draft.parent.iterdir())
        files = _moved(draft, target)
    return OnnxReport(
        path=target,
        size=size,
        opset=opset,
        inputs={value.name: dimensions(value) for value in program.graph.input},
        outputs={value.name: dimensions(value) for value in program.graph.output},
        operators=count_operators(program),
        batch_sizes=written.batch_sizes,
        error=error,
        tolerance=tolerance if options.verify else None,
        files=files,
        metadata=entries,
        operators_before=before,
    )


def fused(model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any) -> nn.Module:
    """``fuse(model)``, then the same in the program of the call where the model has no single graph.

    ``fuse`` alone must hold for all paths through the code, in both modes; the file holds one. The program is
    that of ``torch.export``, from which the file is made anyway.
    """
    parts = fuse_model(model, example_inputs)
    first = report_of(parts)
    if first.traced == ONE_GRAPH:
        return parts
    try:
        program = program_of(parts, example_inputs, dynamic_shapes)
    except FAILURES:  # torch.onnx may still export it
        return parts
    whole = fuse_model(program, example_inputs)
    second = report_of(whole)
    if not second.changed:
        return parts
    traced = f"{first.traced}; then as one program of torch.export"
    whole.__dict__[REPORT] = replace(combined([first, second]), traced=traced)
    return whole


def _target(path: Path) -> Path:
    """The file to write; a symbolic link is followed, so that the weights go beside its target.

    Raises: SelectionError: it is a folder, or its folder does not exist.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_dir():
        raise SelectionError(f"{target}: is a folder. Name a file in it.")
    if not target.parent.is_dir():
        raise SelectionError(f"{target}: the folder {target.parent} does not exist. Create it first.")
    return target


def _moved(draft: Path, target: Path) -> tuple[Path, ...]:
    """Move the file and that of its weights into place; an unused second file is removed."""
    files = sorted(draft.parent.iterdir(), key=lambda file: file == draft)  # the weights first
    left_over = second_file(target) if len(files) == 1 else None
    move_together(files, target.parent)
    if left_over is not None:
        left_over.unlink(missing_ok=True)
    return tuple(target.parent / file.name for file in reversed(files))


def _opset(program: onnx.ModelProto, asked: int | None) -> int:
    """The opset of the default domain.

    Raises: SelectionError: it is not the one that was asked for; torch only logs that.
    """
    found = int(next(each.version for each in program.opset_import if each.domain in ("", "ai.onnx")))
    if asked not in (None, found):
        raise SelectionError(f"opset={asked}: torch can write this model as {found}, but not as that.")
    return found


def _metadata(source: nn.Module, written: nn.Module) -> dict[str, str]:
    """The versions, the origin of the weights, and the fused sites."""
    entries = {
        "fxexpand.version": __version__,
        "torch.version": str(torch.__version__),
        "fxexpand.source": f"{type(source).__module__}.{type(source).__qualname__}",
        "fxexpand.source_sha256": fingerprint(source),
    }
    try:
        report = report_of(written)
    except FxExpandError:  # neither expanded nor fused
        return entries
    changed = "; ".join(f"{row.site}: {row.reason}" if row.reason else row.site for row in report.changed)
    return entries | {"fxexpand.report": report.summary, "fxexpand.changed": changed}


def _require_free_batch(program: onnx.ModelProto) -> None:
    if not any(isinstance(shape[0], str) for shape in map(dimensions, program.graph.input) if shape):
        raise VerificationError("onnx: the batch dimension came out fixed. Use dynamic_batch=False.")


def _tolerance(model: nn.Module, example_inputs: ExampleInputs) -> float:
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
            except required("onnxruntime", "onnx").capi.onnxruntime_pybind11_state.InvalidArgument as problem:
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
