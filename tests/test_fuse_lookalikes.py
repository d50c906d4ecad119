"""What looks like an affine operator and is another one, by an argument, a dtype, a shape or a flag."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxexpand
from fxexpand.passes import Fuse
from fxexpand.tracing.graphs import trace
from tests.compare import assert_same
from tests.networks import perturb

EXACT = 1e-10
close = partial(torch.testing.assert_close, rtol=EXACT, atol=EXACT, equal_nan=True)


class Net(nn.Module):
    """Layers and constants for a forward that a test gives."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.one, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 1, 1), nn.BatchNorm2d(4)
        self.last, self.linear = nn.Conv2d(4, 2, 1), nn.Linear(4, 4)
        self.scale, self.matrix = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(4, 4))
        self.rows, self.vector = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4))
        self.single = nn.Parameter(torch.randn(1))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("counts", torch.tensor([2, 3, 4, 5]).view(4, 1, 1))
        self.computes = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.computes(self, x)

    def features(self, x: Tensor) -> Tensor:
        """One vector for each image."""
        result: Tensor = self.linear(self.conv(x).mean((2, 3)))
        return result


def written(net: Any, x: Tensor) -> Tensor:
    y = torch.relu(net.conv(x))
    torch.mul(y, 3.0, out=y)
    result: Tensor = net.last(net.norm(net.conv(x)) + y)
    return result


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "beta": lambda net, x: torch.addmm(net.vector, net.features(x), net.matrix, beta=0.5),
    "beta of a method": lambda net, x: net.vector.addmm(net.features(x), net.matrix, beta=0.5),
    "a bias for each row": lambda net, x: torch.addmm(net.rows, net.features(x), net.matrix),
    "one bias for all": lambda net, x: net.linear(F.linear(net.features(x), net.matrix, net.single)),
    "a weight of one dimension": lambda net, x: F.linear(net.features(x), net.vector),
    "rounding": lambda net, x: net.last(torch.div(net.conv(x), net.scale, rounding_mode="floor")),
    "a list of truths": lambda net, x: net.conv(x)[:, [True, False, True, True]],
    "out": written,
    "not finite": lambda net, x: net.last(net.conv(x)).mean((2, 3)) + net.mask,
    "an infinite number": lambda net, x: torch.nan_to_num(net.last(net.conv(x) * float("inf"))),
    "one by zero": lambda net, x: torch.nan_to_num(net.last(net.conv(x) / 0)),
    "channels out of one": lambda net, x: net.last(net.one(x) * net.scale),
    "dimensions out of two": lambda net, x: net.linear(net.features(x) + net.scale[:1]),
    "integers": lambda net, x: net.last(net.conv(x) / net.counts),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", FORWARDS)
def test_a_lookalike_is_not_taken_for_the_operator(name: str, given: bool) -> None:
    model = perturb(Net(FORWARDS[name]).double()).eval().requires_grad_(False)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for verify in (True, False):
        fused = fxexpand.fuse(model, x if given else None, verify=verify)
        close(fused(x), model(x))
        graph = Fuse(verify=verify)(trace(model, example_inputs=x if given else None)).graph_module
        close(graph(x), model(x))


class DropPath(nn.Module):
    """As first published (Huang et al. 2016): in evaluation mode by its expectation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.8 if not self.training else x * (torch.rand(len(x), 1, 1, 1) < 0.8)


class Named(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return input if self.training else 2 * input


@pytest.mark.parametrize("kind", [DropPath, Named])
def test_what_has_the_name_of_an_identity_may_compute_something(kind: type[nn.Module]) -> None:
    model = perturb(nn.Sequential(nn.Conv2d(3, 4, 3), kind(), nn.BatchNorm2d(4)).double()).eval()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for verify in (True, False):
        assert_same(fxexpand.fuse(model, verify=verify)(x), model(x), EXACT)


class Normalised(nn.Module):
    """Images of bytes, or grey ones, made what a network takes."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.rand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x / 255 - self.mean)
        return result


