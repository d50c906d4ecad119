"""A moving average of a network's weights, of whole and of sharded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average(AveragedModel):
    """The exponential moving average of parameters and running statistics; the first average is the model.

    Integer buffers, such as position ids, are copied, not averaged: torch would round each average down,
    again at every step. So are masks with infinities, whose difference is NaN.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        average: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

        def apart(averages: Any, values: Any, count: Any) -> None:
            # torch's fused update refuses a list in which some tensors are sharded, and buffers are not.
            for sharded in (False, True):
                pairs = zip(averages, values, strict=True)
                alike = [pair for pair in pairs if hasattr(pair[0], "device_mesh") == sharded]
                if alike:
                    average(*map(list, zip(*alike, strict=True)), count)

        super().__init__(model, multi_avg_fn=apart, use_buffers=True)
        buffers = dict(model.named_buffers())
        self.copied = [n for n, b in buffers.items() if not b.is_floating_point() or bool(b.isinf().any())]

    def update_parameters(self, model: nn.Module) -> None:
        """Bring the average up to date."""
        super().update_parameters(model)
        for name in self.copied:
            self.module.get_buffer(name).copy_(model.get_buffer(name))
