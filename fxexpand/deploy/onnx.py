"""Write a model as an ONNX file, and prove that the file computes the same.

The file is written, checked and compared in a folder of its own beside the target and moved into place only
when everything holds, so a failure leaves neither a broken file nor a changed one.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fxexpand import __version__
from fxexpand.deploy.folding import fused
from fxexpand.deploy.free_sizes import axis_names, larger
from fxexpand.deploy.free_sizes import dynamic_shapes as free_sizes
from fxexpand.deploy.onnx_files import (
    count_operators,
    dimensions,
    fingerprint,
    has_second_file,
    move_together,
    second_file,
)
from fxexpand.deploy.sessions import feeds, open_session, required
from fxexpand.errors import FxExpandError, RefusedError, SelectionError, VerificationError
from fxexpand.reporting.plain import plain
from fxexpand.reporting.table import short, table
from fxexpand.running.evaluation import evaluating, undisturbed
from fxexpand.running.inputs import ExampleInputs, as_call, batch_size, call, move, resize_batch, tensors
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.running.outputs import tensors_of, worst_error
from fxexpand.surgery.transaction import report as report_of
from fxexpand.tracing.export import muted

if TYPE_CHECKING:
    import onnx

# A protobuf message cannot be larger than 2 GiB; past this the weights go to a second file beside the first.
SINGLE_FILE_BYTES = 1_900_000_000

# Largest relative error of the outputs in onnxruntime; its kernels add in another order than torch's.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


_FIXED = (
    "If the model fixes a size (a reshape to constants), use dynamic_batch=False, dynamic_spatial=False or "
    "dynamic_shapes=."
)
_NO_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and what was proved of it.

    ``inputs`` and ``outputs`` map names to shapes, where a name in place of a length is a free dimension.
    ``error`` is the largest relative error over ``batch_sizes``; None where ``verify=False``.
    ``operators_before`` counts the operators of the model it was compared with, exported in the same way.
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
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    operators_before: Mapping[str, int] | None = None

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
        others = ", ".join(file.name for file in self.files if file != self.path)
        return (
            f"{self.path}: {short(self.size)}B{f' with {others}' if others else ''}, opset {self.opset}\n"
            f"{proof}\n\n{table(('', 'name', 'shape'), shapes, left=(0, 1, 2))}\n\n{self._histogram()}"
        )

    def _histogram(self) -> str:
        if self.operators_before is None:
            return table(("operator", "count"), [(name, str(n)) for name, n in self.operators.items()])
        before, names = self.operators_before, dict.fromkeys([*self.operators_before, *self.operators])
        rows = [(name, str(before.get(name, 0)), str(self.operators.get(name, 0))) for name in names]
        rows.append(("total", str(sum(before.values())), str(sum(self.operators.values()))))
        return table(("operator", "original", "this"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found: dict[str, Any] = plain(self)
        return found


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
        dynamic_batch: leave the first dimension free, of every tensor where it is as long as the first's.
        verify: compare with the model in onnxruntime, at batch sizes 1, that of the inputs, and one more;
            with free spatial sizes, at larger ones too.
        opset: of the default ONNX domain; None takes torch's default.
        tolerance: largest relative error; None takes 1e-4 in float32 (``TOLERANCES``).
        fuse: call ``fxexpand.fuse`` first, and fold what is left in the program of this call where the model
            is no single graph; ``model`` itself is not changed, and is what the file is compared with.
        dynamic_spatial: leave the dimensions from 2 on free, of floating-point tensors of rank 3 to 5.
        dynamic_shapes: what to leave free instead, as ``torch.export`` takes it.
        external_data: put the weights into a second file, ``path`` + ``.data``; None does so above 1.9 GB.
            That of the file that is replaced goes with it.
        compare_with: count the operators of this model too, exported in the same way.
        metadata: more entries for the file's metadata, which holds the versions, the class, the SHA-256 of
            the weights of ``model`` as given, and what was fused.
        translations: ONNX functions (onnxscript) for operators of torch that have none, by operator.

    Raises:
        RefusedError: the model, or a module in it, is in training mode.
        SelectionError: an empty batch, no such dimension to leave free, no folder to write to, or an opset
            that torch cannot write the model in.
        VerificationError: the file computes something else, or its batch dimension is fixed.
        FxExpandError: torch cannot export the model, it returns something that is no tensor, or onnx,
            onnxscript or (to verify) onnxruntime is not installed.
    """
    target = Path(path)
    if target.is_symlink():  # what it points to is written, and the weights beside that
        target = Path(os.path.realpath(target))
    onnx = required("onnx")
    required("onnxscript")
    if verify:
        required("onnxruntime")
    _refuse_training(model)
    if target.is_dir():
        raise SelectionError(f"{target}: is a folder. Name a file in it.")
    if not target.parent.is_dir():
        raise SelectionError(f"{target}: the folder {target.parent} does not exist. Create it first.")
    batch = batch_size(example_inputs)
    free_batch = dynamic_batch and dynamic_shapes is None
    if batch == 0:
        raise SelectionError("example inputs: an empty batch: there is nothing to compare. Give one input.")
    _require_tensors(model, example_inputs)
    if free_batch and batch == 1:  # torch.export takes a length of 1 as fixed
        example_inputs, batch = resize_batch(example_inputs, 2), 2
    free = dynamic_shapes or free_sizes(model, example_inputs, batch=free_batch, spatial=dynamic_spatial)
    names = axis_names(model, example_inputs, free) if free and dynamic_shapes is None else []
    if tolerance is None:
        tolerance = TOLERANCES[_dtype(model, example_inputs)]
    written = fused(model, example_inputs, free) if fuse else model
    entries = _metadata(model, written) | dict(metadata or {})

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        draft = Path(folder) / "new" / target.name
        _write(written, draft, example_inputs, free, opset, external_data, entries, translations, names)
        before = None
        if compare_with is not None:
            other = Path(folder) / "original" / target.name
            _write(compare_with, other, example_inputs, free, opset, external_data, {}, translations)
            before = count_operators(onnx.load(str(other), load_external_data=False))
        _check(draft)
        program = onnx.load(str(draft), load_external_data=False)
        written_as = next(e.version for e in program.opset_import if e.domain in ("", "ai.onnx"))
        if opset not in (None, written_as):  # torch only logs that
            raise SelectionError(
                f"opset={opset}: torch can write this model as {written_as}, but not as that."
            )
        if free_batch:
            _require_free_batch(program)
        sizes = tuple(sorted({1, batch, batch + 1})) if free_batch and batch else ()
        error = None
        if verify:
            error = _verified(model, draft, example_inputs, sizes, tolerance)
            if dynamic_spatial and dynamic_shapes is None:
                error = max(error, _verified(model, draft, larger(example_inputs), (), tolerance))
        files = sorted(draft.parent.iterdir(), key=lambda file: file == draft)  # the weights first
        size = sum(file.stat().st_size for file in files)
        left_over = len(files) == 1 and has_second_file(target)
        move_together(files, target.parent)
        if left_over:
            second_file(target).unlink(missing_ok=True)
    return OnnxReport(
        path=target,
        size=size,
        opset=written_as,
        inputs={value.name: dimensions(value) for value in program.graph.input},
        outputs={value.name: dimensions(value) for value in program.graph.output},
        operators=count_operators(program),
        batch_sizes=sizes,
        error=error,
        tolerance=tolerance if verify else None,
        files=tuple(target.parent / file.name for file in reversed(files)),
        metadata=entries,
        operators_before=before,
    )


