"""The copies that ``expand`` and ``fuse`` change: what they share with the model, and what they never do."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand.errors import FxExpandError
from fxexpand.running.copying import copied
from tests.compare import assert_same

EXACT = 1e-10


class Holds(nn.Module):
    """A network with one more attribute."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.held = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), held

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)).relu()
        return y


class Service:
    """An object with a lock and with something to copy."""

    def __init__(self) -> None:
        self.lock, self.names = threading.RLock(), ["a"]


HELD: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "condition": threading.Condition,
    "queue": queue.Queue,
    "generator": torch.Generator,
    "iterator": lambda: (each for each in (1, 2)),
    "stream": lambda: sys.__stderr__,
    "local": threading.local,
    "in containers": lambda: [{"lock": (threading.Lock(),)}],
    "service": Service,
}


@pytest.mark.parametrize("name", HELD)
def test_objects_without_a_copy_are_shared(name: str) -> None:
    model, x = Holds(HELD[name]()).double().eval(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    outer = nn.Sequential(model, nn.Flatten())
    for small in (fxexpand.fuse(outer, x), fxexpand.expand(outer, example_inputs=x)):
        assert_same(small(x), outer(x), EXACT)
        own = {parameter.data_ptr() for parameter in outer.parameters()}
        assert not own & {parameter.data_ptr() for parameter in small.parameters()}


def test_the_rest_of_an_object_with_a_lock_is_copied() -> None:
    model = Holds(Service())
    held = copied(model).held
    assert held is not model.held and held.lock is model.held.lock
    assert held.names == ["a"] and held.names is not model.held.names


def test_a_module_that_refuses_to_be_copied_is_told_of_inplace() -> None:
    class Single(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Single:
            raise RuntimeError("there is one only")

    model = nn.Sequential(Single(3, 4), nn.Linear(4, 2))
    with pytest.raises(
        FxExpandError, match=r"^Sequential: cannot be copied: there is one only\. .*inplace=True"
    ):
        fxexpand.expand(model)
    fxexpand.expand(model, inplace=True)


def _closure(net: Any) -> None:
    net.head = lambda h: net.last(h)


def _default(net: Any) -> None:
    net.head = lambda h, layer=net.last: layer(h)


def _keyword(net: Any) -> None:
    def head(h: Tensor, *, layers: tuple[nn.Module, ...] = (net.last,)) -> Any:
        return layers[0](h)

    net.head = head


def _partial(net: Any) -> None:
    net.head = partial(lambda h, layer: layer(h), layer=net.last)
    net.other = partial(lambda h: net.last(h))


def _nested(net: Any) -> None:
    def inner(h: Tensor) -> Any:
        return net.last(h)

    net.heads = {"one": [lambda h: inner(h)]}
    net.head = lambda h: net.heads["one"][0](h)


def _method(net: Any) -> None:
    call: Any = net.last.forward
    net.head = lambda h: call(h)


def _recursive(net: Any) -> None:
    def head(h: Tensor, again: bool = True) -> Any:
        return head(h, False) if again else net.last(h)

    net.head = head


def _in_a_list(net: Any) -> None:
    layers = [net.first, net.last]
    net.head = lambda h: layers[-1](h)


def _hook(net: Any) -> None:
    net.head = nn.Identity()
    net.head.register_forward_hook(lambda module, args, output: net.last(output))


CLOSURES = [_closure, _default, _keyword, _partial, _nested, _method, _recursive, _in_a_list, _hook]


class Net(nn.Module):
    """Its second layer is called by a function."""

    def __init__(self, hold: Callable[[Any], None]) -> None:
        super().__init__()
        self.head: Any = None
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        hold(self)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.first(x).relu())


@pytest.mark.parametrize("hold", CLOSURES)
@pytest.mark.parametrize("given", [True, False])
def test_functions_of_a_copy_call_the_copy(hold: Callable[[Any], None], given: bool) -> None:
    model, x = Net(hold).double(), torch.randn(5, 6, dtype=torch.float64)
    big = fxexpand.expand(model, example_inputs=x if given else None)
    assert_same(big(x), model(x), EXACT)
    big(x).square().mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in big.parameters())
    assert_same(fxexpand.fuse(big, scope="expanded")(x), big(x), EXACT)


def test_a_function_that_holds_nothing_of_the_model_stays_the_same() -> None:
    seen: list[Tensor] = []
    model = Net(_closure)
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    hook = next(iter(model._forward_hooks.values()))
    new = copied(model)
    assert next(iter(new._forward_hooks.values())) is hook
    new(torch.randn(2, 6))
    assert len(seen) == 1