@pytest.mark.parametrize(
    "image", [torch.randint(0, 255, (2, 3, 6, 6), dtype=torch.uint8), torch.rand(2, 1, 6, 6)]
)
def test_an_input_that_the_layer_would_not_take_stays_apart(image: Tensor) -> None:
    model = Normalised()
    assert_same(fxexpand.fuse(model, image)(image), model(image), rel=1e-6)
    refusals = [row.reason for row in fxexpand.report(fxexpand.fuse(model, image)).refusals]
    assert any(words in reason for reason in refusals for words in ("it turns uint8", "channels of one"))
    colours = torch.rand(2, 3, 6, 6)
    assert len(fxexpand.report(fxexpand.fuse(model, colours)).changed) == 1


class Mixed(nn.Module):
    """A scale of higher precision than the layer before it: what it returns has that precision."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.gamma, self.head = nn.Linear(6, 6).bfloat16(), torch.rand(6), nn.Linear(6, 3)
        self.scale = nn.Parameter(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.low(x) * self.scale)
        return result


@pytest.mark.parametrize("given", [False, True])
def test_precision_is_what_it_was(given: bool) -> None:
    model, x = Mixed(), torch.randn(4, 6).bfloat16()
    example = x if given else None
    for changed in (fxexpand.fuse(model, example), fxexpand.expand(model, example_inputs=example)):
        assert_same(changed(x), model(x), rel=2e-2)


class Quantised(nn.Module):
    """A weight of bytes: no layer of bytes computes it."""

    bytes: Tensor
    low: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(6, 6), how
        self.register_buffer("bytes", torch.randint(-127, 127, (6, 6), dtype=torch.int8))
        self.register_buffer("low", torch.randn(6, 6).half())

    def forward(self, x: Tensor) -> Tensor:
        weights = {
            "number": self.bytes * 0.01,
            "cast": self.low.float(),
            "sum": self.low.float() + self.low,
        }
        return F.linear(torch.relu(self.linear(x)), weights[self.how])


@pytest.mark.parametrize("how", ["number", "cast", "sum"])
def test_a_weight_that_is_cast_on_the_way(how: str) -> None:
    model, x = Quantised(how), torch.randn(4, 6)
    for example in (None, x):
        assert_same(fxexpand.fuse(model, example)(x), model(x), rel=1e-5)


class Switched(nn.Module):
    """Two flags that matter only together, and a mode by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, raw: bool = False, early: bool = False, mode: str = "full") -> Tensor:
        x = self.conv(x)
        if (raw and early) or mode == "features":
            return x
        return F.relu(self.norm(x))


class OneMode(Switched):
    def forward(self, x: Tensor, raw: bool = False, early: bool = False, mode: str = "full") -> Tensor:
        x = self.conv(x)
        return x if mode == "features" else F.relu(self.norm(x))


class TwoFlags(Switched):
    def forward(self, x: Tensor, raw: bool = False, early: bool = False, mode: str = "full") -> Tensor:
        x = self.conv(x)
        return x if raw and early else F.relu(self.norm(x))


