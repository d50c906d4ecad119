"""Random networks: what they are made of, and the builder that adds one step at a time.

One generator serves the property test and ``benchmarks/fuzz_fuse.py``: every decision is ``choose(n)``, a
number in ``range(n)``, from hypothesis or from a seeded generator. Each step is run as it is drawn, so every
network runs, and shapes are those of real values. The operators are in ``tests/dag_operators.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

Choose = Callable[[int], int]
T = TypeVar("T")

LARGEST = 4000  # elements of a value
# A value that cancels to rounding cannot be compared, nor one that overflows.
SMALLEST_VALUE, LARGEST_VALUE = 1e-3, 1e3


@dataclass(frozen=True)
class Step:
    """``values[outputs] = run(network, *values[inputs])``; ``text`` is how it reads, inputs as {0}, {1}."""

    text: str
    run: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __str__(self) -> str:
        given = self.text.format(*(f"v{i}" for i in self.inputs))
        return f"{', '.join(f'v{i}' for i in self.outputs)} = {given}"


class Dag(nn.Module):
    """Steps on numbered values; value 0 is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.returned: tuple[int, ...] = (0,)

    def forward(self, x: Tensor) -> Any:
        values: dict[int, Any] = {0: x}
        for step in self.steps:
            result = step.run(self, *[values[i] for i in step.inputs])
            if len(step.outputs) == 1:
                values[step.outputs[0]] = result
            else:
                values |= {place: result[i] for i, place in enumerate(step.outputs)}
        found = tuple(values[i] for i in self.returned)
        return found[0] if len(found) == 1 else found

    def with_steps(self, steps: Sequence[Step], returned: Sequence[int]) -> Dag:
        """Some of the steps, and the modules and constants they use, which are shared."""
        smaller = Dag()
        smaller.steps, smaller.returned = list(steps), tuple(returned)
        used = set(re.findall(r"\b[mp]\d+\b", " ".join(step.text for step in steps)))
        smaller._modules.update({k: v for k, v in self._modules.items() if k in used})
        smaller._parameters.update({k: v for k, v in self._parameters.items() if k in used})
        smaller._buffers.update({k: v for k, v in self._buffers.items() if k in used})
        return smaller.eval()

    def listing(self) -> str:
        """The network as text: one line for each step, and what its modules are."""
        lines = []
        for step in self.steps:
            name = step.text.split("(")[0]
            module = self._modules.get(name)
            line = "" if module is None else " ".join(repr(module).split())
            hooked = module is not None and (module._forward_hooks or module._forward_pre_hooks)
            lines.append(f"{step}  {f'# {line}' if line else ''}{' (hooked)' if hooked else ''}".rstrip())
        return "\n".join([*lines, f"return {', '.join(f'v{i}' for i in self.returned)}"])


