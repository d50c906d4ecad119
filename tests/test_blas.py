"""Products by another library than torch's: the same numbers, and gradients where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxexpand import blas
from tests.compare import assert_same


@pytest.fixture(autouse=True)
def other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "slow_mkl", lambda: True)
    monkeypatch.setattr(blas, "LARGE", 1)


def matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(30, 70, dtype=dtype), torch.randn(70, 20, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_it_is_the_product(dtype: torch.dtype, transposed: bool, batch: tuple[int, ...]) -> None:
    one, two = torch.randn(*batch, 30, 70, dtype=dtype), torch.randn(*batch, 70, 20, dtype=dtype)
    found = blas.multiplied(two.mT, one.mT) if transposed else blas.multiplied(one, two)
    expected = one.double() @ two.double()
    rel = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert_same(found, (expected.mT if transposed else expected).to(dtype), rel)


def test_numpy_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    matmul = np.matmul

    def counted(one: Any, two: Any) -> Any:
        calls.append(1)
        return matmul(one, two)

    monkeypatch.setattr(np, "matmul", counted)
    one, two = matrices(torch.float32)
    blas.multiplied(one, two)
    blas.multiplied(nn.Parameter(one).detach(), two)
    with torch.no_grad():
        blas.multiplied(nn.Parameter(one), two)
    assert len(calls) == 3
    blas.multiplied(one.to("meta"), two.to("meta"))
    blas.multiplied(one.to(torch.float16), two.to(torch.float16))
    assert len(calls) == 3


def test_gradients_are_torchs() -> None:
    one, two = (matrix.requires_grad_() for matrix in matrices(torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: blas.multiplied(a[:3, :4], b[:4, :5]), (one, two))


def test_the_number_of_threads_stays() -> None:
    threads = torch.get_num_threads()
    one, two = matrices(torch.float64)
    blas.multiplied(one, two)
    assert torch.get_num_threads() == threads


def test_the_vendor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    blas.slow_mkl.cache_clear()
    about = Path("/proc/cpuinfo")
    usable = torch.backends.mkl.is_available() and about.exists()  # type: ignore[no-untyped-call]
    for text, slow in (("vendor_id : AuthenticAMD", True), ("vendor_id : GenuineIntel", False)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        blas.slow_mkl.cache_clear()
        assert blas.slow_mkl() == (slow and usable)
    monkeypatch.undo()
    blas.slow_mkl.cache_clear()
