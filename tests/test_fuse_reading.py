"""How ``fuse`` reads code: how often it traces, and what the code does that a graph cannot see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxexpand
from fxexpand.tracing.tracer import RegionTracer
from tests.compare import assert_same
from tests.networks import perturb

X = torch.randn(2, 3, 8, 6, dtype=torch.float64)
EXACT = 1e-10


def made(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    model = kind().double().eval()
    perturb(model)
    return model


def test_a_part_whose_children_hold_no_tensors_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's BatchNorm has a dropout and an activation inside, and a network has hundreds of them."""
    timm = pytest.importorskip("timm")
    traced: list[nn.Module] = []
    original = RegionTracer.trace

    def counted(self: RegionTracer, root: Any, *args: Any) -> Any:
        traced.append(root)
        return original(self, root, *args)

    monkeypatch.setattr(RegionTracer, "trace", counted)
    norm = timm.layers.BatchNormAct2d
    layers = (each for _ in range(8) for each in (nn.Conv2d(3, 3, 1), norm(3)))
    model = perturb(nn.Sequential(*layers).double().eval())
    small = fxexpand.fuse(model)
    assert len(fxexpand.report(small).changed) == 8
    assert len(traced) <= 6 and not any(isinstance(root, norm) for root in traced)
    assert_same(small(X), model(X), EXACT)
