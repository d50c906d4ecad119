"""The operator table: its rows against torch, in every spelling."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import fxexpand
from fxexpand.kernel.algebra import Kernel
from fxexpand.passes.affine.maps import Map
from fxexpand.passes.affine.shapes import GraphValues
from fxexpand.passes.operators import SYNONYMS, Call, bind, row
from fxexpand.passes.operators.arithmetic import same
from fxexpand.passes.operators.layout import reorders
from fxexpand.passes.operators.table import HOMES, call_of_module
from fxexpand.passes.uses import Use, parameter_uses
from tests.compare import assert_same
from tests.networks import perturb

EXACT = 1e-10

# A call on an image (B, C, H, W) for each operator that has a shape; those that exchange dimensions or
# reshape fold.
SHAPES: dict[str, Callable[[Any], Any]] = {
    "add": lambda x: x + 1.0,
    "rsub": lambda x: torch.rsub(x, 2.0),
    "broadcast": lambda x: x * x.mean((2, 3), keepdim=True),
    "div": lambda x: x / 3,
    "neg": lambda x: -x,
    "relu": lambda x: F.relu(x),
    "roll": lambda x: x.roll(1, 2),
    "float": lambda x: x.double(),
    "clone": lambda x: x.clone(),
    "dropout": lambda x: F.dropout(x, training=False),
    "mean": lambda x: x.mean((2, 3)),
    "mean, kept": lambda x: x.mean(dim=-1, keepdim=True),
    "sum": lambda x: x.sum(1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "matmul": lambda x: torch.matmul(x, x.transpose(-1, -2)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "conv": lambda x: F.conv2d(x, x.new_ones(5, 4, 3, 3), stride=2),
    "conv, same size": lambda x: F.conv2d(x, x.new_ones(5, 4, 3, 3), padding=1),
    "conv_transpose": lambda x: F.conv_transpose2d(x, x.new_ones(4, 5, 3, 3)),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, (1, 2)),
    "pad": lambda x: F.pad(x, (1, 2)),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x], 1),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split": lambda x: torch.split(x, [1, 3], 1)[0],
    "unbind": lambda x: x.unbind(1)[2],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 2])),
    "getitem": lambda x: x[:, 1:3],
    "getitem, ellipsis": lambda x: x[..., :2],
    "getitem of one": lambda x: x[0],
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute of a tuple": lambda x: torch.permute(x, (0, 3, 1, 2)),
    "transpose": lambda x: x.transpose(1, -1),
    "swapaxes": lambda x: torch.swapaxes(x, 1, 3),
    "swapdims": lambda x: x.swapdims(0, 1),
    "movedim": lambda x: x.movedim(1, -1),
    "movedim of several": lambda x: x.movedim((1, 0), (0, 2)),
    "moveaxis": lambda x: torch.moveaxis(x, 1, 3),
    "mT": lambda x: x.mT,
    "adjoint": lambda x: x.adjoint(),
    "t": lambda x: x[0][0].t(),
    "T": lambda x: x[0][0].T,
    "reshape": lambda x: x.reshape(x.shape[0], -1, 2),
    "view": lambda x: x.view(x.size(0), x.size(1), x.shape[2] * x.shape[3]),
    "view_as": lambda x: x.flatten(2).view_as(x),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "item size": lambda x: x.flatten(2).reshape(x.shape[0], x.shape[1] // 2, -1),
}


class Called(nn.Module):
    """A function behind a convolution."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


def inferred_and_actual(
    model: nn.Module, x: Tensor
) -> Iterator[tuple[fx.Node, tuple[int, ...], tuple[int, ...]]]:
    """(node, the shape that the rows give, the shape in a run) of every tensor whose shape is inferred."""
    graph_module = fx.symbolic_trace(model.double())
    ShapeProp(graph_module).propagate(x.double())
    metas = {node: node.meta.pop("tensor_meta", None) for node in graph_module.graph.nodes}
    values = GraphValues(graph_module)
    shapes = {node.name: meta.shape for node, meta in metas.items() if hasattr(meta, "shape")}
    known = {(name, i): size for name, shape in shapes.items() for i, size in enumerate(shape)}
    for node in graph_module.graph.nodes:
        shape = values.shape(node)
        if shape is not None and node.name in shapes:
            # The parts of a split have sizes that only a run knows.
            sizes = [size.at(known) for size in shape]
            pairs = itertools.zip_longest(sizes, shapes[node.name])
            yield node, tuple(b if a is None else a for a, b in pairs), tuple(shapes[node.name])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [(2, 3, 6, 5), (1, 3, 4, 8)])
