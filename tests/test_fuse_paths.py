"""Fusing where code goes by sizes, or holds parts whose code has no graph: in place, for all paths."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

import fxexpand
from fxexpand.errors import RefusedError
from fxexpand.tracing import graphs as tracing
from fxexpand.tracing import recording
from fxexpand.tracing import submodules as calls
from fxexpand.tracing.recording import Failed
from tests.compare import assert_same
from tests.networks import perturb

X = torch.randn(2, 3, 8, 6, dtype=torch.float64)
WIDE = torch.randn(3, 3, 9, 12, dtype=torch.float64)
EXACT = 1e-10
Forward = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Layers, and a forward that is given."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last, self.last_norm = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
        self.odd = Odd()
        self.kept: list[Tensor] = []
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Odd(nn.Module):
    """Goes by values: no graph has all of its paths, and torch.export has none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.sum() > 0 else -x
        y: Tensor = self.norm(self.conv(x))
        return y


def made(function: Forward) -> Net:
    torch.manual_seed(0)
    model = Net(function).double().eval()
    perturb(model)
    return model


def fused(model: Any, *others: Tensor) -> Any:
    """Fused with X, compared at the other sizes as well; classes stay."""
    before = copy.deepcopy(model)
    small: Any = fxexpand.fuse(model, X)
    for x in (X, *others):
        assert_same(small(x), before(x), EXACT)
    assert type(small) is type(model)
    return small


def actions(model: nn.Module) -> dict[str, str]:
    return {row.site: row.action for row in fxexpand.report(model).rows}


def test_layers_beside_a_part_without_a_graph_are_folded() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Odd(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), Odd5()
    )
    perturb(model.double().eval())
    small = fused(model, WIDE)
    assert isinstance(small[1], nn.Identity) and isinstance(small[5], nn.Identity)
    assert isinstance(small[3].norm, nn.BatchNorm2d)
    assert actions(small) == {"0": "fused", "4": "fused", "3.conv": "refused", "3.norm": "refused"}
    assert "the whole has none: symbolically traced variables" in fxexpand.report(small).traced
    uninformed = fxexpand.fuse(model)
    assert set(actions(uninformed).values()) == {"refused"}
    assert "example_inputs may help" in fxexpand.report(uninformed).refusals[0].reason


class Odd5(nn.Module):
    """Without layers of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_the_largest_parts_inside_a_part_without_a_graph_are_folded() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x if x.sum() > 0 else -x)
            return y

    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Outer())
    perturb(model.double().eval())
    small = fused(model, WIDE)
    assert actions(small) == {"0": "fused", "2.body.0": "fused"}


FOLDED: dict[str, Forward] = {
    "a branch": lambda net, x: net.norm(net.conv(x.relu() if x.shape[2] > 8 else x)),
    "a branch behind": lambda net, x: (
        net.norm(net.conv(x)).relu() if x.size(3) % 12 else net.norm(net.conv(x))
    ),
    "no branch of its own": lambda net, x: net.norm(net.conv(x)).relu() * max(x.shape[0], 3),
    "a length": lambda net, x: net.norm(net.conv(x)).reshape(*x.shape[:2], -1, 1),
    "a number of dimensions": lambda net, x: net.norm(net.conv(x if x.ndim == 4 else x[None])),
    "the length of a shape": lambda net, x: net.norm(net.conv(x if len(x.shape) == 4 else x[None])),
    "a list": lambda net, x: net.norm(net.conv(x)).view([*x.shape[:1], -1]),
    "a dtype": lambda net, x: net.norm(net.conv(x.relu() if x.dtype == torch.float16 else x)),
}


@pytest.mark.parametrize("case", FOLDED)
def test_control_flow_on_sizes(case: str) -> None:
    small = fused(made(FOLDED[case]), WIDE)
    assert isinstance(small.norm, nn.Identity) and actions(small)["conv"] == "fused"


def between(net: Net, x: Tensor) -> Tensor:
    h = net.conv(x)
    if x.shape[2] > 8:
        h = h.relu()
    out: Tensor = net.last_norm(net.last(net.norm(h).relu()))
    return out


def test_what_holds_on_one_path_only_is_left() -> None:
    small = fused(made(between), WIDE)
    assert isinstance(small.norm, nn.BatchNorm2d) and isinstance(small.last_norm, nn.Identity)
    row = next(row for row in fxexpand.report(small).refusals if row.site == "conv")
    assert "goes by sizes" in row.reason


class Wrong(Exception):
    """The model's own."""


