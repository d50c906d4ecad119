"""Find NaN and Inf in a weight before anything is computed from it."""

from __future__ import annotations

import torch
from torch import Tensor

from fxexpand.errors import UnusableWeightError


def require_finite(weight: Tensor, name: str, kind: str) -> None:
    """Raises: UnusableWeightError: the weight has NaN or Inf, so no factors; meta tensors pass."""
    if weight.is_meta or not weight.numel():
        return
    if not bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all()):
        raise UnusableWeightError(
            f"{name} ({kind}): holds NaN or Inf, so nothing can be computed from it. "
            "Load a sound checkpoint, or leave it out by select."
        )
