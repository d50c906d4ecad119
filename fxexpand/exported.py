"""Graphs of torch.export: of the path that a call takes through the code of a model, in one mode."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.experimental import _config as settings

from fxexpand.copying import CHECKS
from fxexpand.evaluating import undisturbed
from fxexpand.inputs import ExampleInputs, as_call, batch_size, resize_batch, tensors
from fxexpand.modes import guard
from fxexpand.tracer import FAILURES


def export(model: nn.Module, example_inputs: ExampleInputs) -> ExportedProgram:
    """The program of one call, for all sizes that take the same path; the model is as it was.

    torch.export takes a length of 1 as fixed, so a batch of one is exported as two where the model takes two.

    Raises: any of ``FAILURES``: torch.export cannot.
    """
    if batch_size(example_inputs) == 1:
        try:
            return _export(model, resize_batch(example_inputs, 2))
        except FAILURES:
            pass
    return _export(model, example_inputs)


def _export(model: nn.Module, example_inputs: ExampleInputs) -> ExportedProgram:
    args, kwargs = as_call(example_inputs)
    free = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in tensors(example_inputs):
        free[tensor] = {i: Dim.AUTO for i, length in enumerate(tensor.shape) if length != 1}
    shapes: Any = free.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]
    # Otherwise torch takes a free length for 2 or more, and the branch for that in a batch of one as well.
    careful: Any = settings.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with undisturbed(model), careful, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a forward keeps what it computes, which is put back
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def module_of(program: ExportedProgram) -> fx.GraphModule:
    """The module of a program, in the mode that its operators are in; where they are in one, it is guarded.

    torch sets the flag to training whatever was exported, and refuses ``train()`` and ``eval()``.
    """
    graph_module = program.module()
    for name in CHECKS:
        vars(graph_module).pop(name, None)
    graph_module._forward_pre_hooks.clear()  # checks, too; those of sizes are in the graph as well
    flags = [flag for node in graph_module.graph.nodes for flag in _flags(node)]
    for module in graph_module.modules():
        module.training = any(flags)
    if flags:
        guard(graph_module)
    return graph_module


def _flags(node: fx.Node) -> list[bool]:
    """Whether an operator of ATen is in training mode; empty for one that has no modes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    given = dict(zip(defaults, node.args, strict=False)) | node.kwargs
    return [bool(given.get(name, defaults[name])) for name in ("train", "training") if name in defaults]