def test_the_shape_rule_is_the_shape_of_a_run(name: str, size: tuple[int, ...]) -> None:
    function = SHAPES[name]
    if name == "reshape" and size[-1] % 2:
        size = (*size[:-1], 4)
    rows = list(inferred_and_actual(Called(function), torch.randn(size)))
    for node, inferred, actual in rows:
        assert inferred == actual, node
    assert any(node.op != "call_module" for node, _, _ in rows), "no row was asked"


def test_a_wrong_shape_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    call = bind(torch.flatten, (torch.zeros(2), 1), {})
    assert call is not None
    object.__setattr__(call.operator, "shape", same)
    try:
        rows = list(inferred_and_actual(Called(lambda x: x.flatten(1)), torch.randn(2, 3, 6, 5)))
        assert any(inferred != actual for _, inferred, actual in rows)
    finally:
        from fxexpand.passes.operators.layout import _flattened

        object.__setattr__(call.operator, "shape", _flattened)


MODULES: list[nn.Module] = [
    nn.Conv2d(3, 4, 3, stride=2),
    nn.Conv2d(3, 6, 3, padding=1, groups=3),
    nn.Conv2d(3, 4, (1, 3), padding="same"),
    nn.ConvTranspose2d(3, 6, 2, stride=2, groups=3),
    nn.Linear(5, 4),
    nn.BatchNorm2d(3),
    nn.GroupNorm(3, 3),
    nn.LayerNorm(5),
    nn.ReLU(),
    nn.Hardswish(),
    nn.GLU(2),
    nn.Dropout(),
    nn.Identity(),
    nn.AvgPool2d(2),
    nn.MaxPool2d(2),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((None, 2)),
    nn.ZeroPad2d(1),
    nn.ConstantPad2d(2, 1.0),
    nn.Flatten(),
    nn.Flatten(0, 1),
    nn.Softmax(1),
    nn.InstanceNorm2d(3),
    nn.Unflatten(1, (1, 3)),
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_the_shape_of_its_function(module: nn.Module) -> None:
    first = nn.Conv2d(3, 3, 1)
    sizes = [(2, 3, 6, 5)] if isinstance(module, nn.Linear | nn.LayerNorm) else [(2, 3, 6, 5), (3, 3, 8, 7)]
    for size in sizes if not isinstance(module, nn.GLU) else [(2, 3, 6, 5)]:
        for node, inferred, actual in inferred_and_actual(nn.Sequential(first, module), torch.randn(size)):
            assert inferred == actual, node


def test_a_subclass_with_a_forward_of_its_own_is_no_call_of_the_function() -> None:
    class Twice(nn.Flatten):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(super().forward(input).unsqueeze(-1))

    class Renamed(nn.Flatten):
        pass

    assert call_of_module(Twice(), None) is None
    call = call_of_module(Renamed(), None)
    assert call is not None and call.name == "flatten"


@pytest.mark.parametrize("spelling", sorted(SYNONYMS))
def test_every_spelling_exists_in_torch(spelling: str) -> None:
    name = spelling.removeprefix("aten.")
    if "." in name:  # of another library
        return
    homes = [*HOMES, Tensor, torch.ops.aten, torch.nn.modules, operator]
    made_up = {
        "activation",
        "identity",
        "sym_size",
        "feature_dropout",
        "grouped_mm",
        "constant_pad_nd",
        "len",
    }
    assert name in made_up or any(hasattr(home, name) for home in homes), name


def spelled(call: Call | None) -> tuple[str, dict[str, Any], bool]:
    assert call is not None
    return call.name, call.arguments, call.inplace


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "expected"),
    [
        (operator.add, ("x", "y"), {}, ("add", {"input": "x", "other": "y"}, False)),
        (operator.iadd, ("x", "y"), {}, ("add", {"input": "x", "other": "y"}, True)),
        (Tensor.__radd__, ("x", "y"), {}, ("add", {"input": "y", "other": "x"}, False)),
        (Tensor.__rsub__, ("x", 1), {}, ("sub", {"input": 1, "other": "x"}, False)),
        ("add_", ("x", "y"), {"alpha": 2}, ("add", {"input": "x", "other": "y", "alpha": 2}, True)),
        (torch.ops.aten.add_.Tensor, ("x", "y"), {}, ("add", {"input": "x", "other": "y"}, True)),
        (torch.subtract, ("x",), {"other": "y"}, ("sub", {"input": "x", "other": "y"}, False)),
        (torch.mm, ("x",), {"mat2": "y"}, ("matmul", {"input": "x", "other": "y"}, False)),
        (
            torch.addmm,
            ("b",),
            {"mat1": "x", "mat2": "w"},
            ("addmm", {"bias": "b", "input": "x", "other": "w"}, False),
        ),
        (
            torch.addmm,
            (),
            {"input": "b", "mat1": "x", "mat2": "w"},
            ("addmm", {"bias": "b", "input": "x", "other": "w"}, False),
        ),
        ("permute", ("x", 0, 2, 1), {}, ("permute", {"input": "x", "dims": (0, 2, 1)}, False)),
        ("permute", ("x", (0, 2, 1)), {}, ("permute", {"input": "x", "dims": (0, 2, 1)}, False)),
        (getattr, ("x", "T"), {}, ("t", {"input": "x"}, False)),
        (F.embedding, ("x", "w"), {}, ("embedding", {"input": "x", "weight": "w"}, False)),
        (torch.embedding, ("w", "x"), {}, ("embedding", {"input": "x", "weight": "w"}, False)),
        (
            torch.ops.aten.embedding.default,
            ("w", "x"),
            {},
            ("embedding", {"input": "x", "weight": "w"}, False),
        ),
        (
            torch.swapaxes,
            ("x",),
            {"axis0": 1, "axis1": 2},
            ("transpose", {"input": "x", "dim0": 1, "dim1": 2}, False),
        ),
    ],
)
def test_spellings_of_one_call(target: Any, args: Any, kwargs: Any, expected: Any) -> None:
    assert spelled(bind(target, args, kwargs)) == expected


