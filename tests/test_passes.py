"""The passes against the networks before them, in float64, with every BatchNorm perturbed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager, this_before_that_pass_constraint
from torch.fx.passes.pass_manager import PassManager as PlainPassManager

from fxexpand.errors import SelectionError
from fxexpand.passes import Expand, Fuse, Result
from fxexpand.recipes import Chain, Recipe
from fxexpand.tracing import graphs as tracing
from fxexpand.tracing.graphs import trace
from tests.compare import assert_different, assert_same
from tests.graphs import (
    EXACT,
    Residual,
    action,
    assert_as_before,
    called,
    graph_of,
    reason,
    residual,
    state_of,
)
from tests.networks import perturb

RECIPES: list[Recipe] = [
    Chain(),
    Chain(depth=1),
    Chain(depth=2, width=3.5),
    Chain(depth=3, width=1, batch_norm=True),
    Chain(depth=3, width=1, residual=1),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_expand_keeps_the_function_and_fuse_gives_the_network_back(recipe: Recipe) -> None:
    model, x = residual()
    graph_module = trace(model)
    expected, state, code = model(x), state_of(graph_module), graph_module.code
    expanded = Expand(recipe)(graph_module)
    assert expanded.modified and isinstance(expanded.graph_module, fx.GraphModule)
    assert_same(expanded.graph_module(x), expected, EXACT)
    assert_as_before(graph_module, state, code)
    assert not expanded.report.refusals or (isinstance(recipe, Chain) and recipe.residual)
    # With its BatchNorm in train mode nothing but the chains can fold: the round trip is the identity.
    batch_norm = isinstance(recipe, Chain) and recipe.batch_norm
    for module in expanded.graph_module.modules():
        outside = isinstance(module, nn.BatchNorm2d) and not hasattr(module, "fxexpand_factor")
        module.train(outside)
    fused = Fuse()(expanded.graph_module).graph_module
    fused.eval()
    assert_same(fused(x), expected, EXACT)
    restored = fused.state_dict()
    added = {f"{name}.bias" for name in ("stem.0", "conv1")} if batch_norm else set()
    assert [name for name in restored if name not in added] == list(state)
    assert all(restored[name].shape == tensor.shape for name, tensor in state.items())
    assert called(fused) == called(graph_module)
    assert [type(fused.get_submodule(name)) for name in called(fused)] == [
        type(graph_module.get_submodule(name)) for name in called(fused)
    ]
    assert Fuse()(fused).graph_module.training is False


def test_the_round_trip_after_training() -> None:
    model, x = residual(training=True)
    model.shared.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    result = Expand(Chain(2, 2))(trace(model))
    expanded = result.graph_module
    assert expanded.training
    frozen = {name for name, parameter in expanded.named_parameters() if not parameter.requires_grad}
    assert frozen == {"shared.0.weight", "shared.1.weight", "shared.1.bias", "head.0.weight", "head.1.weight"}
    optimizer = torch.optim.SGD(expanded.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        expanded(x).square().mean().backward()
        optimizer.step()
    missing = [name for name, p in expanded.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    fused = Fuse()(expanded).graph_module
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert {name for name, p in fused.named_parameters() if not p.requires_grad} == {
        "shared.weight",
        "shared.bias",
        "head.weight",
    }
    fresh = Residual().double()
    fresh.load_state_dict(fused.state_dict())
    assert_different(fused.eval()(x), model.eval()(x), 1e-3)
    assert_same(fresh.eval()(x), expanded.eval()(x), EXACT)
    assert_same(fused(x), expanded(x), EXACT)


def test_gradients_of_the_chain_are_those_of_its_layer() -> None:
    """dL/dbias and dL/dx do not depend on how the weight is written; train mode, with batch statistics."""
    model, x = residual(training=True)
    model.drop.eval()
    x.requires_grad_()
    expanded = Expand()(trace(model)).graph_module
    grads = []
    for network, bias in ((model, "up.bias"), (expanded, "up.2.bias")):
        loss = network(x).square().sum()
        grads.append(torch.autograd.grad(loss, [x, network.get_parameter(bias)]))
    for actual, expected in zip(grads[1], grads[0], strict=True):
        assert_same(actual, expected, 1e-8)


def test_passes_are_idempotent_also_through_copies_and_pickles() -> None:
    model, x = residual()
    graph_module = trace(model)
    expected = model(x)
    first = Expand()(graph_module).graph_module
    for again in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first)), trace(first)):
        result = Expand(Chain(2, 2))(again)
        assert not result.modified and result.graph_module is again and not result.report.refusals
        assert_same(Fuse()(again).graph_module(x), expected, EXACT)
    fused = Fuse()(first).graph_module
    result = Fuse()(fused)
    assert not result.modified and result.graph_module is fused
    assert "conv1" in called(fused) and "bn1" not in called(fused)


def test_inplace() -> None:
    model, x = residual()
    expected = model(x)
    graph_module = trace(model)
    for run in (Expand(inplace=True), Fuse(inplace=True)):
        result = run(graph_module)
        assert result.graph_module is graph_module and result.modified
        assert_same(graph_module(x), expected, EXACT)


def test_what_is_new_shares_no_memory_with_the_input() -> None:
    model, _ = residual()
    graph_module = trace(model)
    before = {tensor.data_ptr() for tensor in graph_module.state_dict().values()}
    for run in (Expand(), Expand(Chain(1)), Fuse()):
        after = {tensor.data_ptr() for tensor in run(graph_module).graph_module.state_dict().values()}
        assert not before & after


def test_a_module_called_twice_is_rewritten_at_both_calls() -> None:
    model, _ = residual()
    graph_module = trace(model)
    expanded = Expand(Chain(2))(graph_module).graph_module
    assert called(expanded).count("shared.0") == called(expanded).count("shared.1") == 2
    assert called(Fuse()(expanded).graph_module).count("shared") == 2


def test_select() -> None:
    graph_module = graph_of(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3))
    for select in (lambda name, module: module.kernel_size == (3, 3), "2", ["2"], {"*": None, "2": Chain(2)}):
        result = Expand(select=select)(graph_module)
        assert action(result, "0") == "left" and action(result, "2") == "expanded"
    assert not Expand(select=lambda name, module: False)(graph_module).modified
    with pytest.raises(SelectionError):
        Expand(select="missing")(graph_module)


def test_initial_values_come_from_the_generator() -> None:
    graph_module = graph_of(nn.Conv2d(3, 3, 3))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        outputs: Tensor = Expand(init="kaiming", generator=generator)(graph_module).graph_module(x)
        return outputs

    assert torch.equal(run(1), run(1))
    assert_different(run(1), run(2), 1e-2)
    assert_different(run(1), graph_module(x), 1e-2)


def test_meta_tensors() -> None:
    model = Residual().to("meta").eval()
    expanded = Expand()(trace(model)).graph_module
    fused = Fuse()(expanded).graph_module
    assert all(tensor.is_meta for tensor in fused.state_dict().values())
    assert fused(torch.randn(2, 3, 10, 8, device="meta")).shape == (2, 5)
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    assert "devices" in reason(Fuse()(trace(mixed)), "1")


def test_nodes_keep_their_meta() -> None:
    model, x = residual()
    graph_module = trace(model, example_inputs=x)
    for node in graph_module.graph.nodes:
        node.meta["origin"] = node.name
    expanded = Expand()(graph_module).graph_module
    nodes = {node.target: node for node in expanded.graph.nodes}
    assert nodes["up.0"].meta["origin"] == nodes["up.2"].meta["origin"] == "up"
    assert "tensor_meta" not in nodes["up.0"].meta  # its shape is another
    assert nodes["up.2"].meta["tensor_meta"].shape == (2, 4, 10, 8)
    assert nodes["up.0"].meta["nn_module_stack"] == nodes["up.2"].meta["nn_module_stack"]
    fused = Fuse()(expanded).graph_module
    assert next(n for n in fused.graph.nodes if n.target == "up").meta["tensor_meta"].shape == (2, 4, 10, 8)


def test_pass_managers() -> None:
    model, x = residual()
    expected = model(x)
    expand, fuse = Expand(), Fuse()
    constraint = this_before_that_pass_constraint(expand, fuse)
    manager = PassManager([fuse, expand], [constraint], run_checks_after_each_pass=True)
    result = manager(trace(model))
    assert result.modified and manager.passes == [expand, fuse]
    assert_same(result.graph_module(x), expected, EXACT)
    assert "conv1" in called(result.graph_module)
    steps: list[bool] = []

    def counted(graph_module: fx.GraphModule) -> Result:
        outcome = fuse(graph_module)
        steps.append(outcome.modified)
        return outcome

    PassManager([counted], steps=5)(trace(model))
    assert steps == [True, False]

    def function(run: Expand | Fuse) -> Callable[[fx.GraphModule], nn.Module]:
        return lambda graph_module: run(graph_module).graph_module

    plain = PlainPassManager([function(expand), function(fuse)])
    assert_same(plain(trace(model))(x), expected, EXACT)


def test_a_result_is_torch_s_own_with_a_report() -> None:
    result = Fuse()(graph_of(nn.Linear(3, 3)))
    graph_module, modified = result
    assert graph_module is result.graph_module and modified is False
    assert result.report.title == "fuse" and copy.copy(result).report is result.report
    assert Expand() == Expand() and hash(Fuse()) == hash(Fuse())
    with pytest.raises(AttributeError):
        Fuse().inplace = True  # type: ignore[misc]


def test_regions_of_a_model_with_control_flow() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            result: Tensor = self.tail(x) if x.sum() > 0 else x
            return result

    model = perturb(Gate().double()).eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = model(x)
    found = tracing.regions(model)
    for name, graph_module in found.graphs:
        expanded = Expand()(graph_module).graph_module
        model.set_submodule(name, expanded)
    assert_same(model(x), expected, EXACT)
    for name, _ in found.graphs:
        model.set_submodule(name, Fuse()(model.get_submodule(name)).graph_module)  # type: ignore[arg-type]
    assert_same(model(x), expected, EXACT)
    assert [type(module) for module in model.modules() if not list(module.children())] == [
        nn.Conv2d,
        nn.ReLU,
        nn.Conv2d,
    ]


def test_a_timm_model() -> None:
    timm = pytest.importorskip("timm")
    model = perturb(timm.create_model("resnet10t", num_classes=3).double()).eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    graph_module = trace(model)
    chosen = Expand(Chain(2, 1), select=["conv1", "layer1", "layer2.*.conv1", "fc"])(graph_module)
    assert len(chosen.report.changed) == 7 and not chosen.report.refusals
    assert_same(chosen.graph_module(x), model(x), EXACT)
    fused = Fuse()(chosen.graph_module)
    assert_same(fused.graph_module(x), model(x), EXACT)
    direct = Fuse()(graph_module).graph_module
    assert called(fused.graph_module) == called(direct)
    assert fused.graph_module.state_dict().keys() == direct.state_dict().keys()
    norms = [m for m in fused.graph_module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not norms
