"""How ``fuse`` reads code: how often it traces, and what the code does that a graph cannot see."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand.running.outputs import outputs_of
from fxexpand.tracing.graphs import UntraceableError
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


class Net(nn.Module):
    """Layers; subclasses have the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def both(self, x: Tensor) -> Any:
        return self.one(x) + self.two(x)


class IsInstance(Net):
    def forward(self, x: Any) -> Any:
        return self.both(x) if isinstance(x, Tensor) else self.last(self.both(x[0]))


class OfType(Net):
    def forward(self, x: Any) -> Any:
        return self.both(x) if type(x) is Tensor else self.last(self.both(x[0]))


class OfClass(Net):
    def forward(self, x: Any) -> Any:
        return self.last(self.both(x[0])) if x.__class__ in (list, tuple) else self.both(x)


class IsTensor(Net):
    def forward(self, x: Any) -> Any:
        return self.both(x if torch.is_tensor(x) else x[0])


class Matched(Net):
    def forward(self, x: Any) -> Any:
        match x:
            case Tensor():
                return self.both(torch.pow(x, 1.0))
        return self.last(self.both(x[0]))


class Attributes(Net):
    def forward(self, x: Any) -> Any:
        inside = getattr(x, "tensors", None)
        x = x if inside is None else inside
        return self.both(x.decompose() if hasattr(x, "decompose") else x)


class Row(Net):
    """A row of modules, where the class stays, and a list is taken another way."""

    def forward(self, x: Any) -> Any:
        y = self.one(x if isinstance(x, Tensor) else x[0])
        return self.norm(y) if isinstance(x, Tensor) else y


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("kind", [IsInstance, OfType, OfClass, IsTensor, Matched, Attributes, Row])
def test_code_that_asks_for_a_type_gets_that_of_the_value(kind: type[Net], example: Tensor | None) -> None:
    model = made(kind)
    small = fxexpand.fuse(model, example)
    assert_same(small(X), model(X), EXACT)
    if kind is Row:
        assert "argument x" in fxexpand.report(small).rows[0].reason
        assert_same(small([X]), model([X]), EXACT)
        return
    assert len(fxexpand.report(small).changed) == 1
    with pytest.raises(UntraceableError, match=r"argument x: .* for a [Tt]ensor.*, not for a list"):
        small([X])


def test_a_graph_for_a_list_takes_lists() -> None:
    model = made(IsInstance)
    small = fxexpand.fuse(model, ([X],))
    assert len(fxexpand.report(small).changed) == 1
    assert_same(small([X]), model([X]), EXACT)
    with pytest.raises(UntraceableError, match=r"argument x: .* for a list, not for a Tensor"):
        small(X)


class Inside(Net):
    """The type of a value between the layers, and those of sizes."""

    def forward(self, x: Tensor) -> Any:
        y = self.both(x)
        y = self.norm(y) if isinstance(y, Tensor) else x
        whole = isinstance(x.shape[2], int) and isinstance(x.size(0) * 2, int) and isinstance(x.shape, tuple)
        return self.last(y if whole else y.relu())


class Number(Net):
    def forward(self, x: Tensor) -> Any:
        try:
            channels = int(x.shape[1])
        except TypeError:
            channels = 0
        return self.both(x) if channels == 3 else self.last(self.both(x))


class Unknown(Net):
    def forward(self, x: Tensor) -> Any:
        first = self.both(x).chunk(2, 1)
        return first[0] if isinstance(first, tuple) else self.norm(first)


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("kind", [Inside, Number, Unknown])
def test_the_type_of_a_value_is_known_or_the_code_is_not_read(
    kind: type[Net], example: Tensor | None
) -> None:
    model = made(kind)
    small = fxexpand.fuse(model, example)
    assert_same(small(X), model(X), EXACT)
    changed = kind is Inside or (kind is Unknown and example is not None)
    assert bool(fxexpand.report(small).changed) == changed
    if not changed:
        assert "number of a value" in str(fxexpand.report(small)) or "type of a value" in str(
            fxexpand.report(small)
        )


class Irreps(tuple):  # type: ignore[type-arg]
    """Has no one length, as that of e3nn."""

    def __len__(self) -> int:
        raise NotImplementedError


class Fixed(dict):  # type: ignore[type-arg]
    def copy(self) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("kept", [Irreps((1, 2)), Fixed(a=1), [Irreps((1, 2))]])
def test_what_a_module_keeps_need_not_be_copied(kept: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
    vars(model)["kept"] = kept
    for example in (None, X):
        assert_same(fxexpand.fuse(model, example)(X), model(X), EXACT)
        assert_same(fxexpand.expand(model, example_inputs=example)(X), model(X), EXACT)


@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile"])
def test_a_layer_may_have_the_name_of_an_attribute_of_graph_modules(name: str) -> None:
    model = nn.Sequential(OrderedDict([("first", nn.Conv2d(3, 4, 3)), (name, nn.BatchNorm2d(4))])).double()
    model = nn.Sequential(perturb(model.eval()), nn.ReLU())
    for example in (None, X):
        small = fxexpand.fuse(model, example)
        assert_same(small(X), model(X), EXACT)
        assert_same(fxexpand.fuse(model[0], example)(X), model[0](X), EXACT)
        assert f"{name} is also the name" in str(fxexpand.report(fxexpand.fuse(model[0], example)))


class Optional(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = self.both(x)
        return y * 2 + 1 if mask is None else y * mask


class InMapping(Optional):
    def forward(self, batch: Any) -> Any:  # type: ignore[override]
        return super().forward(batch["x"], batch.get("mask"))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Optional()

    def forward(self, x: Tensor, **rest: Any) -> Any:
        return self.inner(x, **rest)


MASK = torch.rand(8, 6, dtype=torch.float64)
OPTIONAL: list[tuple[type[nn.Module], Any, tuple[Any, ...]]] = [
    (Optional, (X, MASK), (X,)),
    (Optional, {"x": X, "mask": MASK}, (X, None)),
    (InMapping, ({"x": X, "mask": MASK},), ({"x": X},)),
    (Around, {"x": X, "mask": MASK}, (X,)),
]


@pytest.mark.parametrize(("kind", "example", "call"), OPTIONAL)
def test_a_graph_for_a_tensor_raises_without_it(kind: type[nn.Module], example: Any, call: Any) -> None:
    model = made(kind)
    small = fxexpand.fuse(model, example)
    assert fxexpand.report(small).changed
    given = example.values() if isinstance(example, dict) else example
    assert_same(
        small(*given) if kind is not Around else small(**example), outputs_of(model, example)[0], EXACT
    )
    with pytest.raises(UntraceableError, match=r"mask.* for a tensor, not for a NoneType"):
        small(*call)


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.both(x) * self.scale


class Cropped(Net):
    def forward(self, x: Tensor) -> Any:
        return self.both(x)[:, :2] * 2


@pytest.mark.parametrize("example", [None, X], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("kind", [Scaled, Cropped])
def test_a_graph_for_batches_raises_for_one_image(kind: type[Net], example: Tensor | None) -> None:
    model = made(kind)
    small = fxexpand.fuse(model, example)
    assert fxexpand.report(small).changed
    assert_same(small(X), model(X), EXACT)
    with pytest.raises(UntraceableError, match=r"argument x: .* of 4 dimensions, not for one of 3"):
        small(X[0])
