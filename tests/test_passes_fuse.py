"""What Fuse merges and what it leaves apart, against the networks before it, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxexpand.passes import Expand, Fuse
from fxexpand.recipes import Chain
from fxexpand.tracing.graphs import trace
from tests.compare import assert_different, assert_same
from tests.graphs import EXACT, Residual, action, called, graph_of, reason
from tests.networks import perturb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folds_are_cast_once(dtype: torch.dtype) -> None:
    model = perturb(Residual()).eval().to(dtype)
    x = torch.randn(2, 3, 10, 8, dtype=dtype)
    wide = copy.deepcopy(model).double()(x.double())
    graph_module = trace(model)
    fused = Fuse()(graph_module).graph_module
    expanded = Expand()(graph_module).graph_module
    assert {p.dtype for network in (fused, expanded) for p in network.parameters()} == {dtype}
    # Each of a dozen layers rounds its output once; relative to the largest value that is a few roundings.
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert_same(fused(x).double(), wide, limit)
    exact = Fuse()(trace(copy.deepcopy(model).double())).graph_module.state_dict()
    assert all(torch.equal(tensor, exact[name].to(dtype)) for name, tensor in fused.state_dict().items())
    assert_same(expanded(x).double(), wide, limit)


def test_a_module_called_twice_in_a_row_or_before_different_things() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 1)
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(self.conv(x)))
            result: Tensor = torch.relu(y) + torch.tanh(self.conv(x))
            return result

    model = perturb(Twice().double()).eval()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    graph_module = trace(model)
    fused = Fuse()(graph_module).graph_module
    assert sorted(called(fused)) == ["conv", "conv_1"]  # a kernel for each place
    assert_same(fused(x), model(x), EXACT)
    expanded = Expand()(graph_module).graph_module
    again = Fuse()(expanded).graph_module
    assert again.state_dict().keys() == fused.state_dict().keys()
    assert_same(again(x), model(x), EXACT)


def test_of_a_shared_chain_the_unbroken_call_folds() -> None:
    """One of two calls of a chain was cut open, so it keeps its factors."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.conv(torch.tanh(self.conv(x)))
            return result

    expanded = Expand(Chain(2))(trace(Twice().double())).graph_module
    node = expanded.graph.find_nodes(op="call_module", target="conv.0")[0]
    with expanded.graph.inserting_after(node):
        cut = expanded.graph.call_function(torch.tanh)
    node.replace_all_uses_with(cut)
    cut.args = (node,)
    expanded.recompile()
    fused = Fuse()(expanded).graph_module
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert sorted(called(fused)) == ["conv.0", "conv.0_1", "conv.1"]
    assert_same(fused(x), expanded(x), EXACT)


def test_what_is_left_of_a_broken_chain_keeps_the_names_of_its_factors() -> None:
    expanded = Expand()(graph_of(nn.Conv1d(3, 3, 1))).graph_module
    node = expanded.graph.find_nodes(op="call_module", target="0.1")[0]
    with expanded.graph.inserting_after(node):
        cut = expanded.graph.call_function(torch.tanh)
    node.replace_all_uses_with(cut)
    cut.args = (node,)
    expanded.recompile()
    fused = Fuse()(expanded).graph_module
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert called(fused) == ["0.0", "0.2"]
    assert_same(fused(x), expanded(x), EXACT)


