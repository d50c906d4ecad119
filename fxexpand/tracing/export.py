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
from fxexpand.running.evaluation import containers, refill, undisturbed
from fxexpand.running.inputs import ExampleInputs, as_call, batch_size, resize_batch, tensors
from fxexpand.running.outputs import agree, outputs_of
from fxexpand.tracing.guards import guard
from fxexpand.tracing.tracer import FAILURES

_NOT_ONE = re.compile(r"L\[[^ ]*\]\.size\(\)\[0\] (> 1|!= 1|>= 2)")  # a guard against a batch of one


def export(model: nn.Module, example_inputs: ExampleInputs) -> ExportedProgram:
    """The program of one call, for all sizes that take the same path; the model is as it was.

    Lengths of 1 are fixed, as what they are broadcast along goes by them: but a batch of one is exported as
    two where the model takes two.

    Raises: any of ``FAILURES``: torch.export cannot.
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
    """Without a guard against a batch of one where the program computes for it what the model does.

    torch puts one there for its own look at strides, too.
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
    """What torch.export makes, with a guard for each size that the code goes by; the model is as it was.

    By itself torch takes a free length for 2 or more and checks it nowhere, so that a graph takes the wrong
    branch for a batch of one without a word. As torch.onnx does, it is told not to.

    Raises: any of ``FAILURES``: torch.export cannot.
    """
    args, kwargs = as_call(example_inputs)
    careful: Any = settings.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with undisturbed(model), careful, muted(), model.register_forward_hook(_putting_back(model)):
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)


def _putting_back(model: nn.Module) -> Callable[..., None]:
    """A hook that undoes what a forward keeps on the model itself, which torch 2.9 refuses."""
    before = _plain(model)
    held = [(container, container.copy()) for container in containers(before)]

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
    """No word of torch.export: that a forward keeps what it computes, or the graph at which it failed."""
    heard = io.StringIO()
    vars(heard)["rich_proxied_file"] = sys.stderr  # where a progress bar goes on
    with warnings.catch_warnings(), redirect_stderr(heard):
        warnings.simplefilter("ignore")
        yield


def module_of(program: ExportedProgram, training: bool | None = None) -> fx.GraphModule:
    """The module of a program, in the mode that it was exported in; it raises in the other.

    torch sets the flag to training whatever was exported, and refuses ``train()`` and ``eval()``.

    Args:
        training: the mode of the model, whose code may go by it. None takes that of the operators, and where
            none has one the module holds in both.
    """
    graph_module = program.module()
    for name in CHECKS:
        vars(graph_module).pop(name, None)
    for name, value in vars(graph_module).items():
        if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
            value.clear()  # checks, too; those of sizes are in the graph as well
    flags = [flag for node in graph_module.graph.nodes for flag in _flags(node)]
    for module in graph_module.modules():
        module.training = any(flags) if training is None else training
    if flags or training is not None:
        guard(graph_module)
    return graph_module


def _flags(node: fx.Node) -> list[bool]:
    """Whether an operator of ATen is in training mode; empty for one that has no modes."""
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
