"""``fuse`` on the training-time blocks of the literature keeps the map and leaves what the table says."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import fxexpand
import fxexpand.kernel
from fxexpand import RefusedError, VerificationError
from fxexpand.passes import Fuse
from fxexpand.tracing.graphs import trace
from tests.block_table import BLOCKS, built
from tests.blocks import Branches
from tests.compare import assert_same, relative_error
from tests.networks import assert_untouched, perturb, snapshot

EXACT = 1e-10  # relative, in float64
ROUNDED = 1e-5  # relative, in float32

NORM = nn.modules.batchnorm._BatchNorm
WITH_NORMS = [n for n, block in BLOCKS.items() if any(isinstance(m, NORM) for m in block.make().modules())]


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