class Branches(nn.Module):
    """RepVGG's block: k x k, 1 x 1 and identity, each with its BatchNorm; and a skip around a 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.bn_wide = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.point, self.bn_point = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.bn = nn.BatchNorm2d(4)
        self.skip = nn.Conv2d(4, 4, 1)
        self.rest = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn_wide(self.wide(x)) + self.bn_point(self.point(x))
        y += self.bn(x)
        y = torch.add(y, self.rest(self.skip(y)))
        return F.relu(y)


def test_branches_and_skips_become_one_kernel() -> None:
    model = perturb(Branches().double()).eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    result = Fuse()(trace(model))
    fused = result.graph_module
    assert called(fused) == ["wide"] and list(fused.state_dict()) == ["wide.weight", "wide.bias"]
    assert [name for name, _ in fused.named_modules()] == ["", "wide"]
    assert fused.get_submodule("wide").weight.shape == (4, 4, 3, 3)
    assert_same(fused(x), model(x), EXACT)
    (row,) = result.report.rows
    assert row.action == "fused" and row.error is not None and row.error <= EXACT and "bn_point" in row.reason
    assert row.params_before == 144 + 16 + 24 + 20 and row.params_after == 148
    fused.get_parameter("wide.weight").data *= 1.001
    assert_different(fused(x), model(x), 1e-4)


MERGED: dict[str, tuple[list[nn.Module], tuple[int, ...], list[str]]] = {
    "conv, bn": ([nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)], (3, 7, 6), ["0"]),
    "bn, conv without padding": ([nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)], (3, 7, 6), ["1"]),
    "bn between": (
        [nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)],
        (3, 7),
        ["0"],
    ),
    "transposed": ([nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6)], (4, 5, 3), ["0"]),
    "3d": ([nn.Conv3d(2, 3, (1, 2, 3)), nn.BatchNorm3d(3)], (2, 3, 4, 5), ["0"]),
    "without affine": ([nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)], (3, 4, 4), ["0"]),
    "stride after": ([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1, stride=2)], (3, 9, 8), ["0"]),
    "linear, linear": ([nn.Linear(8, 5), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)], (4, 8), ["0", "3"]),
    "idle modules between": (
        [nn.Identity(), nn.Linear(4, 4), nn.Dropout(0.5), nn.Identity(), nn.Linear(4, 4), nn.Dropout(0.5)],
        (4,),
        ["0", "1", "5"],
    ),
    "narrow first": ([nn.Linear(9, 2), nn.Linear(2, 8), nn.Linear(8, 2)], (9,), ["0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_neighbours_merge(case: str) -> None:
    modules, shape, left = MERGED[case]
    graph_module = graph_of(*copy.deepcopy(modules))
    x = torch.randn(2, *shape, dtype=torch.float64)
    fused = Fuse()(graph_module).graph_module
    assert [name for name in called(fused) if type(fused.get_submodule(name)) is not nn.Tanh] == left
    assert_same(fused(x), graph_module(x), EXACT)


APART: dict[str, tuple[list[nn.Module], str, str, str]] = {
    "bottleneck": ([nn.Linear(9, 2), nn.Linear(2, 8)], "1", "left", "multiply-adds"),
    "low-rank conv": ([nn.Conv2d(8, 2, 3), nn.Conv2d(2, 8, 1)], "1", "left", "multiply-adds"),
    "behind a stride": ([nn.Conv2d(8, 2, 1, stride=4), nn.Conv2d(2, 8, 1)], "1", "left", "multiply-adds"),
    "behind two strides": (
        [nn.Conv2d(8, 2, 1, stride=2), nn.Conv2d(2, 2, 1, stride=2), nn.Conv2d(2, 8, 1)],
        "2", "left", "multiply-adds",
    ),
    "before a stride": (
        [nn.ConvTranspose2d(8, 2, 1, bias=False), nn.ConvTranspose2d(2, 8, 1, stride=2)],
        "1", "left", "multiply-adds",
    ),
    "separable": ([nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)], "1", "left", "multiply-adds"),
    "3 x 3 twice": ([nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)], "1", "left", "multiply-adds"),
    "padding after a bias": ([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)], "1", "refused", "bias"),
    "bn, padding": ([nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)], "1", "refused", "bias"),
    "unknown rank": ([nn.Linear(4, 4), nn.BatchNorm1d(4)], "1", "refused", "example_inputs"),
    "no statistics": (
        [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)], "1", "refused", "statistics",
    ),
    "alone": ([nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU()], "1", "left", "nothing affine"),
    "two norms": ([nn.BatchNorm2d(3), nn.BatchNorm2d(3)], "1", "left", "nothing affine"),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_neighbours_that_stay_apart_have_a_reason(case: str) -> None:
    modules, site, verdict, text = APART[case]
    graph_module = graph_of(*copy.deepcopy(modules))
    result = Fuse()(graph_module)
    assert site in called(result.graph_module)
    assert action(result, site) == verdict and text in reason(result, site)


def test_batch_norm_in_train_mode_is_refused() -> None:
    graph_module = graph_of(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 3, 1)
    ).train()
    result = Fuse()(graph_module)
    assert not result.modified and "eval" in reason(result, "1") and action(result, "1") == "refused"


def test_dropout_that_drops_stays() -> None:
    for training in (True, False):
        graph_module = graph_of(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3)).train(training)
        assert Fuse()(graph_module).modified is not training
    assert Fuse()(graph_of(nn.Linear(3, 3), nn.Dropout(0.0), nn.Linear(3, 3)).train()).modified


def test_the_new_layer_is_in_the_mode_and_as_trainable_as_the_old() -> None:
    layers = (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    graph_module = graph_of(*layers)
    for name in ("0.weight", "0.bias", "3.weight", "3.bias", "4.bias"):
        graph_module.get_parameter(name).requires_grad_(False)
    fused = Fuse()(graph_module).graph_module
    trains = {name: parameter.requires_grad for name, parameter in fused.named_parameters()}
    assert trains == {"0.weight": False, "0.bias": True, "3.weight": True, "3.bias": False}
    assert not any(module.training for module in fused.modules() if list(module.parameters()))
    plain = Fuse()(graph_of(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, affine=False))).graph_module
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_what_held_the_old_modules_goes_when_it_is_empty() -> None:
    nested = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(nn.Sequential(nn.BatchNorm2d(3))))
    fused = Fuse()(graph_of(nested)).graph_module
    assert [name for name, _ in fused.named_modules()] == ["", "0", "0.0", "0.0.0"]


def test_batch_norm_after_linear_needs_a_matrix() -> None:
    layers = (nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5))
    model = perturb(nn.Sequential(*layers).double()).eval()
    matrix, batch = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 6), (4, 5, 6)))
    fused = Fuse()(trace(model, example_inputs=matrix)).graph_module
    assert called(fused) == ["0", "2", "3"]
    assert_same(fused(matrix), model(matrix), EXACT)
    # With three dimensions the channels of BatchNorm1d are not those of the Linear.
    result = Fuse()(trace(model, example_inputs=batch))
    assert not result.modified and action(result, "1") == action(result, "4") == "left"
    # A flattened value is a matrix.
    flat = graph_of(nn.Flatten(), *layers)
    fused = Fuse()(flat).graph_module
    assert called(fused) == ["0", "1", "3", "4"]
    assert_same(fused(batch[..., :3, :2]), flat(batch[..., :3, :2]), EXACT)


@pytest.mark.parametrize("between", [False, True])
def test_an_intermediate_value_that_others_read_stays(between: bool) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.rest = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return x, self.bn(self.rest(x) if between else x)

    graph_module = trace(Read().eval())
    result = Fuse()(graph_module)
    assert not result.modified
    assert between or "read elsewhere" in reason(result, "bn")


class Writing(nn.Module):
    """Writes into the value that two convs read, between their reads."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.a(x)
        z = x.relu_()
        if self.branches:
            return torch.tanh(y + self.b(x)) + z
        result: Tensor = torch.tanh(self.bn(y)) + torch.relu(self.b(x)) + z
        return result