def _refuse_training(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.training:
            where = f"{path} ({type(module).__name__})" if path else type(model).__name__
            raise RefusedError(f"{where}: in training mode; ONNX is for inference. Call model.eval() first.")


def _require_tensors(model: nn.Module, example_inputs: ExampleInputs) -> None:
    with evaluating(model):
        output = call(model, copy_inputs(example_inputs))
    odd = [type(leaf).__name__ for leaf in tree_leaves(output) if not isinstance(leaf, torch.Tensor | None)]
    if odd or not tensors_of(output):
        what = f"{'an' if odd[0][0] in 'aeiou' else 'a'} {odd[0]}" if odd else "no tensor"
        raise FxExpandError(
            f"{type(model).__name__}: returns {what}; an ONNX file returns tensors alone. Leave such outputs "
            "out (a cache of transformers: use_cache=False), or wrap the model in a module that does."
        )


def _dtype(model: nn.Module, example_inputs: ExampleInputs) -> torch.dtype:
    """The coarsest floating-point dtype in play; float32 where there is none that has a tolerance."""
    found = {tensor.dtype for tensor in (*model.parameters(), *tensors(example_inputs))}
    return max(found & TOLERANCES.keys(), key=lambda dtype: TOLERANCES[dtype], default=torch.float32)


def _metadata(source: nn.Module, written: nn.Module) -> dict[str, str]:
    """Where the weights come from, and what was done to them."""
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


def _write(
    model: nn.Module,
    path: Path,
    example_inputs: ExampleInputs,
    dynamic: Any,
    opset: int | None,
    external_data: bool | None,
    metadata: Mapping[str, str],
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None,
    names: Sequence[Mapping[int, str]] = (),
) -> None:
    """Write the file, and one for the weights if asked for or needed, into a folder of their own."""
    path.parent.mkdir()
    weights = sum(
        tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())
    )
    args, kwargs = _as_torch_reads(model, *as_call(example_inputs))
    try:
        with undisturbed(model), evaluating(model), muted(), _quiet():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=dynamic,
                opset_version=opset,
                custom_translation_table=None if translations is None else dict(translations),
                verbose=False,
            )
            assert program is not None
            if names:
                _rename(program, names)
            program.model.metadata_props.update(metadata)
            program.save(
                path, external_data=weights > SINGLE_FILE_BYTES if external_data is None else external_data
            )
    except torch.onnx.OnnxExporterError as error:
        raise FxExpandError(_advice(type(model).__name__, error, dynamic is not None)) from error


