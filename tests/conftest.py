"""One thread, one seed per test, and no GPU test without a GPU."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

# Two test processes share two cores: more threads would only make them fight.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seed from the test's own name, so that a failure does not depend on the order of the tests."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Forget what was compiled: dynamo counts recompilations of one line of code over all tests together."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture
def even_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets of latency take a call for as long as it has FLOPs: a busy machine changes nothing."""

    def seconds(run: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return 1e-9 * (1 + int(counter.get_total_flops()))

    monkeypatch.setattr("fxexpand.lowrank.costs._seconds", seconds)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
