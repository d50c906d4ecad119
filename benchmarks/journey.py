"""The steps of every network in a benchmark: build it, give it values as after training, train it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.settle import settle
from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.running.outputs import tensors_of


def settled(build: Callable[[], nn.Module], inputs: ExampleInputs) -> nn.Module:
    """The same network at every call, in evaluation mode.

    As built, zero scales and identity norms would hide errors.
    """
    torch.manual_seed(0)
    model = build().eval()
    settle(model, inputs)
    return model


def train(model: nn.Module, inputs: ExampleInputs) -> list[float]:
    """The losses of three SGD steps that pull the outputs towards zero; NaN if most parameters stay.

    The model ends in evaluation mode and without gradients. A detector in training mode returns its losses.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    before = [_sum(parameter) for parameter in trained]
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        outputs = [t for t in tensors_of(call(model, copy_inputs(inputs))) if t.requires_grad]
        loss = torch.stack([output.square().mean() for output in outputs]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    now = [_sum(parameter) for parameter in trained]
    model.eval()
    moved = sum(bool(a != b) for a, b in zip(before, now, strict=True))
    return losses if moved > len(now) / 2 else [math.nan]


def training_state(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """Outputs in training mode under one seed, and the buffers that this leaves; the model is as before.

    Dropout, drop path and BatchNorm take part, so a trace that froze one of them differs.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        found = [tensor.clone() for tensor in tensors_of(call(model, copy_inputs(inputs)))]
        found += [buffer.clone() for buffer in model.buffers()]
        for buffer, saved in buffers:
            buffer.copy_(saved)
    for module, training in flags:
        module.training = training
    return found


def elsewhere(inputs: ExampleInputs) -> ExampleInputs:
    """Other inputs of the same shapes: every tensor reversed along its last dimension."""

    def flipped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.flip(-1) if value.ndim else value
        if isinstance(value, list | tuple):
            return type(value)(flipped(item) for item in value)
        return value

    if isinstance(inputs, dict):
        return {key: flipped(value) for key, value in inputs.items()}
    result: ExampleInputs = flipped(inputs)
    return result


def _sum(parameter: Tensor) -> Tensor:
    return parameter.detach().double().sum()
