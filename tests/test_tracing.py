"""Traces do what the model does, in every mode they claim, and leave it as it was."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from fxexpand import expand, fuse
from fxexpand.tracing.graphs import UntraceableError, symbolic, trace
from fxexpand.tracing.guards import mode_of
from tests.compare import assert_same

X = torch.randn(2, 4, 6, 5)


class Module(nn.Module):
    """A module with a conv, a buffer, and the given forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("scale", torch.tensor(2.0))
        self.scale: Tensor
        self.cache: dict[str, Any] = {}
        self.function = function

    def forward(self, x: Tensor, flag: bool = False, mask: Tensor | None = None, gain: float = 1.0) -> Any:
        x = self.function(self, self.conv(x))
        if flag:
            x = -x
        if mask is not None:
            x = x * mask
        return x * gain


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a trace could disturb, by name."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = dict(value) if isinstance(value, dict) else value
    return found


def test_a_trace_shares_what_the_model_holds_and_leaves_it_alone() -> None:
    def forward(module: Module, x: Tensor) -> Tensor:
        module.cache["last"] = x
        return x * module.scale + torch.arange(5.0)  # a constant, which fx stores on the model it traces

    model = Module(forward)
    model.conv.eval()
    before, random_state = state_of(model), torch.get_rng_state()
    graph_module = trace(model)
    after = state_of(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] or after[name] == before[name] for name in before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert graph_module.conv is model.conv and mode_of(graph_module) is None
    assert_same(graph_module(X), model(X), 0.0)
    with torch.no_grad():
        model.scale.fill_(3.0)  # a read, not a copy of the value
    assert_same(graph_module(X), model(X), 0.0)


def test_optional_arguments_are_fixed_and_guarded() -> None:
    model = Module(lambda module, x: x)
    mask = torch.rand(2, 4, 6, 5)
    plain = trace(model)
    assert_same(plain(X), model(X), 0.0)
    assert_same(plain(X, gain=3.0), model(X, gain=3.0), 0.0)
    for given in ({"mask": mask}, {"flag": True}):
        with pytest.raises(UntraceableError, match=next(iter(given))):
            plain(X, **given)
    masked = trace(model, example_inputs={"x": X, "mask": mask, "flag": True})
    assert_same(masked(X, True, mask), model(X, True, mask), 0.0)
    masked = copy.deepcopy(masked)
    with pytest.raises(UntraceableError, match="flag"):
        masked(X, mask=mask)


class Starred(nn.Module):
    def forward(self, x: Tensor, *more: Tensor, **options: float) -> Tensor:
        for other in more:
            x = x + other
        return x * options.get("factor", 2.0)


def test_starred_arguments() -> None:
    model = Starred()
    graph_module = trace(model, example_inputs=X)
    graph_module = pickle.loads(pickle.dumps(graph_module))
    assert_same(graph_module(X), model(X), 0.0)
    for args, kwargs in (((X, X), {}), ((X,), {"factor": 3.0})):
        with pytest.raises(UntraceableError):
            graph_module(*args, **kwargs)


class Flagged(nn.Module):
    """Reads its training flag around a layer, so that no graph holds in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.5, training=self.training)


class Noise(nn.Module):
    """Reads its training flag and holds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


def test_constants_may_not_depend_on_the_mode() -> None:
    model = Module(lambda module, x: x + (torch.ones(5) if module.training else torch.zeros(5)))
    assert mode_of(trace(model)) == "train"
    assert mode_of(trace(Module(lambda module, x: x + torch.ones(5)))) is None