def test_more_arguments_than_named() -> None:
    class Rest(Switched):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return F.relu(self.norm(sum(rest, self.conv(x))))

    model, x = perturb(Rest().double()).eval(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    fused = fxexpand.fuse(model, x)
    assert_same(fused(x, 2 * x.mean()), model(x, 2 * x.mean()), EXACT)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(TwoFlags, {"raw": True, "early": True}), (OneMode, {"mode": "features"}), (Switched, {})],
)
def test_flags_count_together_and_names_count_too(kind: type[nn.Module], arguments: dict[str, Any]) -> None:
    model, x = perturb(kind().double()).eval(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for example in (None, x):
        fused = fxexpand.fuse(model, example)
        assert_same(fused(x), model(x), EXACT)
        assert_same(fused(x, **arguments), model(x, **arguments), EXACT)
        assert not fxexpand.report(fused).changed


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shift_in_place_before_a_layer(inplace: bool) -> None:
    """What the check feeds to the network before must not be written into before it gets to the one after."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat((x, x), 1)
            result: Tensor = self.layer(y.add_(3.0) if inplace else y + 3.0)
            return result

    model, x = Shifted().double().eval(), torch.randn(5, 2, dtype=torch.float64)
    fused = fxexpand.fuse(model, (x,))
    assert_same(fused(x), model(x), rel=1e-12)
    assert len(fxexpand.report(fused).changed) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_around_scripted_parts_is_fused(frozen: bool) -> None:
    part: Any = torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).double().eval())
    part = torch.jit.freeze(part) if frozen else part
    norm: Any = nn.BatchNorm1d(5)
    nn.init.normal_(norm.running_mean)
    model = nn.Sequential(nn.Linear(6, 5), norm, part, nn.ReLU()).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    small = fxexpand.fuse(model, x)
    assert_same(small(x).detach(), model(x).detach(), rel=1e-10)
    assert [row.site for row in fxexpand.report(small).changed] == ["0"]
    assert not any(module.training for module in small.modules() if hasattr(module, "training"))
    model.train()  # a frozen part has no mode any more
    assert all(module.training for module in fxexpand.expand(model).modules() if hasattr(module, "training"))


RANKS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, c: x + c,
    "radd": lambda x, c: c + x,
    "sub": lambda x, c: torch.sub(x, c, alpha=2),
    "rsub": lambda x, c: c - x,
    "mul": lambda x, c: torch.mul(c, x),
    "div": lambda x, c: x / c,
    "method": lambda x, c: x.subtract(c),
}


@pytest.mark.parametrize("shape", [(1, 1, 1, 6), (1, 1, 6), (1, 6), (1, 1), (1,), (6,)])
@pytest.mark.parametrize("name", RANKS)
def test_a_constant_of_more_dimensions_than_a_value(name: str, shape: tuple[int, ...]) -> None:
    """A constant may add dimensions to a value, of which nobody knows how many it has."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant, self.linear = nn.Parameter(1 + torch.rand(shape)), nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.linear(RANKS[name](torch.relu(x), self.constant))
            return result

    model = Shifted().double()
    for size in ((6,), (2, 6), (2, 3, 5, 6)):
        x = torch.randn(size, dtype=torch.float64)
        small = fxexpand.fuse(model)
        assert_same(small(x), model(x), EXACT)
        assert bool(fxexpand.report(small).changed) == (len(shape) == 1)
        assert_same(fxexpand.fuse(model, x)(x), model(x), EXACT)


def test_a_constant_of_the_dimensions_of_an_image_before_a_convolution() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.conv = nn.Buffer(torch.rand(1, 3, 1, 1)), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.conv((x - self.mean) / 2.0)
            return result

    model, x = Normalised().double(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    small = fxexpand.fuse(model)
    assert_same(small(x), model(x), EXACT)
    assert fxexpand.report(small).changed


ZEROS: dict[str, Callable[[Any, Any], Any]] = {
    "number": lambda m, x: m.layer(x) + 0,
    "from the left": lambda m, x: 0 + m.layer(x),
    "difference": lambda m, x: m.layer(x) - 0.0,
    "negated": lambda m, x: 0 - m.layer(x),
    "no part of a constant": lambda m, x: torch.add(m.layer(x), m.ones, alpha=0),
    "buffer": lambda m, x: m.layer(x) + m.zeros,
    "before": lambda m, x: m.layer(x + 0.0),
    "cancelling": lambda m, x: m.layer(x) + 1.5 - 1.5,
    "statistics": lambda m, x: m.norm(m.layer(x)),
}


@pytest.mark.parametrize("name", ZEROS)
def test_a_sum_with_zero_makes_no_bias(name: str) -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=False)
            self.zeros, self.ones = nn.Buffer(torch.zeros(4)), nn.Buffer(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = ZEROS[name](self, x)
            return result

    model, x = Plus().double().eval(), torch.randn(2, 5, dtype=torch.float64)
    small = fxexpand.fuse(model, x)
    assert_same(small(x), model(x), EXACT)
    assert fxexpand.report(small).changed
    assert [name for name, _ in small.named_parameters()] == ["layer.weight"]


def test_a_trained_bias_stays_where_it_is_zero() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1, bias=False), nn.BatchNorm1d(4)).eval()
    assert [name for name, _ in fxexpand.fuse(model).named_parameters()] == ["0.weight", "0.bias"]
