"""Run a model in evaluation mode, without gradients, and restore everything afterwards."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# The values of a config, which do not change by themselves; containers are looked into.
VALUES = (int, float, complex, str, bytes, type, Enum, torch.dtype, torch.device, dict, set, list, tuple)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and ``no_grad`` inside; training flags, buffers and random state restored afterwards.

    The flag of each module is set directly: ``model.eval()`` may be overridden to change weights, and an
    exported program refuses it. Buffers are restored in place, so that a counter of calls stays as it was.
    """
    modules = list({module: None for model in models for module in model.modules()})
    switched = [module for module in modules if not getattr(type(module), "keeps_mode", False)]
    flags = [(module, module.training) for module in switched if hasattr(module, "training")]  # not if frozen
    buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
    contents = _contents(tensor for _, named in buffers for tensor in named.values() if tensor is not None)
    try:
        with torch.no_grad(), torch.random.fork_rng(_cuda_devices(models)):
            for module, _ in flags:
                module.training = False
            yield
    finally:
        for module, training in flags:
            module.training = training
        _restore(buffers, contents)


def _cuda_devices(models: Iterable[nn.Module]) -> list[int]:
    return sorted({p.device.index or 0 for model in models for p in model.parameters() if p.is_cuda})


def _contents(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor, int | None]]:
    """Each tensor once, with a copy of its values and its version."""
    distinct = {id(tensor): tensor for tensor in tensors}.values()
    return [(tensor, tensor.detach().clone(), _version(tensor)) for tensor in distinct]


@torch.no_grad()
def _restore(
    buffers: Iterable[tuple[nn.Module, dict[str, Tensor | None]]],
    contents: Iterable[tuple[Tensor, Tensor, int | None]],
) -> None:
    """Put the buffers back, and the copied values into the tensors that were written to, or may have been.

    The native kernels of BatchNorm write statistics without a new version.
    """
    for module, named in buffers:
        if not isinstance(module, torch.jit.ScriptModule):  # which cannot lose names
            module._buffers.clear()
        for name, buffer in named.items():
            module._buffers[name] = buffer
    for tensor, saved, version in contents:
        if (
            version is None
            or _version(tensor) != version
            or not (tensor.is_meta or torch.equal(tensor, saved))
        ):
            with torch.inference_mode(tensor.is_inference()):  # which can be written only there
                tensor.copy_(saved)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules afterwards: training flags, containers and configs among them.

    fx stores constants on the model it traces, and a forward may store a cache. If the forward writes into a
    parameter, the attributes stay, as one of them may record that write (RWKV divides its weights once).
    """
    versions = [(parameter, _version(parameter)) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    saved = [(each, content_of(each)) for each in containers([vars(module) for module in model.modules()])]
    try:
        yield
    finally:
        if all(_version(parameter) == version for parameter, version in versions):
            for container, content in saved:
                refill(container, content)
        for module, training in modes:  # the flag of a ScriptModule is no Python attribute
            module.training = training


def containers(value: Any) -> Iterator[Any]:
    """The dicts, sets and lists in a value, itself among them, to any depth; also attributes of configs."""
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, dict | set | list):
            yield current
        if isinstance(current, dict | set | list | tuple):
            waiting.extend(each for each in (current.values() if isinstance(current, dict) else current))
        elif _is_config(current):
            waiting.append(vars(current))


def content_of(container: Any) -> Any:
    """A shallow copy as a plain dict, set or list: a subclass may forbid ``copy``."""
    plain = next(kind for kind in (dict, set, list) if isinstance(container, kind))
    return plain.copy(container)


def _is_config(value: Any, depth: int = 3) -> bool:
    """Whether it is an object whose attributes are all values or configs, to a depth of three."""
    if not hasattr(value, "__dict__") or isinstance(value, (nn.Module, Tensor, *VALUES)) or callable(value):
        return False
    return depth > 0 and all(
        each is None or isinstance(each, VALUES) or _is_config(each, depth - 1)
        for each in vars(value).values()
    )


def refill(container: Any, content: Any) -> None:
    """Give a dict, a set or a list its old content; a container that has it is not written to."""
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
    pairs = type(one) is type(two) is tuple and len(one) == len(two)
    return one is two or (pairs and all(map(operator.is_, one, two)))


def _version(tensor: Tensor) -> int | None:
    """The number of writes to the tensor; None for a lazy one or one of inference mode, which count none."""
    return None if is_lazy(tensor) or tensor.is_inference() else int(tensor._version)