def test_a_convolution_of_aten_is_the_function_that_it_calls() -> None:
    arguments = ("x", "w", None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1)
    name, given, _ = spelled(bind(torch.ops.aten.convolution.default, arguments, {}))
    assert name == "conv_transpose2d" and given["stride"] == [1, 1] and given["groups"] == 1
    assert spelled(bind(torch.ops.aten.convolution.default, (*arguments[:6], False), {}))[0] == "conv2d"


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (torch.div, ("x", "y"), {"rounding_mode": "floor"}),
        (torch.addmm, ("b", "x", "w"), {"beta": 2}),
        (torch.add, ("x", "y"), {"out": "z"}),
        (torch.flatten, ("x", 1, 2, 3), {}),
    ],
)
def test_an_argument_that_the_row_lacks_is_noticed(target: Any, args: Any, kwargs: Any) -> None:
    call = bind(target, args, kwargs)
    assert call is not None and not call.known


def test_other_functions_of_the_same_name_are_no_operators() -> None:
    def relu(x: Tensor) -> Tensor:
        return x

    assert bind(relu, ("x",), {}) is None
    assert bind(torch.nn.functional.adaptive_max_pool2d, ("x", 1), {}) is None


# What four readers of operator names had four opinions of -----------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.movedim(1, -1),
        lambda x: torch.moveaxis(x, 1, 3),
        lambda x: x.flatten(2).mT,
        lambda x: x.flatten(2).swapaxes(1, 2),
        lambda x: x.flatten(2).adjoint(),
        lambda x: x.transpose(1, 2).transpose(2, 3),
    ],
)
def test_a_linear_after_a_view_folds_into_the_convolution(view: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(view(self.conv(x)))
            return y

    model = perturb(Model().double().eval())
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    fused = fxexpand.fuse(model, x)
    layers = [module for module in fused.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 1, fxexpand.report(fused)
    assert_same(fused(x), model(x), EXACT)
    assert_same(fused(x[:1, :, 1:]), model(x[:1, :, 1:]), EXACT)


@pytest.mark.parametrize(
    ("turned", "transposed"),
    [
        (lambda w: w.movedim(1, 0), True),
        (lambda w: w.moveaxis(0, 1), True),
        (lambda w: w.permute(1, 0), True),
        (lambda w: w.swapdims(0, 1), True),
        (lambda w: w.movedim(0, 0), False),
        (lambda w: w.mT.mT, False),
    ],
)
def test_a_weight_is_seen_as_transposed(turned: Callable[[Tensor], Tensor], transposed: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, turned(self.w))

    assert parameter_uses(Model()) == {"w": Use("linear", "linear", transposed)}


def test_the_helpers_of_the_table_are_documented() -> None:
    for thing in (row, reorders, bind, Kernel, Map):
        assert inspect.getdoc(thing)
