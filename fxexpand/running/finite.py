"""Find NaN and Inf in a weight before anything is computed from it."""

from __future__ import annotations

import torch
from torch import Tensor

from fxexpand.errors import UnusableWeightError


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf; a meta tensor, which has no values, passes."""
    if tensor.is_meta or not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def require_finite(weight: Tensor, name: str, kind: str) -> None:
    """Raises: UnusableWeightError: the weight has NaN or Inf, so no factors; meta tensors pass."""
    if not is_finite(weight):
        raise UnusableWeightError(
            f"{name} ({kind}): holds NaN or Inf, so nothing can be computed from it. "
            "Load a sound checkpoint, or leave it out by select."
        )
