"""NaN and Inf are found before anything is computed of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fxexpand.errors import UnusableWeightError


def require_finite(weight: Tensor, name: str, kind: str) -> None:
    """Raises: UnusableWeightError: NaN or Inf, of which there are no factors; meta tensors pass."""
    if weight.is_meta or not weight.numel():
        return
    if not bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all()):
        raise UnusableWeightError(
            f"{name} ({kind}): holds NaN or Inf, so nothing can be computed of it. "
            "Load a sound checkpoint, or leave it out by select."
        )
