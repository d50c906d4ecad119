"""Run a model without a trace: evaluation mode, no gradients, and everything as it was afterwards."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# What a config holds, and does not change by itself; containers are looked into.
VALUES = (int, float, complex, str, bytes, type, Enum, torch.dtype, torch.device, dict, set, list, tuple)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and ``no_grad`` inside; training flags, buffers and random state restored afterwards.

    The flag of each module is set directly: ``model.eval()`` may be overridden to change weights, and an
    exported program refuses it. Buffers are restored in place: a module that counts its calls sees nothing.
    """
    modules = list({module: None for model in models for module in model.modules()})
    moded = [module for module in modules if not getattr(type(module), "keeps_mode", False)]
    flags = [(module, module.training) for module in moded if hasattr(module, "training")]  # not if frozen
    buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
    held = {
        id(tensor): (tensor, tensor.detach().clone(), _version(tensor))
        for _, named in buffers
        for tensor in named.values()
        if tensor is not None
    }
    devices = {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted(d.index or 0 for d in devices)):
            for module, _ in flags:
                module.training = False
            yield
    finally:
        for module, training in flags:
            module.training = training
        for module, named in buffers:
            if not isinstance(module, torch.jit.ScriptModule):  # which cannot lose names
                module._buffers.clear()
            for name, tensor in named.items():
                module._buffers[name] = tensor
        with torch.no_grad():
            for tensor, saved, version in held.values():
                if version is None or _version(tensor) != version:
                    with torch.inference_mode(tensor.is_inference()):  # such are written to only there
                        tensor.copy_(saved)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The attributes of all modules are restored afterwards: training flags, containers, configs among them.

    fx stores constants on the model it traces, and a forward may keep what it computes (a cache). Where it
    writes into a parameter, the attributes stay: one may say so (RWKV divides its weights once).
    """
    versions = [(parameter, _version(parameter)) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    held = containers([vars(module) for module in model.modules()])
    saved = [(container, container.copy()) for container in held]
    try:
        yield
    finally:
        if all(_version(parameter) == version for parameter, version in versions):
            for container, content in saved:
                refill(container, content)
        for module, training in modes:  # which is no Python attribute of a ScriptModule
            module.training = training


def containers(value: Any) -> Iterator[Any]:
    """The dicts, sets and lists in a value, itself among them, to any depth; attributes of a config, too."""
    waiting, seen = [value], set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, dict | set | list):
            yield found
        if isinstance(found, dict | set | list | tuple):
            waiting.extend(found.values() if isinstance(found, dict) else found)
        elif _is_config(found):
            waiting.append(vars(found))


def _is_config(value: Any, depth: int = 3) -> bool:
    """Whether it is an object of nothing but values and objects like it, unlike one that does something."""
    if not hasattr(value, "__dict__") or isinstance(value, (nn.Module, Tensor, *VALUES)) or callable(value):
        return False
    held = vars(value).values()
    return depth > 0 and all(
        each is None or isinstance(each, VALUES) or _is_config(each, depth - 1) for each in held
    )


def refill(container: Any, content: Any) -> None:
    """Give a dict, a set or a list the content that it had; one that has it is not written to."""
    if isinstance(container, set):
        same = container == content
    else:
        now, then = (list(each.items() if isinstance(each, dict) else each) for each in (container, content))
        same = len(now) == len(then) and all(map(_identical, now, then))
    if same:
        return
    container.clear()
    extend = container.extend if isinstance(container, list) else container.update
    extend(content)


def _identical(one: Any, two: Any) -> bool:
    """Whether two values, or two items of dicts, are the same objects."""
    pairs = isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two)
    return one is two or (pairs and all(map(operator.is_, one, two)))


def _version(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None for one that does not count: lazy, or of inference mode."""
    return None if is_lazy(tensor) or tensor.is_inference() else int(tensor._version)
