"""Fusing graphs that write into the memory of a value through another value that shares it."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxexpand import fuse, report
from fxexpand.passes import Fuse
from fxexpand.tracing.graphs import trace
from tests.compare import assert_same
from tests.graphs import EXACT

Write = Callable[[Any, Any], Any]


def swapped(x: Tensor) -> Tensor:
    """An operator that no row describes: a view of its argument."""
    return x.swapdims(-1, -2)


fx.wrap("swapped")


class Writing(nn.Module):
    """Two branches of one value, a write into the first, and their sum."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.flat, self.relu = nn.Flatten(), nn.ReLU(inplace=True)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        v, u = self.a(x), self.b(x)
        self.write(self, v)
        return torch.tanh(v + u)


def assigned(m: Any, v: Any) -> None:
    """``v[:, 0] = 0`` in a graph, which fx writes for no proxy."""

    if isinstance(v, fx.Proxy):
        v.tracer.create_proxy("call_function", operator.setitem, (v, (slice(None), 0), 0.0), {})
    else:
        v[:, 0] = 0.0


WRITES: dict[str, Write] = {
    "channels": lambda m, v: v[:, :1].add_(1.0),
    "step": lambda m, v: v[:, ::2].mul_(2.0),
    "view": lambda m, v: v.view(-1).mul_(2.0),
    "flatten": lambda m, v: v.flatten(1).relu_(),
    "chunk": lambda m, v: v.chunk(2, 1)[0].mul_(2.0),
    "split": lambda m, v: torch.split(v, 1, dim=1)[3].sub_(1.0),
    "unbind": lambda m, v: v.unbind(1)[0].zero_(),
    "select": lambda m, v: v.select(1, 0).fill_(3.0),
    "narrow": lambda m, v: v.narrow(1, 0, 2).neg_(),
    "transpose": lambda m, v: v.transpose(1, 2).add_(2.0),
    "view of a view": lambda m, v: v.permute(0, 2, 3, 1)[..., :1].unsqueeze(0).div_(3.0),
    "the same dtype": lambda m, v: v.to(v.dtype).mul_(2.0),
    "data": lambda m, v: v.data.mul_(2.0),
    "detached": lambda m, v: v.detach().mul_(2.0),
    "expanded": lambda m, v: v.expand(-1, -1, -1, -1).mul_(2.0),
    "out": lambda m, v: torch.mul(v, 2.0, out=v),
    "out of a view": lambda m, v: torch.exp(v[:, :1], out=v[:, :1]),
    "function with an option": lambda m, v: F.relu(v[:, 1:], inplace=True),
    "module": lambda m, v: m.relu(v.reshape(v.shape[0], -1)),
    "modules": lambda m, v: m.relu(m.flat(v)),
    "mask": lambda m, v: v.masked_fill_(v > 0, 0.0),
    "items": assigned,
    "copy": lambda m, v: v[:, 1:2].copy_(v[:, :1]),
    "list": lambda m, v: torch._foreach_mul_([v[:, :1]], 2.0),
    "unknown operator": lambda m, v: swapped(v).mul_(2.0),
    "aten": lambda m, v: torch.ops.aten.mul_.Tensor(torch.ops.aten.slice.Tensor(v, 1, 0, 2), 2.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_through_a_view_between_branches_and_their_sum(name: str) -> None:
    model = Writing(WRITES[name]).double().eval()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        for small in (Fuse()(trace(model)).graph_module, fuse(model), fuse(model, x)):
            assert_same(small(x), expected, EXACT)


@pytest.mark.parametrize("name", ["channels", "view", "the same dtype", "module", "unknown operator"])
def test_the_refusal_says_that_a_value_is_written_in_place(name: str) -> None:
    rows = Fuse()(trace(Writing(WRITES[name]).double().eval())).report.rows
    reasons = [row.reason for row in rows if row.action == "refused"]
    assert any("written in place" in reason for reason in reasons), rows


class Parts(nn.Module):
    """A part of the channels with a shift in place, and what is read afterwards."""

    def __init__(self, read: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv1d(3, 4, 1), read

    def forward(self, x: Tensor) -> Tensor:
        whole = self.conv(x)
        part = whole[:, :2]
        return self.read(whole, part, part.add_(1.0))


@pytest.mark.parametrize("read", [lambda w, p, q: w, lambda w, p, q: w.tanh() * 2, lambda w, p, q: w[:, 1:]])
def test_a_part_that_is_written_into_stands_for_the_whole(read: Any) -> None:
    model, x = Parts(read).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        for small in (Fuse()(trace(model)).graph_module, fuse(model), fuse(model, x)):
            assert_same(small(x), model(x), EXACT)


@pytest.mark.parametrize("read", [lambda w, p, q: q, lambda w, p, q: p])
def test_a_part_is_one_kernel_where_nothing_reads_the_whole_afterwards(read: Any) -> None:
    model, x = Parts(read).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    fused = Fuse()(trace(model))
    assert any(row.action == "fused" for row in fused.report.rows)
    with torch.no_grad():
        assert_same(fused.graph_module(x), model(x), EXACT)


def test_a_weight_that_is_written_through_a_view_is_no_constant() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv1d(3, 3, 1), nn.Buffer(torch.ones(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.view(-1).add_(1.0)
            result: Tensor = self.conv(x) * self.scale
            return result

    model, x = Counted().double().eval(), torch.randn(2, 3, 5, dtype=torch.float64)
    small = Fuse()(trace(copy.deepcopy(model))).graph_module
    with torch.no_grad():
        for _ in range(2):
            assert_same(small(x), model(x), EXACT)


def test_writes_into_other_values_do_not_keep_branches_apart() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv1d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            u, v, w = self.a(x), self.b(x), self.c(x)
            w[:, :1].relu_()
            result: Tensor = torch.relu(u + v) + w
            return result

    model, x = Beside().double(), torch.randn(2, 3, 5, dtype=torch.float64)
    small = fuse(model, x)
    assert sum(row.action == "fused" for row in report(small).rows) == 1
    with torch.no_grad():
        assert_same(small(x), model(x), EXACT)