def twice(net: Net, x: Tensor) -> Any:
    h = net.norm(net.conv(x))
    if x.shape[2] > 8:
        h = h + net.conv(x)
    return h


def nested(net: Net, x: Tensor) -> Any:
    h = net.conv(x)
    if x.shape[2] > 8 and x.shape[3] > 9:
        h = h.relu()
    return net.norm(h)


def by_value(net: Net, x: Tensor) -> Any:
    h = net.conv(x)
    if x.shape[2] > 8:
        h = h if h.sum() > 0 else -h
    return net.norm(h)


def asserting(net: Net, x: Tensor) -> Any:
    h = net.conv(x)
    if x.shape[2] > 8:
        assert x.shape[2] // 4 > 2 or x.shape[2] % 8  # which the example inputs would not meet here
        h = h.relu()
    return net.norm(h)


def raising(net: Net, x: Tensor) -> Any:
    h = net.conv(x)
    if x.shape[2] > 8:
        if x.shape[2] % 8 == 0:
            raise Wrong
        h = h.relu()
    return net.norm(h)


def endless(net: Net, x: Tensor) -> Any:
    h = net.conv(x)
    while h.shape[2] > 8:
        h = h[:, :, 1:].relu()
    return net.norm(h)


def in_a_tuple(net: Net, x: Tensor) -> Any:
    h = net.odd(net.conv(x)), 1
    return net.norm(h[0] if isinstance(h, tuple) else h).relu() + net.norm(net.conv(x))


@pytest.mark.parametrize("function", [twice, nested, by_value, asserting, raising, endless, in_a_tuple])
def test_every_path_counts(function: Forward) -> None:
    small = fused(made(function), WIDE, X.abs() + 3, -X.abs() - 3)
    assert isinstance(small.norm, nn.BatchNorm2d)


def checked(net: Net, x: Tensor) -> Any:
    assert x.shape[1] == 3, "three channels"
    if x.ndim != 4:
        raise Wrong("no image")
    h = net.norm(net.conv(x))
    if h.shape[1] != 4 or h.shape[0] > 100:
        raise ValueError("many")
    torch._assert(x.shape[2] > 1, "tall")
    return h


def test_a_model_that_checks_its_inputs_goes_on_doing_so() -> None:
    small = fused(made(checked), WIDE)
    assert isinstance(small.norm, nn.Identity)
    for wrong, error in ((X[:, :2], AssertionError), (X[0], AssertionError), (X[None], Wrong)):
        with pytest.raises(error):
            small(wrong if error is AssertionError else wrong.transpose(1, 2)[:, :3])
    with pytest.raises(ValueError, match="many"):
        small(X[:1].expand(101, -1, -1, -1))


def many(net: Net, x: Tensor) -> Any:
    for i in range(17):
        if x.shape[2] == i:
            x = x.relu()
    return net.norm(net.conv(x))


def test_paths_are_looked_at_up_to_a_number() -> None:
    small = fused(made(many), WIDE)
    assert isinstance(small.norm, nn.BatchNorm2d)
    with pytest.raises(RefusedError, match="control flow"):
        fxexpand.fuse(made(many), X, strict=True)


def test_a_layer_that_odd_code_holds_too_is_left() -> None:
    model = made(lambda net, x: net.odd(net.norm(net.conv(x))))
    model.odd.inner = model.norm
    small = fused(model, WIDE)
    assert isinstance(small.norm, nn.BatchNorm2d)


def test_a_sum_in_such_code_is_no_graph() -> None:
    """The module would lose its other paths, which its class has."""
    model = made(lambda net, x: net.conv(x) + x[:, :1] if x.shape[2] > 8 else net.conv(x) * 2 + net.conv(x))
    small = fused(model, WIDE)
    assert "conv.weight" in small.state_dict()


def test_nothing_is_left_of_the_values_without_contents() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        net.kept.append(x)
        h = net.norm(net.conv(x))
        return h.reshape(*h.shape[:2], -1)

    model = made(forward)
    model.odd.register_forward_pre_hook(lambda module, args: pytest.fail("a hook ran"))
    small = fxexpand.fuse(model, X)
    assert isinstance(small.norm, nn.Identity)
    assert not any(each.is_meta for each in (*model.kept, *small.kept))
    assert nn.Module.__call__ is type(model).__call__


