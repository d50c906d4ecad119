"""Training steps to compare: the ways to train an expanded network, and what one step takes.

All ways share their factors, gradients and momentum: only one set has to fit in memory, and all compute the
same.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fxexpand.deploy.latency.timing import peak_bytes
from fxexpand.layers.accumulation import accumulate
from fxexpand.layers.expanded import Expanded, Form
from fxexpand.layers.rewritten import bare, effective_shape


@dataclass(frozen=True)
class Setting:
    """Where and how steps run.

    Attributes:
        device: of network and images.
        half: autocast to bfloat16.
        channels_last: memory format of network and images.
        compiler: a backend of torch.compile; None runs eagerly.
    """

    device: str
    half: bool = False
    channels_last: bool = False
    compiler: str | None = None

    def cast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return torch.autocast(self.device, torch.bfloat16) if self.half else nullcontext()

    def placed(self, value: Any) -> Any:
        """A network or images where they belong."""
        value = value.to(self.device)
        return value.to(memory_format=torch.channels_last) if self.channels_last else value


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of malloc.h
CPU = Setting("cpu")
META = Setting("meta")
CUDA = Setting("cuda", half=True, channels_last=True, compiler="inductor")


class Product(nn.Module):
    """A layer written without a library: the factors as matrices, multiplied in turn."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """The weight."""
        product = first.reshape(self.groups, first.shape[0] // self.groups, -1)
        for factor in others:
            product = factor.reshape(self.groups, -1, product.shape[1]) @ product
        return product.reshape(-1, *first.shape[1:])


class _Given(Product):
    """``Product`` while it is registered: ``factors`` are what the weight is made of."""

    def __init__(self, groups: int, factors: list[Tensor]) -> None:
        super().__init__(groups)
        self.factors = factors

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """The factors, whatever the weight."""
        return self.factors


def twin(model: nn.Module, form: Form | None = None) -> nn.Module:
    """A copy that shares all parameters, with its expanded layers in another form."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    copied = copy.deepcopy(model, dict[int, Any](shared))
    for module in copied.modules():
        if isinstance(module, Expanded) and form is not None:
            module.form = form
    return copied


def parametrized(big: nn.Module) -> nn.Module:
    """A copy that shares all parameters; its expanded layers are stock layers with a ``Product``."""
    model = twin(big)
    for module in list(model.modules()):
        if isinstance(module, Expanded):
            factors = [part.get_parameter("weight") for part in module.expansion]
            stock: Any = bare(module, nn.Parameter(torch.empty(effective_shape(module), device="meta")))
            stock._parameters["bias"] = module._parameters["bias"]
            for attribute in module.attributes:
                stock.__dict__.pop(attribute, None)
            module.__class__ = type(stock)
            module.__dict__.clear()
            module.__dict__.update(stock.__dict__)
            given = _Given(getattr(module, "groups", 1), [factor.detach() for factor in factors])
            parametrize.register_parametrization(module, "weight", given, unsafe=True)
            originals: Any = module.get_submodule("parametrizations.weight")
            originals[0] = Product(given.groups)
            for i, factor in enumerate(factors):
                originals.register_parameter(f"original{i}", factor)
    return model


class Steps:
    """Steps of one network, and what they take.

    Args:
        model: in training mode from now on.
        x: the images of one batch.
        optimizer: of its parameters.
        batches: micro-batches per step; times and FLOPs are those of one.
        shared: use ``accumulate``.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        optimizer: torch.optim.Optimizer | None,
        setting: Setting,
        batches: int = 1,
        shared: bool = False,
    ) -> None:
        self.model = model.train()
        self.run: Any = model
        if setting.compiler is not None:
            self.run = torch.compile(model, backend=setting.compiler)
        self.x, self.optimizer, self.setting = x, optimizer, setting
        self.batches, self.shared = batches, shared
        self.towards = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def loss(self) -> Tensor:
        """The loss of one forward pass."""
        with self.setting.cast():
            outputs = self.run(self.x)
        return nn.functional.cross_entropy(outputs.float(), self.towards)

    def gradients(self) -> None:
        """Forward and backward, of all micro-batches."""
        with accumulate(self.model, self.batches) if self.shared else nullcontext():
            for _ in range(self.batches):
                self.loss().backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """A whole step."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        self.gradients()
        self.optimizer.step()

    def seconds(self) -> float:
        """Seconds of the share of one micro-batch in a step."""
        return timed(self.step, self.setting.device) / self.batches

    def clear(self) -> None:
        """Without gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def peak(self) -> int:
        """The most bytes that forward and backward hold; leaves the gradients."""
        self.clear()
        return self._peak_of(self.gradients)

    def activation_peak(self) -> int:
        """The same without the gradients of the parameters, but at least what forward alone holds."""
        whole = self.peak() - sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.clear()
        return max(whole, self._peak_of(self.loss))

    def _peak_of(self, run: Callable[[], object]) -> int:
        found = peak_bytes(run, torch.device(self.setting.device))
        assert found is not None  # torch counts on a CPU and on CUDA
        return found

    def flops(self) -> int:
        """FLOPs of forward and backward of one micro-batch, by torch's counter; free on the meta device."""
        with FlopCounterMode(display=False) as counter:
            self.gradients()
        return int(counter.get_total_flops()) // self.batches

    def kept(self) -> tuple[int, int]:
        """Bytes that a forward pass keeps for backward, beyond parameters and buffers: those that depend on
        the images, and those that do not (products of factors)."""
        others = (*self.model.parameters(), *self.model.buffers(), self.towards)
        own = {_storage(tensor) for tensor in others}
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            saved.setdefault(_storage(tensor), tensor)
            return tensor

        with Reached(self.x) as reached, torch.autograd.graph.saved_tensors_hooks(keep, _same):
            loss = self.loss()
        assert loss.requires_grad
        sizes = {key: t.untyped_storage().nbytes() for key, t in saved.items() if key not in own}
        activations = sum(size for key, size in sizes.items() if key in reached.storages)
        return activations, sum(sizes.values()) - activations


class Reached(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which storages depend on a tensor.

    Attributes:
        storages: by their addresses; kept alive, so that none is used again.
    """

    def __init__(self, source: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = {_storage(source): source}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operator."""
        output = func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        if any(isinstance(value, Tensor) and _storage(value) in self.storages for value in given):
            for value in tree_leaves(output):
                if isinstance(value, Tensor):
                    self.storages.setdefault(_storage(value), value)
        return output


def keep_memory() -> None:
    """Have the C library keep freed memory, as torch's allocator for GPUs does.

    glibc gives every freed tensor of some megabytes back to the system, so that a step pays for zeroed pages
    of all its gradients again: up to a quarter of a step on a CPU. Other allocators (jemalloc) do not. Where
    the C library is another one, nothing happens.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def free_bytes() -> int:
    """Memory for new processes, with what the system caches."""
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":") for line in table.read_text(encoding="utf-8").splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def return_memory() -> None:
    """Give back what is free: the next network needs other sizes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _storage(tensor: Tensor) -> int:
    """The identity of a storage while it lives, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def _same(tensor: Tensor) -> Tensor:
    return tensor
