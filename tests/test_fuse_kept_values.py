"""``fuse`` of models whose forward keeps values on its modules, for other code or for the next call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from tests.compare import assert_same
from tests.test_fuse_reading import EXACT, Net, X, made


class KeepsInRow(Net):
    """Keeps a value between two modules, as auxiliary heads read it."""

    def forward(self, x: Tensor) -> Any:
        self.feature = self.one(x)
        return self.norm(self.feature).relu()


class KeepsInList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.maps: dict[str, list[Tensor]] = {"maps": []}

    def forward(self, x: Tensor) -> Any:
        self.maps["maps"] = [self.one(x)]
        return self.norm(self.maps["maps"][0]).relu()


class KeepsSum(Net):
    def forward(self, x: Tensor) -> Any:
        self.feature = self.both(x)
        return self.norm(self.feature).relu()


class Toggles(Net):
    def forward(self, x: Tensor) -> Any:
        self.flag = not getattr(self, "flag", False)
        y = self.both(x)
        return y if self.flag else -y


class AddsLast(Net):
    last_value: Any = None

    def forward(self, x: Tensor) -> Any:
        y = self.both(x)
        out = y if self.last_value is None else y + self.last_value
        self.last_value = y.detach()
        return out


class Collects(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.one(x))
        self.seen.append(y)
        return sum(self.seen)


class Decays(Net):
    """Keeps a tensor that is no buffer, computed from itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.ones(4, 1, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        y = self.both(x) * self.weight
        self.weight = self.weight * 0.5
        return y


class DecaysByParameter(Decays):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Any:
        y = self.both(x) * self.weight
        self.weight = self.weight * self.rate
        return y


class DecaysInMapping(DecaysByParameter):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"weight": torch.ones(4, 1, 1, dtype=torch.float64)}

    def forward(self, x: Tensor) -> Any:
        y = self.both(x) * self.state["weight"]
        self.state["weight"] = self.state["weight"] * self.rate
        return y


DECAYS = [Decays, DecaysByParameter, DecaysInMapping]
KEPT = [KeepsInRow, KeepsInList, KeepsSum, Toggles, AddsLast, Collects, *DECAYS]


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("kind", KEPT)
def test_what_a_forward_keeps_is_the_same_at_every_call(kind: type[Net], example: Tensor | None) -> None:
    model = made(kind)
    small = fxexpand.fuse(model, example)
    assert not fxexpand.report(small).changed
    for image in (X, -X, X):
        assert_same(small(image), model(image), EXACT)
        for name in ("feature", "last_value"):
            if hasattr(model, name):
                assert_same(getattr(small, name), getattr(model, name), EXACT)
    assert any("keeps" in row.reason or "read" in row.reason for row in fxexpand.report(small).rows)


class Caches(Net):
    """Keeps a bias that it computes of parameters once, as attention with positions does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(4))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[:, None, None]
        return self.norm(self.one(x)).relu() + self.cache["bias"]


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
def test_a_cache_of_constants_ends_no_fold(example: Tensor | None) -> None:
    model = made(Caches)
    small = fxexpand.fuse(model, example)
    assert fxexpand.report(small).changed
    for image in (X, -X):
        assert_same(small(image), model(image), EXACT)


class Casts(Net):
    """Keeps a constant as the dtype of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.rand(1, 3, 1, 1)

    def forward(self, x: Tensor) -> Any:
        self.mean = self.mean.type_as(x)
        return self.norm(self.one((x - self.mean) * 255.0)).relu()


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
def test_a_constant_that_is_cast_and_kept_ends_no_fold(example: Tensor | None) -> None:
    model = made(Casts)
    small = fxexpand.fuse(model, example)
    assert_same(small(X), model(X), EXACT)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
