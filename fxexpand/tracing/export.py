"""Graphs of torch.export: of the path that a call takes through the code of a model, in one mode."""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.experimental import _config as settings

from fxexpand.running.copying import CHECKS
from fxexpand.running.evaluation import containers, content_of, refill, undisturbed
from fxexpand.running.inputs import ExampleInputs, as_call, batch_size, resize_batch, tensors
from fxexpand.running.outputs import agree, outputs_of
from fxexpand.tracing.guards import guard
from fxexpand.tracing.tracer import FAILURES

_NOT_ONE = re.compile(r"L\[[^ ]*\]\.size\(\)\[0\] (> 1|!= 1|>= 2)")  # a guard against a batch of one


def export(model: nn.Module, example_inputs: ExampleInputs) -> ExportedProgram:
    """The program of one call, for all sizes that take the same path; the model is as it was.

    Lengths of 1 are fixed, as broadcasting depends on them; a batch of one is exported as one of two, if the
    model takes two.

    Raises: any of ``FAILURES``: torch.export fails.
    """
    if batch_size(example_inputs) == 1:
        try:
            return _for_one(_export(model, resize_batch(example_inputs, 2)), model, example_inputs)
        except FAILURES:
            pass
    return _for_one(_export(model, example_inputs), model, example_inputs)


def _export(model: nn.Module, example_inputs: ExampleInputs) -> ExportedProgram:
    args, kwargs = as_call(example_inputs)
    free = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in tensors(example_inputs):
        free[tensor] = {i: Dim.AUTO for i, length in enumerate(tensor.shape) if length != 1}
    shapes: Any = free.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]
    return program_of(model, example_inputs, shapes)


def _for_one(program: ExportedProgram, model: nn.Module, example_inputs: ExampleInputs) -> ExportedProgram:
    """Drop the guard against a batch of one where the program then computes what the model does.

    torch adds that guard also where only its own analysis of strides needs it.
    """
    given = program._guards_code
    kept = [guard for guard in given if not _NOT_ONE.fullmatch(guard)]
    if model.training or len(kept) == len(given):
        return program
    program._guards_code = kept
    try:
        one = resize_batch(example_inputs, 1)
        same = agree(outputs_of(module_of(program), one), outputs_of(model, one))
    except FAILURES:
        same = False
    if not same:
        program._guards_code = given
    return program


def program_of(model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any) -> ExportedProgram:
    """The program of torch.export, with a guard for each condition on sizes; the model is as it was.

    By default torch assumes that a free length is at least 2 and never checks it, so that a program silently
    takes the wrong branch for a batch of one. ``backed_size_oblivious`` adds guards, as in torch.onnx.

    Raises: any of ``FAILURES``: torch.export fails.
    """
    args, kwargs = as_call(example_inputs)
    careful: Any = settings.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with undisturbed(model), careful, muted(), model.register_forward_hook(_putting_back(model)):
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)


def _putting_back(model: nn.Module) -> Callable[..., None]:
    """A hook that undoes assignments of a forward to attributes of the model, which torch 2.9 refuses."""
    before = _plain(model)
    held = [(container, content_of(container)) for container in containers(before)]

    def put_back(*_: Any) -> None:
        for name in _plain(model).keys() - before.keys():
            del vars(model)[name]
        vars(model).update(before)
        for container, content in held:
            refill(container, content)

    return put_back


def _plain(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if not name.startswith("_")}


@contextmanager
def muted() -> Iterator[None]:
    """No warnings, and nothing on stderr, where torch prints the graph at which it failed."""
    sink = io.StringIO()
    vars(sink)["rich_proxied_file"] = sys.stderr  # a progress bar goes on there
    with warnings.catch_warnings(), redirect_stderr(sink):
        warnings.simplefilter("ignore")
        yield


def module_of(program: ExportedProgram, training: bool | None = None) -> fx.GraphModule:
    """The module of a program, in the mode that it was exported in; it raises in the other.

    torch always sets the flag to training, and refuses ``train()`` and ``eval()``.

    Args:
        training: the mode of the model, whose code may depend on it. None: the mode of the operators; the
            module holds in both where no operator has one.
    """
    graph_module = program.module()
    for name in CHECKS:
        vars(graph_module).pop(name, None)
    for name, value in vars(graph_module).items():
        if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
            value.clear()  # checks as well; the graph itself checks sizes
    flags = [flag for node in graph_module.graph.nodes for flag in _flags(node)]
    for module in graph_module.modules():
        module.training = any(flags) if training is None else training
    if flags or training is not None:
        guard(graph_module)
    return graph_module


def _flags(node: fx.Node) -> list[bool]:
    """Whether an operator of ATen is in training mode; empty for an operator without modes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    if "no_training" in node.target._schema.name:  # a decomposed BatchNorm
        return [False]
    arguments = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    given = dict(zip(defaults, node.args, strict=False)) | node.kwargs
    if given.get("dropout_p"):  # of attention, which has no flag
        return [True]
    return [bool(given.get(name, defaults[name])) for name in ("train", "training") if name in defaults]
