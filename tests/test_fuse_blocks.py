"""``fuse`` on the training-time blocks of the literature: what is left of each, and that it is the same map.

The blocks themselves are held against the formulas of their papers, by which no code of fxexpand goes.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxexpand
import fxexpand.kernel
from fxexpand import RefusedError, VerificationError
from fxexpand.passes import Fuse
from fxexpand.tracing.graphs import trace
from tests.blocks import BLOCKS, Branches, K
from tests.compare import assert_different, assert_same, relative_error
from tests.networks import assert_untouched, perturb, snapshot

EXACT = 1e-10  # relative, in float64
ROUNDED = 1e-5  # relative, in float32

NORM = nn.modules.batchnorm._BatchNorm
WITH_NORMS = [n for n, block in BLOCKS.items() if any(isinstance(m, NORM) for m in block.make().modules())]
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A block in evaluation mode, and an input."""
    model = perturb(BLOCKS[name].make().to(dtype)).eval()
    return model, torch.randn(BLOCKS[name].shape, dtype=dtype)


MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.modules.pooling._AvgPoolNd)
FUNCTIONS = re.compile(
    r"i?(add|sub|mul|truediv)|div|neg|r?sqrt|linear|batch_norm|einsum|matmul|cat|stack"
    r"|conv(_transpose)?\dd|avg_pool\dd"
)


def affine_nodes(graph_module: fx.GraphModule) -> list[str]:
    """The nodes that do what fusing is to spare: all but activations, shapes, padding and selections."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and isinstance(graph_module.get_submodule(node.target), MODULES):
            found.append(node.name)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op in ("call_function", "call_method") and FUNCTIONS.fullmatch(name.strip("_")):
            found.append(node.name)
    return found


def norms_called(graph_module: fx.GraphModule) -> list[str]:
    calls = [str(node.target) for node in graph_module.graph.find_nodes(op="call_module")]
    return sorted(target for target in calls if isinstance(graph_module.get_submodule(target), NORM))


class Fused(NamedTuple):
    """A block before and after, its graph, and its state before the call."""

    model: nn.Module
    x: Tensor
    result: nn.Module
    graph: fx.GraphModule
    before: tuple[dict[str, Tensor], list[type]]


@functools.cache
def fused(name: str) -> Fused:
    """The block fused once for all tests that only look at it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model, x = built(name)
    before, graph_module = snapshot(model), trace(model, example_inputs=x)
    return Fused(model, x, fxexpand.fuse(model, x), graph_module, before)


def each(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * rank


@torch.no_grad()
def probed(model: nn.Module, x: Tensor, one: K) -> tuple[Tensor, Tensor]:
    """Weight (out, in, *k) and bias of ``model``: what it makes, away from the border, of unit impulses."""
    rank = len(one.size)
    if rank == 0:
        units = torch.eye(x.shape[-1], dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 2), x.shape[-1])
        bias = model(torch.zeros_like(units[:1])).flatten()
        return (model(units).flatten(1) - bias).T, bias
    padding, channels = each(one.padding, rank), x.shape[1]
    place = [math.ceil(side / one.stride) for side in padding]
    sides: list[int] = []
    for m, before, k, n in zip(place, padding, one.size, x.shape[2:], strict=True):
        start = m * one.stride - before
        sides = [start, n - start - k, *sides]
    count = channels * math.prod(one.size)
    units = F.pad(torch.eye(count, dtype=x.dtype).reshape(count, channels, *one.size), sides)
    at = (slice(None), slice(None), *place)
    bias = model(torch.zeros_like(units[:1]))[at][0]
    return (model(units)[at] - bias).T.reshape(-1, channels, *one.size), bias


def by_one_kernel(model: nn.Module, x: Tensor, one: K) -> Tensor:
    weight, bias = probed(model, x, one)
    if not one.size:
        return F.linear(x, weight, bias)
    rows, columns = weight.shape[0] // one.groups, weight.shape[1] // one.groups
    for g in range(one.groups):  # what other groups contribute is nothing
        others = weight[g * rows : (g + 1) * rows].clone()
        others[:, g * columns : (g + 1) * columns] = 0
        assert float(others.abs().max()) <= EXACT
    return CONVOLUTIONS[len(one.size)](x, weight, bias, one.stride, each(one.padding, len(one.size)))


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if block.one])
def test_a_block_is_the_one_kernel_of_the_table_or_has_another_border(name: str) -> None:
    (model, x), one = built(name), BLOCKS[name].one
    assert one is not None
    if BLOCKS[name].refused:
        assert_different(by_one_kernel(model, x, one), model(x), 1e-2)
    else:
        assert_same(by_one_kernel(model, x, one), model(x), EXACT)


