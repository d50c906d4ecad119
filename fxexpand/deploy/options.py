"""The options of ``export_onnx`` and of ``measure_latency``, read without torch.

They are explained at these functions, whose arguments have the same names, types and defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxexpand.errors import SelectionError
from fxexpand.reporting.options import option

if TYPE_CHECKING:
    import torch
    from torch import nn

# The backends that are measured by default, and all of them.
BACKENDS: tuple[str, ...] = ("eager", "compile", "onnxruntime")
EVERY_BACKEND = (*BACKENDS, "aotinductor", "cudagraphs", "tensorrt")


@dataclass(frozen=True)
class OnnxOptions:
    """How a model is written as ONNX, and what is proved of the file; see ``export_onnx``."""

    dynamic_batch: bool = option(True, "Do not leave the batch free.", flag="--fixed-batch")
    verify: bool = option(True, "Compare with the model in onnxruntime.")
    opset: int | None = option(None, "Of ONNX; left out, torch's default.", int)
    tolerance: float | None = None
    fuse: bool = option(False, "Fold everything affine first.")
    dynamic_spatial: bool = option(False, "Leave height and width free, too.", flag="--free-size")
    dynamic_shapes: Any = None
    external_data: bool | None = None
    compare_with: nn.Module | None = None
    metadata: Mapping[str, str] | None = None
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None


@dataclass(frozen=True)
class LatencyOptions:
    """How latency is measured; see ``measure_latency``.

    Raises: SelectionError: a value out of range.
    """

    backends: Sequence[str] = BACKENDS
    device: torch.device | str | None = None
    threads: int | None = option(None, "Threads on the CPU.", int, min=1)
    rounds: int = option(30, "Timings per model and backend.")
    warmup: int = 3
    round_ms: float = 10.0
    confidence: float = 0.95
    tolerance: float | None = None
    progress: bool | None = None
    dtype: torch.dtype | None = None
    channels_last: bool = option(False, "Lay images out so.")
    batch_sizes: Sequence[int] | None = option(
        None, "Batch size, in place of the input's. Repeatable.", list[int], flag="--batch", min=1
    )
    skip_unavailable: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.backends, str):
            object.__setattr__(self, "backends", (self.backends,))
        if not self.backends or not set(self.backends) <= set(EVERY_BACKEND):
            raise SelectionError(f"backends {list(self.backends)}: choose from {', '.join(EVERY_BACKEND)}.")
        if self.warmup < 1:
            raise SelectionError(
                f"warmup={self.warmup}: at least one call, or the first sample holds the start-up."
            )
        if self.batch_sizes is not None and (not self.batch_sizes or min(self.batch_sizes) < 1):
            raise SelectionError(f"batch_sizes={list(self.batch_sizes)}: give sizes of 1 or more.")