class IdlePath(nn.Module):
    """DropPath as libraries write it: the identity in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), dtype=x.dtype, device=x.device) < 0.8
        return x * keep / 0.8


class Builder:
    """A network that grows by one step at a time, with the values it has for one input."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.network = Dag()
        self.generator = torch.Generator().manual_seed(choose(1 << 20))
        channels, size = 2 + choose(3), (4 + choose(4), 5 + choose(3))
        shape = self.pick([(2, channels, *size), (2, channels, size[0]), (3, channels)])
        self.x = self.normal(*shape)
        self.values = {0: self.x.clone()}
        self._names = 0

    def pick(self, items: Sequence[T]) -> T:
        return items[self.choose(len(items))]

    def chance(self, of: int) -> bool:
        """True once in ``of`` times; False is the simpler choice."""
        return self.choose(of) == of - 1

    def each(self, rank: int, items: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.pick(items) for _ in range(rank))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def number(self) -> float:
        return self.pick([2.0, 0.5, -1.25, 3.0, -0.75])

    def source(self) -> int:
        """A value to go on from: mostly the last one."""
        last = max(self.values)
        return self.pick([*self.values]) if self.chance(3) else last

    def constant(self, value: Tensor) -> str:
        """A parameter or a buffer."""
        self._names += 1
        name = f"p{self._names}"
        if self.chance(2):
            self.network.register_parameter(name, nn.Parameter(value))
        else:
            self.network.register_buffer(name, value)
        return name

    def per_channel(self, x: Tensor, low: float = 0.5) -> str:
        """Constants for the channels of ``x``, away from zero."""
        channels, tail = (x.shape[1], (1,) * (x.ndim - 2)) if x.ndim > 2 else (x.shape[-1], ())
        value = self.normal(channels)
        value = torch.where(value < 0, -1.0, 1.0) * (low + value.abs())
        shape = (1, channels, *tail) if self.chance(2) else (channels, *tail)
        return self.constant(value.reshape(shape))

    def step(self, text: str, run: Callable[..., Any], *inputs: int, outputs: int = 1) -> int | None:
        """Run one more step; the number of its last value, None where it is not taken."""
        given = [self.values[i] for i in inputs]
        before = [value.clone() for value in given]
        try:
            with torch.no_grad():
                result = run(self.network, *given)
        except (RuntimeError, ValueError, IndexError):  # shapes that do not fit
            return None
        results = list(result) if outputs > 1 else [result]
        if len(results) != outputs or not all(self._sound(value, before) for value in results):
            for value, old in zip(given, before, strict=True):
                value.copy_(old)
            return None
        places = tuple(range(len(self.values), len(self.values) + outputs))
        self.network.steps.append(Step(text, run, inputs, places))
        self.values |= dict(zip(places, results, strict=True))
        return places[-1]

    def _sound(self, value: Any, given: Sequence[Tensor]) -> bool:
        if not isinstance(value, Tensor) or not 2 <= value.ndim <= 4 or not 0 < value.numel() <= LARGEST:
            return False
        largest, scale = float(value.abs().max()), max(float(x.abs().max()) for x in given)
        return SMALLEST_VALUE * max(1.0, scale) < largest < LARGEST_VALUE

    def call(self, module: nn.Module, i: int) -> int | None:
        """Call a new module with weights and statistics of its own."""
        self._names += 1
        name = f"m{self._names}"
        self._fill(module.double().eval())
        self._dress(module)
        self.network.add_module(name, module)
        found = self.step(f"{name}({{0}})", lambda net, x: net.get_submodule(name)(x), i)
        if found is None:
            delattr(self.network, name)
        return found

    @torch.no_grad()
    def _fill(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            fan_in = max(1, math.prod(parameter.shape[1:]))
            parameter.copy_(self.normal(*parameter.shape) / math.sqrt(fan_in))
            if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
                parameter.abs_().add_(0.3)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.copy_(0.3 * self.normal(module.num_features))
            module.running_var.copy_(0.4 + self.normal(module.num_features).abs())

    def _dress(self, module: nn.Module) -> None:
        """Now and then a hook, a weight that another module has too, or a computed one."""
        kind = self.choose(40)
        weight = getattr(module, "weight", None)
        if kind == 39:
            module.register_forward_hook(_doubled)
        elif kind == 38:
            module.register_forward_pre_hook(_shifted)
        elif kind >= 35 and weight is not None:
            for other in self.network.children():
                if type(other) is type(module) and getattr(other.weight, "shape", None) == weight.shape:
                    module.weight = other.weight
        elif kind == 34 and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            parametrizations.weight_norm(module)

    def finish(self) -> tuple[Dag, Tensor]:
        """The network, which returns what nothing else reads (at most three), and its input."""
        read = {i for step in self.network.steps for i in step.inputs}
        ends = [i for i in self.values if i not in read][-3:] or [max(self.values)]
        if self.chance(6):
            ends.append(self.pick([*self.values]))
        self.network.returned = tuple(dict.fromkeys(ends))
        return self.network.eval(), self.x


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def _shifted(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 0.5,)
