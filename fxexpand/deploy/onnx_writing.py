"""Write a model as an ONNX file with torch's exporter, for the call that the file stands for."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fxexpand.deploy.free_sizes import free_sizes
from fxexpand.deploy.options import OnnxOptions
from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.running.evaluation import evaluating, undisturbed
from fxexpand.running.inputs import ExampleInputs, as_call, batch_size, call, resize_batch
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.running.outputs import tensors_of
from fxexpand.tracing.export import muted
from fxexpand.zoo import required

if TYPE_CHECKING:
    import onnx

# A protobuf message cannot be larger than 2 GiB; past this the weights go to a second file beside the first.
SINGLE_FILE_BYTES = 1_900_000_000

FIXED = (
    "If the model fixes a size (a reshape to constants), use dynamic_batch=False, dynamic_spatial=False or "
    "dynamic_shapes=."
)
_NO_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")


@dataclass(frozen=True)
class ExportedCall:
    """The call that a file stands for.

    Attributes:
        inputs: the example inputs; of two rows where there was one and the batch is free, as torch.export
            takes a length of 1 as fixed.
        free: the free dimensions, as ``torch.export`` takes them; None where there are none.
        names: the names of the free dimensions, by tensor and axis.
        batch_sizes: at which the file is compared with the model; none where the batch is not free.
    """

    inputs: ExampleInputs
    free: Any
    names: Sequence[Mapping[int, str]]
    batch_sizes: tuple[int, ...]


def exported_call(model: nn.Module, example_inputs: ExampleInputs, options: OnnxOptions) -> ExportedCall:
    """The call of ``model`` with the free dimensions that the options ask for.

    Raises:
        SelectionError: an empty batch, or no such dimension.
        FxExpandError: an output is no tensor.
    """
    batch, given = batch_size(example_inputs), options.dynamic_shapes
    if batch == 0:
        raise SelectionError("example inputs: an empty batch: there is nothing to compare. Give one input.")
    with evaluating(model):
        output = call(model, copy_inputs(example_inputs))
    leaves = tree_leaves(output)
    others = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, torch.Tensor | None)]
    if others or not tensors_of(output):
        kind = f"{'an' if others[0][0] in 'aeiou' else 'a'} {others[0]}" if others else "no tensor"
        raise FxExpandError(
            f"{type(model).__name__}: returns {kind}; an ONNX file returns tensors alone. Leave such outputs "
            "out (a cache of transformers: use_cache=False), or wrap the model in a module that does."
        )
    free_batch = options.dynamic_batch and given is None
    if free_batch and batch == 1:
        example_inputs, batch = resize_batch(example_inputs, 2), 2
    free, names = given, list[dict[int, str]]()
    if not given:
        spatial = options.dynamic_spatial
        free, names = free_sizes(model, example_inputs, batch=free_batch, spatial=spatial)
    sizes = tuple(sorted({1, batch, batch + 1})) if free_batch and batch else ()
    return ExportedCall(example_inputs, free, names, sizes)


def write_onnx(
    model: nn.Module, path: Path, exported: ExportedCall, options: OnnxOptions, metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """Write the file, and one for the weights if asked for or needed, into a folder of their own.

    Returns: the program that the file holds, without the weights of a second file.

    Raises: FxExpandError: torch cannot export the model.
    """
    external, translations = options.external_data, options.translations
    path.parent.mkdir()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    args, kwargs = _as_torch_reads(model, *as_call(exported.inputs))
    try:
        with undisturbed(model), evaluating(model), muted(), quiet("torch.onnx", "onnxscript"):
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=exported.free,
                opset_version=options.opset,
                custom_translation_table=None if translations is None else dict(translations),
                verbose=False,
            )
            assert program is not None
            if exported.names:
                _rename(program, exported.names)
            program.model.metadata_props.update(metadata)
            program.save(path, external_data=weights > SINGLE_FILE_BYTES if external is None else external)
    except torch.onnx.OnnxExporterError as error:
        raise FxExpandError(_advice(type(model).__name__, error, exported.free is not None)) from error
    written: onnx.ModelProto = required("onnx", "onnx").load(str(path), load_external_data=False)
    return written


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
    """The same call with a last argument that is a dict by its name: torch.onnx takes it for the keywords."""
    if kwargs or not args or not isinstance(args[-1], dict):
        return args, kwargs
    name, value = list(inspect.signature(model.forward).bind(*args).arguments.items())[-1]
    return (args[:-1], {name: value}) if value is args[-1] else (args, kwargs)


def _advice(name: str, error: BaseException, dynamic: bool) -> str:
    """The cause of an error of torch's exporter, and its remedy."""
    at: BaseException | None = error
    while at is not None:
        cause = str(at).strip() or type(at).__name__
        if found := _NO_OPERATOR.search(cause):
            return (
                f"{name}: ONNX has no operator for {found[1]}. Give export_onnx translations={{torch.ops."
                f"{found[1]}: an onnxscript function}}, try a later opset, or write it "
                "with other operators."
            )
        at = at.__cause__
    hint = f" {FIXED}" if dynamic else ""
    return f"{name}: torch cannot export it: {cause.splitlines()[0]}.{hint}"


def check_onnx(path: Path) -> None:
    """Check the file against the ONNX standard.

    Raises: FxExpandError: the file breaks it.
    """
    onnx = required("onnx", "onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FxExpandError(
            f"{path.name}: what torch wrote is no valid ONNX: {str(error).splitlines()[0]}. Try a later "
            "opset, or another dtype. Nothing was written."
        ) from error


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence the loggers of these names, and those under them."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
