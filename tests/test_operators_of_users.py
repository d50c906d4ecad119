"""Rows that users add to the operator table from outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand.errors import InexactError
from fxexpand.passes.affine.maps import scaling
from fxexpand.passes.affine.steps import Affine, Step
from fxexpand.passes.operators import SYNONYMS, Call, bind, row
from fxexpand.passes.operators.arithmetic import same
from fxexpand.passes.operators.table import Values
from tests.compare import assert_same
from tests.networks import perturb
from tests.test_operators import EXACT


def twice(x: Tensor) -> Tensor:
    """An operator of somebody else: not torch's, and a leaf of every trace."""
    doubled: Tensor = torch.stack([x, x]).sum(0)
    return doubled


class Twice(nn.Module):
    """Somebody else's layer."""

    factor = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x, x]).sum(0) if self.factor == 3.0 else x


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Twice()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.twice(twice(self.conv(x))))
        return y


def test_a_user_registers_an_operator_of_their_own() -> None:
    model = perturb(Doubled().double().eval())
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)

    @row(twice, shape=same, fresh=True)
    def step(call: Call, values: Values) -> Step:
        return Affine(call["input"], scaling(2.0, None, None))

    @row("triple", "input factor", modules=(Twice,), shape=same)
    def tripled(call: Call, values: Values) -> Step:
        return Affine(call["input"], scaling(call["factor"], None, None))

    fused = fxexpand.fuse(model, x)
    assert [type(module) for module in fused.modules() if not list(module.children())] == [nn.Conv2d]
    assert_same(fused(x), model(x), EXACT)


def test_a_wrong_row_is_caught_by_the_comparison() -> None:
    @row(twice, shape=same, fresh=True)
    def step(call: Call, values: Values) -> Step:
        return Affine(call["input"], scaling(2.5, None, None))

    model = perturb(Doubled().double().eval())
    with pytest.raises(fxexpand.VerificationError):
        fxexpand.fuse(model)


def test_a_row_refuses_with_its_reason() -> None:
    @row(twice, fresh=True)
    def step(call: Call, values: Values) -> Step:
        raise InexactError("it is refused for a test.")

    model = perturb(Doubled().double().eval())
    report = fxexpand.report(fxexpand.fuse(model))
    assert any("refused for a test" in refusal.reason for refusal in report.refusals)


def test_a_synonym_joins_a_row() -> None:
    SYNONYMS["unsafe_chunk"] = "chunk"
    call = bind(torch.unsafe_chunk, ("x", 2, 1), {})
    assert call is not None and call.name == "chunk" and "unsafe_chunk" in SYNONYMS
    del SYNONYMS["unsafe_chunk"]
    assert bind(torch.unsafe_chunk, ("x", 2, 1), {}) is None and "unsafe_chunk" not in SYNONYMS
