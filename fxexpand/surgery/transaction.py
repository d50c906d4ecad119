"""Carry a plan out on a model, compare its outputs and note the report; refuse models that take no plan."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.layers.sharding import sharded_part
from fxexpand.passes.planner import Plan, commit, restoring
from fxexpand.reporting.rows import Report
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.verify import require_same_outputs

Model = TypeVar("Model", bound=nn.Module)


REPORT = "_fxexpand_report"  # the attribute of a model that holds its report


def report(model: nn.Module) -> Report:
    """The report of the last ``expand`` or ``fuse`` on ``model``: the action at each site, with the reason.

    Raises: FxExpandError: neither has been called on it.
    """
    found = model.__dict__.get(REPORT)
    if not isinstance(found, Report):
        raise FxExpandError(
            f"{type(model).__name__}: has no report. Call fxexpand.expand or fuse, and ask the result."
        )
    return found


def commit_and_compare(
    target: nn.Module, plan: Plan, before: list[Tensor], example_inputs: ExampleInputs | None
) -> None:
    """Commit, compare the outputs, and note the report; on an error ``target`` is as it was."""
    with restoring([*plan.modules, target]):
        commit(plan)
        if example_inputs is not None and plan.steps:
            require_same_outputs(before, target, example_inputs, len(plan.steps), plan.report.title)
        target.__dict__[REPORT] = plan.report


def require_module(model: nn.Module, verb: str) -> None:
    """Raises: FxExpandError or SelectionError: ``verb`` does not take such a model."""
    if isinstance(model, torch.jit.ScriptModule):
        raise FxExpandError(f"{type(model).__name__}: TorchScript is compiled. Call {verb} before scripting.")
    if not isinstance(model, nn.Module):
        raise SelectionError(f"{verb}: got {type(model).__name__}; give an nn.Module.")
    _refuse_sharded(model, verb)
    for _, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise FxExpandError(
                f"{type(module).__name__}: is compiled already. Call {verb} on the model, then torch.compile."
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise FxExpandError(
                f"{type(module).__name__}: holds references to the parameters. "
                f"Call {verb} on the model inside, then wrap it."
            )


def _refuse_sharded(model: nn.Module, verb: str) -> None:
    sharded = sharded_part(model)
    if sharded is not None:
        raise FxExpandError(
            f"{sharded}: is sharded. Call expand before fully_shard. To fold, gather the state with "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), load it into the "
            f"expanded model as it was before, and call {verb} on that."
        )
