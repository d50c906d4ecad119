"""Fuse a model for a file, which holds a single path through its code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fxexpand.passes.planner import combined
from fxexpand.running.inputs import ExampleInputs
from fxexpand.surgery.fuse import fuse
from fxexpand.surgery.fuse_plan import ONE_GRAPH
from fxexpand.surgery.transaction import REPORT, report
from fxexpand.tracing.export import program_of
from fxexpand.tracing.tracer import FAILURES


def fused(model: nn.Module, example_inputs: ExampleInputs, dynamic_shapes: Any) -> nn.Module:
    """``fuse(model)``, then the same in the program of the call where the model has no single graph.

    ``fuse`` alone must hold for all paths through the code, in both modes; the file holds one. The program is
    that of ``torch.export``, from which the file is made anyway.
    """
    parts = fuse(model, example_inputs)
    first = report(parts)
    if first.traced == ONE_GRAPH:
        return parts
    try:
        program = program_of(parts, example_inputs, dynamic_shapes)
    except FAILURES:  # torch.onnx may still export it
        return parts
    whole = fuse(program, example_inputs)
    second = report(whole)
    if not second.changed:
        return parts
    traced = f"{first.traced}; then as one program of torch.export"
    whole.__dict__[REPORT] = replace(combined([first, second]), traced=traced)
    return whole
