"""What holds for one call need not hold for another: other arguments, sizes and values, call by call."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand.tracing.graphs import UntraceableError, symbolic
from fxexpand.tracing.guards import ModeGuard
from tests.compare import assert_same
from tests.networks import perturb

X = torch.randn(2, 3, 8, 6, dtype=torch.float64)
SMALL = X[:, :, :4]
EXACT = 1e-10


class Gain(nn.Module):
    """A factor per channel, or one that the caller adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(4, 1, 1) + 1)

    def forward(self, x: Tensor, more: float = 1.0) -> Tensor:
        return x * self.factor * more


class Told(nn.Module):
    """A factor that the caller sets."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Part(nn.Module):
    """Goes by values, and what it does is given."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x) if x.sum() > -1e9 and x.shape[2] > 4 else None


class Net(nn.Module):
    """Layers; subclasses have the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.gain, self.told = Gain(), Told()
        self.maybe = Part(torch.abs)
        self.calls = 0


class Keyword(Net):
    def forward(self, x: Tensor) -> Any:
        return self.gain(x=self.conv(x))


class Second(Net):
    def forward(self, x: Tensor) -> Any:
        return self.gain(self.conv(x), 2.0)


class KeywordElsewhere(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        return self.gain(x=h) if x.shape[2] < 5 else self.gain(h)


class ConstantBySize(Net):
    def forward(self, x: Tensor) -> Any:
        self.told.factor = 2.0 if x.shape[2] > 4 else 3.0
        return self.conv(self.told(x))


class ReadElsewhere(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.conv(x))
        return h * self.norm.weight.sum() if x.shape[2] < 5 else h


class Caught(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        try:
            h = h * (2 if x.sum() > -1e9 else 5)
        except torch.fx.proxy.TraceError:
            h = h * 3
        return self.norm(h)


class Table(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        return self.norm(h.relu() if {4: True}.get(x.shape[2]) else h)


class SetBySize(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        return self.norm(h.relu() if x.shape[2] in {4, 5} and x.shape[3] > 1 else h)


class SometimesNone(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        return self.norm(h.relu() if self.maybe(x) is None else h)


class Drawing(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        return self.norm(h.relu() if random.random() < 0.5 else h)


class Counting(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        self.calls += 1
        return self.norm(h.relu() if self.calls > 1 else h)


class ByMode(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        if x.shape[2] < 5:
            return self.norm(h if self.training else h.relu())
        return self.norm(h)


CASES = [
    Keyword, Second, KeywordElsewhere, ConstantBySize, ReadElsewhere, Caught, Table, SetBySize,
    SometimesNone, Drawing, Counting, ByMode,
]  # fmt: skip


def made(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    model = kind().double().eval()
    perturb(model)
    return model


def compare(model: nn.Module, example: Tensor | None, *calls: tuple[Any, ...]) -> Any:
    """Fused, and compared call by call."""
    small = fxexpand.fuse(model, example)
    one, two = copy.deepcopy(model), copy.deepcopy(small)
    for arguments in calls:
        random.seed(3)
        expected = one(*arguments)
        random.seed(3)
        assert_same(two(*arguments), expected, EXACT)
    return small


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("kind", CASES)
def test_a_fold_holds_for_every_call(kind: type[Net], example: Tensor | None) -> None:
    compare(made(kind), example, (X,), (SMALL,), (-X,), (X,))


class Flag(Net):
    def forward(self, x: Tensor, flag: bool = False) -> Any:
        h = self.conv(x)
        if flag and x.sum() > -1e9:
            h = h.relu()
        return self.norm(h)


class FlagBySize(Net):
    def forward(self, x: Tensor, flag: bool = False) -> Any:
        h = self.conv(x)
        return self.norm(h.relu() if flag and x.shape[2] < 5 else h)


class Word(Net):
    def forward(self, x: Tensor, how: str = "no") -> Any:
        return self.norm(self.act(self.conv(x), how))

    def act(self, h: Tensor, how: str) -> Tensor:
        return h.relu() if how == "relu" else h


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize(("kind", "value"), [(Flag, True), (FlagBySize, True), (Word, "relu")])
def test_a_fold_holds_for_other_arguments(kind: type[Net], value: Any, example: Tensor | None) -> None:
    small = compare(made(kind), example, (X,), (SMALL,), (X, value), (SMALL, value))
    assert isinstance(small.norm, nn.BatchNorm2d)


def test_other_arguments_that_change_nothing_between_the_layers_end_no_fold() -> None:
    class After(Net):
        def forward(self, x: Tensor, flag: bool = False) -> Any:
            h = self.norm(self.conv(x)).relu()
            return h.sqrt() if flag and x.sum() > 0 else h

    small = compare(made(After), X, (X,), (X, True), (-X, True))
    assert isinstance(small.norm, nn.Identity)


def test_a_part_that_sometimes_returns_nothing_is_seen_in_its_code() -> None:
    """It is not kept whole: what is returned stands for something in all of a trace."""
    assert fxexpand.report(fxexpand.fuse(made(SometimesNone), X)).changed == ()

    class Always(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.abs() if x.sum() > -1e9 else x

    model = made(SometimesNone)
    model.maybe = Always()  # type: ignore[assignment]
    assert len(fxexpand.report(compare(model, X, (X,), (SMALL,))).changed) == 1


@pytest.mark.parametrize(
    ("kind", "reason"), [(Table, "in a set or a dict"), (Drawing, "random"), (Counting, "attribute calls")]
)
def test_what_a_graph_would_freeze_is_an_error(kind: type[Net], reason: str) -> None:
    state, attributes = random.getstate(), dict(vars(model := made(kind)))
    with pytest.raises(UntraceableError, match=reason):
        symbolic(model)
    assert random.getstate() == state and vars(model) == attributes


class Classifier(Net):
    """As those of transformers: a loss for labels, by modules made on the spot, and a note in the config."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(problem=None, inner=SimpleNamespace(labels=4))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        if labels is None:
            return h
        if self.config.problem is None:
            single = labels.dtype == torch.long and self.config.inner.labels > 1
            self.config.problem = "single" if single else "multi"
        if self.config.problem == "single":
            return nn.CrossEntropyLoss()(h.view(-1, self.config.inner.labels), labels)
        return nn.BCEWithLogitsLoss()(h, labels)


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
def test_a_loss_for_labels_ends_no_fold_and_leaves_the_config_alone(example: Tensor | None) -> None:
    labels = torch.tensor([1, 3])
    model = made(Classifier)
    small = compare(model, example, (X,), (X, labels))
    assert isinstance(small.norm, nn.Identity)
    assert model.config.problem is None is small.config.problem  # type: ignore[union-attr]