def test_guards_are_no_dead_code() -> None:
    graph_module = trace(nn.Sequential(Flagged()).eval())
    optional = trace(Module(lambda module, x: x))
    for graph in (graph_module, optional):
        graph.graph.eliminate_dead_code()
        graph.recompile()
    with pytest.raises(UntraceableError):
        graph_module.train()(X)
    with pytest.raises(UntraceableError):
        optional(X, True)


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_that_depends_on_the_mode_says_so_and_refuses_the_other(training: bool) -> None:
    model = nn.Sequential(Flagged(), nn.ReLU()).train(training)
    graph_module = trace(model, example_inputs=X)
    assert mode_of(graph_module) == ("train" if training else "eval")
    assert graph_module.training is model.training is training
    torch.manual_seed(0)
    expected = model(X)
    for module in (graph_module, copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        torch.manual_seed(0)
        assert_same(module(X), expected, 0.0)
        module.train(not training)
        with pytest.raises(UntraceableError, match="in the other mode"):
            module(X)
        module.train(training)


def test_a_switch_without_tensors_stays_whole_and_works_in_both_modes() -> None:
    model = nn.Sequential(nn.Linear(5, 5), Noise(), nn.Dropout(0.5)).eval()
    graph_module = trace(model)
    assert mode_of(graph_module) is None and not graph_module.training
    for training in (True, False, True):
        model.train(training)
        graph_module.train(training)
        torch.manual_seed(0)
        expected = model(X)
        torch.manual_seed(0)
        assert_same(graph_module(X), expected, 0.0)


def test_modules_in_different_modes_are_kept_so() -> None:
    model = nn.Sequential(Flagged(), Flagged(), nn.BatchNorm2d(4)).train()
    model[0].eval()
    graph_module = trace(model)
    flags = [node.kwargs["training"] for node in graph_module.graph.nodes if node.target is F.dropout]
    assert flags == [False, True] and mode_of(graph_module) == "train"
    assert [module.training for module in model] == [False, True, True]


class Around(nn.Module):
    """Does more than its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.conv(x))
        return result


@pytest.mark.parametrize("model", [Around(), nn.Sequential(Around(), Around())])
def test_a_call_of_its_own_is_not_dropped(model: nn.Module) -> None:
    model.eval()
    with pytest.raises(UntraceableError, match="__call__ of its own"):
        trace(model)
    assert_same(fuse(model)(X), model(X), 1e-6)
    assert_same(fuse(expand(model))(X), model(X), 1e-5)


@dataclass
class Outputs(OrderedDict[str, Any]):
    """As transformers' ModelOutput: a dict and a dataclass."""

    logits: Tensor | None = None

    def __post_init__(self) -> None:
        self["logits"] = self.logits


@pytest.mark.parametrize("make", [OrderedDict, lambda held: Outputs(**held)])
def test_mappings_of_other_classes_stay_what_they_are(make: Callable[..., Any]) -> None:
    class Named(Module):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return make({"logits": self.conv(x)})

    named = Named(lambda module, x: x)
    graph_module = trace(named, example_inputs=X)
    for graph in (graph_module, copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        found = graph(X)
        assert type(found) is type(named(X))
        assert_same(found["logits"], named(X)["logits"], 1e-6)
    make = partial(defaultdict, list)
    with pytest.raises(UntraceableError, match="makes a defaultdict"):
        trace(named)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "control flow": (lambda module, x: x if x.sum() > 0 else -x, "control flow"),
    "constant noise": (lambda module, x: x + torch.randn(5), "random"),
    "a buffer assigned": (lambda module, x: module.__setattr__("scale", x.mean()), "buffer scale"),
    "no gradients": (lambda module, x: torch.no_grad()(torch.relu)(x) + x, "gradients"),
    "autocast": (lambda module, x: torch.autocast("cpu", torch.bfloat16)(module.conv)(x), "autocast"),
    "no autocast": (lambda module, x: torch.autocast("cpu", enabled=False)(module.conv)(x), "autocast"),
    "an error of its own": (lambda module, x: module.missing(x), "missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_cannot_do_again_is_an_error(case: str) -> None:
    function, reason = REFUSED[case]
    model = Module(function)
    before = state_of(model)
    with pytest.raises(UntraceableError, match=f"^Module: .*{reason}.*\\. ") as caught:
        trace(model)
    assert caught.value.reason in str(caught.value)
    after = state_of(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] or after[name] == before[name] for name in before)


def test_a_path_chosen_by_type_is_that_of_the_values() -> None:
    model = Module(lambda module, x: x if isinstance(x, Tensor) else x * 1.001)
    for inputs in (None, X):
        assert_same(symbolic(model, example_inputs=inputs)(X), model(X), 1e-6)


def test_a_path_chosen_by_what_no_trace_sees_is_caught_by_example_inputs() -> None:
    model = Module(lambda module, x: x * 1.001 if "Proxy" in repr(x) else x)
    trace(model)
    with pytest.raises(UntraceableError, match="something else"):
        symbolic(model, example_inputs=X)
    assert_same(trace(model, example_inputs=X)(X), model(X), 1e-6)


def lowered(sizes: list[int], limits: list[int]) -> list[int]:
    """Writes into its own argument, as torchvision's Swin3D does."""
    sizes[0] = min(sizes[0], limits[0])
    return sizes


fx.wrap("lowered")


def test_a_function_may_write_into_the_list_it_is_given() -> None:
    model = Module(lambda self, x: self.conv(x).narrow(1, 0, lowered([9, 9], [x.shape[1], 1])[0]))
    graph = trace(model, example_inputs=X)
    assert_same(graph(X), model(X), 1e-6)


def test_random_numbers_do_not_disturb_the_comparison() -> None:
    model = Module(lambda module, x: x + torch.rand_like(x))
    state = torch.get_rng_state()
    trace(model, example_inputs=X)
    assert torch.equal(torch.get_rng_state(), state)


def test_example_inputs_leave_shapes_in_the_nodes() -> None:
    graph_module = trace(nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten()), example_inputs=(X,))
    shapes = [tuple(node.meta["tensor_meta"].shape) for node in graph_module.graph.nodes]
    assert shapes == [(2, 4, 6, 5), (2, 3, 4, 3), (2, 36), (2, 36)]


def test_hooks_are_kept_by_keeping_the_module_whole() -> None:
    calls: list[str] = []
    inner = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
    inner.register_forward_hook(lambda *_: calls.append("hook"))
    model = nn.Sequential(inner, nn.Linear(5, 3))
    graph_module = trace(model)
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert calls == []
    graph_module(X)
    assert calls == ["hook"]
    with pytest.raises(UntraceableError, match="hooks"):
        trace(inner)
    replaced = nn.Linear(5, 5)
    vars(replaced)["forward"] = torch.relu
    with pytest.raises(UntraceableError, match="replaced"):
        trace(replaced)


def test_leaves() -> None:
    class Custom(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Block(nn.Sequential):
        pass

    parametrized = parametrizations.weight_norm(Custom(5, 5))
    model = nn.Sequential(Block(nn.Linear(5, 5), nn.ReLU()), Custom(5, 5), parametrized)
    asked: list[str] = []

    def leaf(name: str, module: nn.Module) -> bool:
        asked.append(name)
        return type(module) is Block

    targets = [node.target for node in trace(model, leaf=leaf).graph.nodes if node.op == "call_module"]
    assert targets == ["0", "2"]
    assert set(asked) == {"0", "1"}
    targets = [node.target for node in trace(model).graph.nodes if node.op == "call_module"]
    assert targets == ["0.0", "0.1", "2"]
    assert_same(trace(model)(X), model(X), 0.0)