class Layer(nn.Module):
    """As a layer of DINOv2: attention whose code goes by sizes, and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        q, k, v = self.qkv(x).view(*shape, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        causal = q.shape[2] > 1 and not self.training
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        h = self.out(h.transpose(1, 2).reshape(*shape, -1).contiguous())
        out: Tensor = x + self.scale(h)
        return out


class Scale(nn.Module):
    """A factor per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_layer_scales_behind_attention() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(Layer() for _ in range(3))).double().eval()
    x, longer = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(1, 9, 6, dtype=torch.float64)
    small: Any = fxexpand.fuse(model, x)
    for each in (x, longer, x[:, :1]):
        assert_same(small(each), model(each), EXACT)
    assert all(type(layer) is Layer and isinstance(layer.scale, nn.Identity) for layer in small)
    again = fxexpand.fuse(small, x)
    assert not fxexpand.report(again).changed


def test_the_cost_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for depth in (4, 8):
        calls = 0
        original = recording.record

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*args, **kwargs)  # noqa: B023

        with monkeypatch.context() as patch:
            for module in ("graphs", "paths"):
                patch.setattr(f"fxexpand.tracing.{module}.record", counted)
            model = nn.ModuleDict({str(i): Layer() for i in range(depth)}).double().eval()
            model.forward = lambda x, layers=model: [x := layer(x) for layer in layers.values()][-1]
            fxexpand.fuse(model, torch.randn(2, 5, 6, dtype=torch.float64))
        counts.append(calls)
    assert counts[1] <= 2 * counts[0], counts


class Flagged(nn.Module):
    """Its graph checks a flag, and goes by sizes three times; it returns a mapping."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.conv, self.norm, self.kind = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), kind

    def forward(self, x: Tensor, twice: bool = False) -> Any:
        for size in x.shape[1:]:
            x = x if size > 6 else x.relu()
        y = self.norm(self.conv(x))
        return self.kind(y=y.relu() if twice else y)


@pytest.mark.parametrize(("kind", "more"), [(dict, 0), (OrderedDict, 8)])
def test_no_fuse_makes_the_next_trace_slower(kind: type, more: int) -> None:
    """fx keeps the functions that generated code asks it to wrap, and goes over all of them in each trace.

    Those of graphs that may be pickled are few; there are many that are only read.
    """
    torch.manual_seed(0)
    model = Flagged(kind).double().eval()
    perturb(model)
    fxexpand.fuse(model, X)
    kept = len(_symbolic_trace._wrapped_fns_to_patch)
    small = fxexpand.fuse(model, X)
    assert len(_symbolic_trace._wrapped_fns_to_patch) <= kept + more
    assert fxexpand.report(small).changed
    assert_same(small(WIDE)["y"], model(WIDE)["y"], EXACT)


def test_what_has_no_graph_is_traced_again_only_where_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(made(lambda net, x: net.odd(net.conv(x))), nn.Conv2d(4, 4, 1).double())
    traced: list[nn.Module] = []

    def counted(module: nn.Module, options: Any) -> Any:
        traced.append(module)
        return tracing.attempt_symbolic(module, options)

    monkeypatch.setattr(calls, "attempt_symbolic", counted)
    parts = calls.Parts(model, X)
    for one_path in (False, False, True):
        parts = parts.after(model, one_path)
        reading = parts.traced(model[0])
        assert one_path or (isinstance(reading, Failed) and "control flow" in reading.reason)
    assert traced == [model[0]]
    assert isinstance(reading, calls.Reading) and reading.failure is not None and reading.leaf is not None
    assert reading.leaf("odd", model[0].get_submodule("odd"))
    model[0].odd = nn.ReLU()
    reading = parts.after(model, False).traced(model[0])
    assert isinstance(reading, calls.Reading) and reading.failure is None


def test_what_is_at_work_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = made(lambda net, x: net.last(net.odd(net.norm(net.conv(x)))))
    fxexpand.fuse(model, X, progress=True)
    found = capsys.readouterr()
    assert found.out == "" and "fuse" in found.err and "odd" in found.err
    fxexpand.fuse(model, X, progress=False)
    assert capsys.readouterr() == ("", "")