Folded = tuple[Tensor, Tensor]


def with_norm(weight: Tensor, norm: Any, bias: Tensor | float = 0.0) -> Folded:
    """``K' = K γ / sqrt(σ² + ε)``, ``b' = β + (b − μ) γ / sqrt(σ² + ε)``."""
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * factor.reshape(-1, 1, 1, 1), norm.bias + (bias - norm.running_mean) * factor


def total(size: int, *terms: Folded) -> Folded:
    """The sum of kernels with equal centres."""
    padded = []
    for weight, _ in terms:
        high, wide = ((size - k) // 2 for k in weight.shape[2:])
        padded.append(F.pad(weight, [wide, wide, high, high]))
    return torch.stack(padded).sum(0), torch.stack([bias for _, bias in terms]).sum(0)


def chained(last: Folded, first: Folded) -> Folded:
    """1 x 1, then k x k; or k x k, then 1 x 1: one multiplication of matrices at each tap."""
    (weight, bias), (inner, inner_bias) = last, first
    product = torch.einsum("ohyx,hivu->oiyvxu", weight, inner).flatten(4, 5).flatten(2, 3)
    return product, weight.sum((2, 3)) @ inner_bias + bias


def dirac(channels: int, groups: int = 1) -> Tensor:
    return torch.eye(channels // groups, dtype=torch.float64).repeat(groups, 1)[:, :, None, None]


def repvgg(m: Any) -> Folded:
    skip = with_norm(dirac(len(m.skip.weight), m.dense[0].groups), m.skip)
    return total(3, with_norm(m.dense[0].weight, m.dense[1]), with_norm(m.point[0].weight, m.point[1]), skip)


def acnet(m: Any) -> Folded:
    return total(3, *(with_norm(part[0].weight, part[1]) for part in (m.square, m.row, m.column)))


def dbb(m: Any) -> Folded:
    average = dirac(5).expand(-1, -1, 3, 3) / 9
    return total(
        3,
        with_norm(m.origin[0].weight, m.origin[1]),
        with_norm(m.point[0].weight, m.point[1]),
        chained(with_norm(average, m.average[3]), with_norm(m.average[0].weight, m.average[1])),
        chained(with_norm(m.deep[2].weight, m.deep[3]), with_norm(m.deep[0].weight, m.deep[1])),
    )


def mobileone(m: Any) -> Folded:
    skip = with_norm(torch.ones(6, 1, 1, 1, dtype=torch.float64), m.skip)
    return total(3, skip, *(with_norm(part[0].weight, part[1]) for part in (*m.convs, m.scale)))


def repmixer(m: Any) -> Folded:
    (weight, bias), (less, shift) = mobileone(m.mixer), with_norm(torch.ones_like(m.gamma)[..., None], m.norm)
    scaled = m.gamma[..., None] * (weight - F.pad(less, [1] * 4))
    return total(3, (scaled, m.gamma.flatten() * (bias - shift)), (torch.ones_like(less), 0 * shift))


def doconv(m: Any) -> Folded:
    conv, norm = m
    weight = torch.empty(5, 3, 3, 3, dtype=torch.float64)
    for o in range(5):
        for c in range(3):
            weight[o, c] = ((conv.D[c] + torch.eye(9, dtype=torch.float64)) @ conv.W[o, c]).view(3, 3)
    return with_norm(weight, norm, conv.bias)


def expandnet(m: Any) -> Folded:
    first, second, third = ((conv.weight, conv.bias) for conv in m[:3])
    weight, bias = chained(third, chained(second, first))
    return with_norm(weight, m[3], bias)


FORMULAS: dict[str, Callable[[Any], Folded]] = {
    "repvgg": repvgg,
    "repvgg, groups": repvgg,
    "acnet": acnet,
    "dbb": dbb,
    "mobileone, depthwise": mobileone,
    "repmixer": repmixer,
    "do-conv": doconv,
    "expandnet-cl": expandnet,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_block_is_the_formula_of_its_paper(name: str) -> None:
    model, x = built(name)
    one = BLOCKS[name].one
    assert one is not None
    weight, bias = FORMULAS[name](model)
    assert_same(F.conv2d(x, weight, bias, one.stride, each(one.padding, 2), 1, one.groups), model(x), EXACT)


@pytest.mark.parametrize("name", ["orepa", "sesr"])
def test_a_collapsed_block_is_the_block_it_collapses(name: str) -> None:
    (model, x), (collapsed, _) = built(name), built(f"{name}, collapsed")
    collapsed.load_state_dict(model.state_dict())
    assert_same(collapsed(x), model(x), EXACT)


@pytest.mark.parametrize("name", BLOCKS)
def test_fuse_keeps_the_map_and_its_gradient(name: str) -> None:
    case = fused(name)
    x = case.x.clone().requires_grad_()
    expected, actual = case.model(x), case.result(x)
    assert_same(actual, expected, EXACT)
    weights = torch.randn_like(expected)
    (wanted,), (got,) = (torch.autograd.grad((y * weights).sum(), x) for y in (expected, actual))
    assert_same(got, wanted, EXACT)
    # Other sizes than those of the example: nothing of its shape may be frozen.
    if len(x.shape) > 3:
        other = torch.randn(3, x.shape[1], *(n + 4 for n in x.shape[2:]), dtype=x.dtype)
        assert_same(case.result(other), case.model(other), EXACT)


@pytest.mark.parametrize("name", BLOCKS)
def test_fuse_leaves_what_the_table_says(name: str) -> None:
    case, block = fused(name), BLOCKS[name]
    before, after = affine_nodes(case.graph), affine_nodes(trace(case.result, example_inputs=case.x))
    assert len(after) == block.left <= len(before), f"{before} became {after}"
    if block.left == 1:
        flops = (fxexpand.count_flops(model, case.x).total for model in (case.result, case.model))
        assert next(flops) <= next(flops)


@pytest.mark.parametrize("name", BLOCKS)
def test_fuse_leaves_its_input_alone(name: str) -> None:
    case = fused(name)
    assert_untouched(case.model, case.before)
    assert not any(module.training for module in case.result.modules() if module._parameters)
    held, new = ({p.data_ptr() for p in model.parameters()} for model in (case.model, case.result))
    assert not held & new


@pytest.mark.parametrize("name", BLOCKS)
def test_fuse_in_float32_differs_by_rounding(name: str) -> None:
    model, x = built(name, torch.float32)
    result = fxexpand.fuse(model, x, strict=not BLOCKS[name].refused)
    assert {p.dtype for p in result.parameters()} == {torch.float32}
    assert_same(result(x), model(x), ROUNDED)


@pytest.mark.parametrize("name", BLOCKS)
def test_fuse_is_idempotent(name: str) -> None:
    case = fused(name)
    again = fxexpand.fuse(case.result, case.x)
    assert fxexpand.report(again).changed == ()
    state, expected = again.state_dict(), case.result.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert torch.equal(again(case.x), case.result(case.x))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_report_names_each_fold_and_its_error(name: str) -> None:
    case = fused(name)
    report = fxexpand.report(case.result)
    folds = len(affine_nodes(case.graph)) > BLOCKS[name].left
    assert bool(report.changed) is folds
    for row in report.changed:
        assert row.action == "fused" and row.site and row.site in str(report) and row.reason
        assert row.error is not None and row.error <= EXACT
        assert row.params_after > 0
    for norm in norms_called(case.graph):
        assert any(norm in f"{row.site} {row.reason}" for row in report.rows), f"nothing is said of {norm}"


@pytest.mark.parametrize("name", BLOCKS)
def test_the_pass_does_the_same_on_a_graph(name: str) -> None:
    case = fused(name)
    result = Fuse()(case.graph)
    assert_untouched(case.model, case.before)
    assert_same(result.graph_module(case.x), case.model(case.x), EXACT)
    assert len(affine_nodes(result.graph_module)) == BLOCKS[name].left
    assert result.modified is bool(result.report.changed)
    again = Fuse()(result.graph_module)
    assert not again.modified and again.graph_module is result.graph_module


@pytest.mark.parametrize("name", BLOCKS)
def test_fuse_without_inputs_folds_no_more_than_is_exact(name: str) -> None:
    case = fused(name)
    result = fxexpand.fuse(case.model)
    assert_same(result(case.x), case.model(case.x), EXACT)
    after = affine_nodes(trace(result))
    assert BLOCKS[name].left <= len(after) <= len(affine_nodes(case.graph))
    # What shapes would have settled is refused with a reason; nothing else is lost.
    assert len(after) == BLOCKS[name].left or fxexpand.report(result).refusals


@pytest.mark.parametrize("name", BLOCKS)
def test_refusals_have_their_reason_and_strict_raises_it(name: str) -> None:
    case, words = fused(name), BLOCKS[name].refused
    refusals = fxexpand.report(case.result).refusals
    if not words:  # strict=True raises nothing then: see the test in float32
        assert refusals == ()
        return
    assert any(words in row.reason for row in refusals), [row.message for row in refusals]
    with pytest.raises(RefusedError) as caught:
        fxexpand.fuse(case.model, case.x, strict=True)
    assert any(row.site in str(caught.value) and row.reason[:30] in str(caught.value) for row in refusals)
    assert_untouched(case.model, case.before)


@pytest.mark.parametrize("name", WITH_NORMS)
def test_norms_in_train_mode_stay(name: str) -> None:
    model, x = built(name)
    model.train()
    before = snapshot(model)
    result = fxexpand.fuse(model, x)
    assert_untouched(model, before)
    assert all(module.training for module in result.modules() if module._parameters)
    norms = norms_called(trace(model))
    assert norms_called(trace(result)) == norms
    refused = {row.site: row.reason for row in fxexpand.report(result).refusals}
    assert all("training mode" in refused[norm] or "statistics" in refused[norm] for norm in norms)
    outputs = []
    for network in (model, result):
        torch.manual_seed(3)  # of dropout
        outputs.append(copy.deepcopy(network)(x))
    assert_same(outputs[1], outputs[0], EXACT)


def tied_weight() -> nn.Module:
    one, two = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
    two.weight = one.weight
    return Branches(nn.Sequential(one, nn.BatchNorm2d(5)), two)


@pytest.mark.parametrize(("make", "words"), [(tied_weight, "shared")])
def test_what_may_be_folded_or_refused_stays_right(make: Callable[[], nn.Module], words: str) -> None:
    model = perturb(make().double()).eval()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    assert_same((result := fxexpand.fuse(model, x))(x), model(x), EXACT)
    left = affine_nodes(trace(result, example_inputs=x))
    assert len(left) == 1 or words in " ".join(row.reason for row in fxexpand.report(result).refusals)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_result_can_be_copied_and_pickled(name: str) -> None:
    case = fused(name)
    expected = case.result(case.x)
    for twin in (copy.deepcopy(case.result), pickle.loads(pickle.dumps(case.result))):
        assert torch.equal(twin(case.x), expected)
        assert twin.state_dict().keys() == case.result.state_dict().keys()


@pytest.mark.parametrize("name", ["dbb, padding norm", "linear norm", "repvgg, twice"])
def test_the_result_can_be_exported_and_compiled(name: str) -> None:
    case = fused(name)
    exported = torch.export.export(case.result, (case.x,)).module()
    assert_same(exported(case.x), case.model(case.x), EXACT)
    torch._dynamo.reset()
    compiled = torch.compile(case.result, backend="eager", fullgraph=True)
    assert_same(compiled(case.x), case.model(case.x), EXACT)


@pytest.mark.parametrize("name", ["repvgg", "huh, residual interval", "orepa"])
def test_the_result_trains(name: str) -> None:
    case = fused(name)
    result = copy.deepcopy(case.result).train()
    result(case.x).square().mean().backward()
    gradients = [parameter.grad for parameter in result.parameters()]
    assert gradients and all(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A law of ``fxexpand.kernel`` gives a weight 0.1 % too large, wherever it has been imported."""
    original = getattr(fxexpand.kernel, request.param)

    def wrong(*args: Any, **options: Any) -> Any:
        kernel = original(*args, **options)
        return replace(kernel, weight=kernel.weight * 1.001)

    for module in [module for name, module in sys.modules.items() if name.startswith("fxexpand")]:
        for name in [name for name, value in vars(module).items() if value is original]:
            monkeypatch.setattr(module, name, wrong)
    return str(request.param)


LAWS = [
    ("compose", "expandnet-cl"), ("compose", "norm, conv"), ("compose", "expandnet-fc"),
    ("add", "repvgg"), ("add", "nested sums"), ("add", "lora"),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "name"), LAWS, indirect=["broken"])
def test_a_broken_law_is_caught(broken: str, name: str) -> None:
    model, x = built(name)
    before = snapshot(model)
    with pytest.raises(VerificationError):
        fxexpand.fuse(model)
    with pytest.raises(VerificationError):
        fxexpand.fuse(model, x)
    assert_untouched(model, before)
    with pytest.raises(VerificationError):
        Fuse()(trace(model, example_inputs=x))
    unchecked = fxexpand.fuse(model, x, verify=False)
    assert relative_error(unchecked(x), model(x)) > 1e-5, f"{broken} is not used, so this shows nothing"