@pytest.mark.parametrize("branches", [False, True])
def test_writing_in_place_keeps_the_order_of_reads(branches: bool) -> None:
    model = perturb(Writing(branches).double()).eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    result = Fuse()(trace(model))
    assert_same(result.graph_module(x), model(x), EXACT)
    if branches:
        assert not result.modified
    else:
        assert called(result.graph_module) == ["a", "b"]


class Unequal(nn.Module):
    """Sums that are none of two maps of one value, or not of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.wide, self.one = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 1, 1)
        self.corner = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        p = torch.relu(self.a(x) + self.b(y))
        q = self.wide(p) + self.one(p)  # one channel for all
        r = torch.relu(q)
        r = r + self.corner(r)[..., :1, :1]
        result: Tensor = r * torch.tanh(r)
        return result


def test_other_sums_stay() -> None:
    model = Unequal().double()
    result = Fuse()(trace(model))
    assert not result.modified
    x, y = torch.randn(2, 2, 3, 6, 5, dtype=torch.float64)
    assert_same(result.graph_module(x, y), model(x, y), EXACT)


@pytest.mark.parametrize("own", [False, True])
def test_an_addition_that_writes_into_its_source_stays_where_that_is_seen_outside(own: bool) -> None:
    class Into(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x) if own else x.detach()
            z = y.add_(self.conv(y))
            return z * y

    model = Into().double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    result = Fuse()(trace(model))
    assert result.modified == own
    assert_same(result.graph_module(x.clone()), model(x.clone()), EXACT)


def test_channels_last_stays() -> None:
    graph_module = trace(Branches().eval()).to(memory_format=torch.channels_last)
    weight = Fuse()(graph_module).graph_module.get_parameter("wide.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_functions_whose_names_look_like_writing_do_not_write() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            mask = x > 0
            other = ~mask
            result: Tensor = self.bn(self.conv(x)) * mask - x.clamp(min=0, max=True) * other * mask.float()
            return result

    model = perturb(Masked().double()).eval()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    fused = Fuse()(trace(model))
    assert fused.modified
    assert_same(fused.graph_module(x), model(x), EXACT)


def test_what_follows_a_write_reads_what_was_written() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y.mul_(2.0)
            F.relu(y, inplace=True)
            result: Tensor = self.other(y) + y
            return result

    model = Writes().double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    fused = Fuse()(trace(model))
    assert fused.modified
    assert_same(fused.graph_module(x), model(x), EXACT)