class Unreadable(Net):
    """Its own code has no graph for another argument; a part that was called before that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor, length: Tensor | None = None) -> Any:
        h = self.body(x).relu()
        if length is None:
            return self.norm(self.tail(h).relu()) + h
        h = h[:, :, : int(length)]
        return self.norm(self.tail[1](self.tail[0](h).relu()))


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
def test_what_follows_code_without_a_graph_is_not_known(example: Tensor | None) -> None:
    small = compare(made(Unreadable), example, (X,), (X, torch.tensor(2)))
    assert isinstance(small.body, nn.Conv2d) and isinstance(small.tail[1], nn.BatchNorm2d)
    row = next(row for row in fxexpand.report(small).refusals if row.site == "tail.0")
    assert "some values of the argument length" in row.reason


class PartUnreadable(Net):
    """A part has no graph for another argument; what is around it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = Cut()

    def forward(self, x: Tensor, length: Tensor | None = None) -> Any:
        return self.norm(self.conv(self.cut(x, length))).relu()


class Cut(nn.Module):
    def forward(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        return x if length is None else x[:, :, : int(length)]


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
def test_what_is_around_a_part_without_a_graph_is_known(example: Tensor | None) -> None:
    small = compare(made(PartUnreadable), example, (X,), (X, torch.tensor(2)))
    assert isinstance(small.norm, nn.Identity)


class Inside(Net):
    """Another argument is handed on, so that what differs is inside of a part; or parts of it are called."""

    def __init__(self, directly: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.directly = directly

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        h = self.conv(x).relu()
        for layer in self.layers:
            assert isinstance(layer, Layer)
            apart = mask is not None and self.directly
            h = layer.norm(layer.conv(h).relu()) if apart else layer(h, mask)
        return h


class Layer(nn.Module):
    """Its last layers are one for every mask, the first are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.first(x)
        if mask is not None:
            h = h * (mask if mask.ndim == h.ndim else mask[:, None])
        h = self.conv(self.first_norm(h).view(*x.shape[:2], *x.shape[2:]).relu())
        out: Tensor = self.norm(h).relu()
        return out


@pytest.mark.parametrize("directly", [False, True])
def test_a_part_that_gets_another_argument_is_read_by_itself(directly: bool) -> None:
    torch.manual_seed(0)
    model: Any = Inside(directly).double().eval()
    perturb(model)
    mask = torch.rand(2, 1, 8, 6, dtype=torch.float64)
    small = compare(model, X, (X,), (X, mask), (X, mask[:, 0]), (SMALL, mask[:, :, :4]))
    for layer in small.layers:
        assert isinstance(layer.first_norm, nn.Identity if directly else nn.BatchNorm2d)
        assert isinstance(layer.norm, nn.BatchNorm2d if directly else nn.Identity)
    sites = [row.site for row in fxexpand.report(small).rows]
    assert len(sites) == len(set(sites))


class RescalesOnce(Net):
    """As RWKV: the first call divides a weight, and a flag says so."""

    def forward(self, x: Tensor) -> Any:
        if not self.calls:
            with torch.no_grad():
                self.conv.weight.div_(2)
            self.calls = 1
        return self.norm(self.conv(x)).relu()


def test_a_weight_that_is_written_to_once_is_written_to_once() -> None:
    model = made(RescalesOnce)
    weight = model.conv.weight.detach().clone()
    expected = copy.deepcopy(model)(X)
    big = fxexpand.expand(model, fxexpand.Chain(depth=2, width=1), example_inputs=X)
    for network in (model, fxexpand.fuse(model, X), big, fxexpand.fuse(big, X)):
        assert_same(network(X), expected, EXACT)
    assert_same(model.conv.weight.detach(), weight / 2, EXACT)


def test_modules_that_a_forward_makes_are_its_code() -> None:
    class Making(nn.Module):
        def __init__(self, function: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Any:
            return self.function(x)

    model = Making(lambda x: nn.Softmax(1)(nn.Sequential(nn.ReLU(), nn.Dropout(0.5))(x)))
    graph_module = symbolic(model)
    assert not any(isinstance(module, ModeGuard) for module in graph_module.modules())
    for training in (True, False):
        torch.manual_seed(0)
        expected = model.train(training)(X)
        torch.manual_seed(0)
        assert_same(graph_module.train(training)(X), expected, 0.0)
    with pytest.raises(UntraceableError, match="parameter is not a member"):
        symbolic(Making(lambda x: nn.Linear(6, 6)(x)))