def _rename(program: torch.onnx.ONNXProgram, names: Sequence[Mapping[int, str]]) -> None:
    """Give the free dimensions their names, by tensor and axis; torch calls them s97 where it has none."""
    rename: Any = getattr(program, "rename_axes", None)  # not every torch that we take has it
    known = {name for wanted in names for name in wanted.values()}
    renamed: dict[str, str] = {}
    for value, wanted in zip(program.model.graph.inputs, names, strict=False):
        for axis, name in wanted.items():
            length = getattr(value.shape[axis], "value", None) if value.shape is not None else None
            if isinstance(length, str) and length.isidentifier() and length not in known:
                renamed.setdefault(length, name)
    if renamed and rename is not None:
        rename(renamed)


def _as_torch_reads(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call: torch.onnx would take a dict that is the last of the arguments for the keywords."""
    if kwargs or not args or not isinstance(args[-1], dict):
        return args, kwargs
    name, value = list(inspect.signature(model.forward).bind(*args).arguments.items())[-1]
    return (args[:-1], {name: value}) if value is args[-1] else (args, kwargs)


def _advice(name: str, error: BaseException, dynamic: bool) -> str:
    """What torch's exporter could not do, and what to do about it."""
    causes: list[str] = []
    at: BaseException | None = error
    while at is not None:
        causes.append(str(at).strip() or type(at).__name__)
        at = at.__cause__
    for text in causes:
        found = _NO_OPERATOR.search(text)
        if found:
            return (
                f"{name}: ONNX has no operator for {found[1]}. Give export_onnx translations={{torch.ops."
                f"{found[1]}: an onnxscript function}}, try a later opset, or write it "
                "with other operators."
            )
    hint = f" {_FIXED}" if dynamic else ""
    return f"{name}: torch cannot export it: {causes[-1].splitlines()[0]}.{hint}"


def _check(path: Path) -> None:
    """Raises: FxExpandError: the file breaks the ONNX standard."""
    onnx = required("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FxExpandError(
            f"{path.name}: what torch wrote is no valid ONNX: {str(error).splitlines()[0]}. Try a later "
            "opset, or another dtype. Nothing was written."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch.onnx and the libraries under it log about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _require_free_batch(program: onnx.ModelProto) -> None:
    if not any(isinstance(shape[0], str) for shape in map(dimensions, program.graph.input) if shape):
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
        shapes = ", ".join(_shape(tuple(tensor.shape)) for tensor in tensors(inputs))
        with evaluating(reference):
            given = feeds(session, inputs)
            try:
                # A copy: what the model writes to its inputs must reach neither the user nor the session.
                expected = tensors_of(call(reference, copy_inputs(inputs)))
            except (RuntimeError, ValueError, IndexError, AssertionError) as problem:
                raise VerificationError(
                    f"{path.name}: the model does not take {shapes}. {_FIXED}"
                ) from problem
            try:
                actual = [torch.from_numpy(np.asarray(value)) for value in session.run(None, given)]
            except required("onnxruntime").capi.onnxruntime_pybind11_state.InvalidArgument as problem:
                raise VerificationError(f"{path.name}: does not run with {shapes}. {_FIXED}") from problem
        error = worst_error(actual, expected)
        if not error <= tolerance:
            where = "" if size is None else f" at batch size {size}"
            raise VerificationError(
                f"{path.name}: relative error {error:.3g}{where} in onnxruntime is above {tolerance:.3g}. "
                "Nothing was written."
            )
        worst = max(worst, error)
    return worst


def _shape(shape: tuple[int | str, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
