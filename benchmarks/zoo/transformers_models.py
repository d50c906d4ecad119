"""Small random models of the transformers library: one per architecture, with inputs that it takes.

Nothing is downloaded: every model is built from a configuration of ten to a few hundred thousand parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.transformers_configs import ENTRIES
from benchmarks.zoo.transformers_inputs import Inputs

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def names() -> list[str]:
    """The architectures, in alphabetical order."""
    return sorted(ENTRIES)


def build(name: str) -> tuple[nn.Module, Inputs]:
    """``(model in eval mode, keyword arguments of its forward)``; the same weights and inputs at every call.

    Raises: KeyError: no such name.
    """
    import transformers

    entry = ENTRIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, entry.model)(config_of(name))
        with torch.no_grad():
            for parameter in model.parameters():  # biases of zero and scales of one would hide faults
                if parameter.ndim <= 1 and parameter.is_floating_point():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = entry.inputs()
    evaluated: nn.Module = model.eval()
    return evaluated, inputs


def config_of(name: str) -> Any:
    """The small configuration."""
    import transformers

    entry = ENTRIES[name]
    nested = {key: getattr(transformers, cls)(**options) for key, cls, options in entry.nested}
    config = getattr(transformers, entry.config)(**entry.options, **nested)
    config._experts_implementation = "eager"  # the default multiplies in no more than float32
    return config


def generates(model: nn.Module) -> bool:
    """Whether the model has a working ``generate``."""
    can: Callable[[], bool] | None = getattr(model, "can_generate", None)
    return can is not None and bool(can())


def generate(model: Any, inputs: Inputs, length: int = 5) -> Tensor:
    """Greedy tokens that follow the inputs."""
    taken = {key: value for key, value in inputs.items() if key not in ("decoder_input_ids", "labels")}
    with torch.no_grad():
        tokens = model.generate(**taken, max_new_tokens=length, min_new_tokens=length, do_sample=False)
    return torch.as_tensor(tokens)
