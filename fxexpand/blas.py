"""Large matrix products that need no gradients, by the library that is faster on this processor."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
LARGE = 1 << 24  # multiply-adds; below, no library is worth a choice


def multiplied(one: Tensor, two: Tensor) -> Tensor:
    """``one @ two``, of matrices or batches of them.

    On AMD processors torch's library, MKL, takes a fifth longer than NumPy's OpenBLAS (40 and 48 GFLOP/s in
    float64 on one core of an EPYC), and folding is little else than such products.
    """
    if one.ndim == two.ndim == 3 and len(one) == len(two) == 1:
        return multiplied(one[0], two[0]).unsqueeze(0)
    learns = torch.is_grad_enabled() and (one.requires_grad or two.requires_grad)
    plain = type(one) in PLAIN and type(two) in PLAIN and not learns and one.dtype == two.dtype
    large = one.shape[0] * one.shape[-1] * two.shape[-1] >= LARGE
    on_cpu = one.device.type == two.device.type == "cpu" and one.dtype in (torch.float64, torch.float32)
    if not (plain and large and on_cpu and one.ndim == two.ndim == 2 and slow_mkl()):
        return one @ two
    with _libraries().limit(limits=torch.get_num_threads(), user_api="blas"):
        return torch.from_numpy(np.matmul(one.detach().numpy(), two.detach().numpy()))


@functools.cache
def slow_mkl() -> bool:
    """Whether torch multiplies by MKL on an AMD processor, as far as the system tells."""
    about = Path("/proc/cpuinfo")
    known: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return known and about.exists() and "AuthenticAMD" in about.read_text()


@functools.cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController  # scikit-learn needs it too

    return ThreadpoolController()
