"""Where code has no symbolic graph, a call through it has one, made by torch.export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand.errors import FxExpandError
from fxexpand.passes import Fuse
from fxexpand.running.inputs import call
from fxexpand.tracing.graphs import UntraceableError, symbolic, trace
from fxexpand.tracing.guards import mode_of
from tests.compare import assert_same
from tests.networks import perturb

X = torch.randn(2, 3, 8, 6, dtype=torch.float64)
EXACT = 1e-12


class Branching(nn.Module):
    """A convolution and a BatchNorm with control flow on sizes between them, and another path."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, gain: float = 1.0, *, mask: Tensor | None = None) -> dict[str, Any]:
        h = self.conv(x)
        if x.shape[2] % 7 == 0:
            h = h.relu()
        h = self.norm(h)
        if mask is not None:
            h = h * mask
        return {"out": self.drop(h) * gain, "size": (h.mean((2, 3)),)}


def network() -> Branching:
    torch.manual_seed(0)
    model = Branching().double().eval()
    perturb(model)
    return model


def test_the_graph_holds_for_all_sizes_of_its_path_and_for_no_other() -> None:
    model = network()
    with pytest.raises(UntraceableError, match="control flow"):
        symbolic(model, example_inputs=X)
    graph = trace(model, example_inputs=X)
    assert mode_of(graph) == "eval" and graph.get_parameter("conv.weight") is model.conv.weight
    for batch, height, width in ((2, 8, 6), (5, 9, 11), (1, 15, 4)):
        x = torch.randn(batch, 3, height, width, dtype=torch.float64)
        assert_same(graph(x)["out"], model(x)["out"], EXACT)
        assert_same(graph(x)["size"][0], model(x)["size"][0], EXACT)
    with pytest.raises(AssertionError, match="Guard failed"):
        graph(torch.randn(2, 3, 14, 6, dtype=torch.float64))
    with pytest.raises(UntraceableError, match="eval mode and holds in that mode only"):
        graph.train()(X)


def test_a_batch_of_one_is_left_free() -> None:
    model = network()
    graph = trace(model, example_inputs=X[:1])
    assert_same(graph(X)["out"], model(X)["out"], EXACT)


def test_a_batch_of_one_takes_its_own_branch_or_none() -> None:
    model = Does(lambda module, x: x.relu() if x.shape[0] == 1 else x).double().eval()
    graph = trace(model, example_inputs=X)
    assert_same(graph(X), model(X), EXACT)
    with pytest.raises(AssertionError, match="Guard failed"):
        graph(X[:1])


class Single(nn.Module):
    """Takes a batch of one and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.squeeze(0)[None])["out"]
        return out


def test_a_batch_that_must_be_one_is_kept() -> None:
    model = Single().eval()
    graph = trace(model, example_inputs=X[:1])
    assert_same(graph(X[:1]), model(X[:1]), EXACT)


def test_arguments_are_those_that_were_given() -> None:
    model, mask = network(), torch.rand(6, 4, dtype=torch.float64)
    inputs = {"x": X, "gain": 3.0, "mask": mask}
    graph = trace(model, example_inputs=inputs)
    assert_same(call(graph, inputs)["out"], call(model, inputs)["out"], EXACT)


def test_in_training_mode_statistics_and_noise_are_those_of_the_model() -> None:
    model = network().train()
    graph, reference = trace(model, example_inputs=X), copy.deepcopy(model)
    assert mode_of(graph) == "train"
    torch.manual_seed(1)
    expected = reference(X)["out"]
    torch.manual_seed(1)
    assert_same(graph(X)["out"], expected, EXACT)
    after, wanted = model.norm.state_dict(), reference.norm.state_dict()
    assert int(after["num_batches_tracked"]) == int(wanted["num_batches_tracked"]) > 0
    assert_same(after["running_var"], wanted["running_var"], EXACT)
    with pytest.raises(UntraceableError, match="train mode and holds in that mode only"):
        graph.eval()(X)


def test_the_pass_folds_what_the_control_flow_kept_apart() -> None:
    model = network()
    assert {row.action for row in fxexpand.report(fxexpand.fuse(model, X)).rows} == {"left", "refused"}
    folded = Fuse()(trace(model, example_inputs=X)).graph_module
    assert not any(
        getattr(node.target, "__name__", "").startswith("batch_norm") for node in folded.graph.nodes
    )
    assert_same(folded(X)["out"], model(X)["out"], 1e-10)


class Scaled(nn.Module):
    """A layer scale after control flow on sizes, as in DINOv2 and BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 6)
        self.gain = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
        h = self.outer(self.inner(x).relu())
        if h.shape[-1] != 6 or h.shape[1] > 1000:
            raise ValueError("too many")
        h = h if tokens is None else h[:, tokens]
        return {"h": x + self.gain * h}


def test_a_file_holds_one_path_in_any_case(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Scaled().eval(), {"x": torch.randn(2, 5, 6)}
    assert "gain" in fxexpand.fuse(model, inputs).state_dict()
    report = fxexpand.export_onnx(model, tmp_path / "model.onnx", inputs, fuse=True, compare_with=model)
    assert report.operators_before is not None and report.operators_before["Mul"] == 1
    assert "Mul" not in report.operators and report.error is not None and report.error < 1e-5
    assert report.inputs == {"x": ("batch", 5, 6)} and report.batch_sizes == (1, 2, 3)
    assert report.metadata["fxexpand.report"] == "fuse: 1 fused" and "gain" in model.state_dict()


class Does(nn.Module):
    """What a symbolic trace refuses, around one convolution."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(2.0))
        self.cache: list[Tensor] = []
        self.deep: dict[str, tuple[list[Tensor]]] = {}
        self.function = function

    def forward(self, x: Tensor) -> Any:
        self.cache.append(x)
        return self.function(self, self.conv(x))


def assigning(module: Does, x: Tensor) -> Tensor:
    module.scale = module.scale + 1
    return x * module.scale


CODE: dict[str, Callable[[Does, Tensor], Any]] = {
    "a length": lambda module, x: x.reshape(*x.shape[:-1], 2, -1),
    "a loop": lambda module, x: torch.stack([row.sin() for row in x.unbind(1)]),
    "a number": lambda module, x: x[:, : int(x.shape[2]) // 2],
    "no gradients": lambda module, x: torch.no_grad()(torch.relu)(x) + x,
    "autocast": lambda module, x: torch.autocast("cpu", enabled=False)(module.conv)(x),
    "a buffer assigned": assigning,
}


@pytest.mark.parametrize("case", CODE)
def test_what_stops_a_symbolic_trace(case: str) -> None:
    torch.manual_seed(0)
    model = Does(CODE[case]).double().eval()
    scale = model.scale
    with pytest.raises(UntraceableError):
        symbolic(model, example_inputs=X)
    graph = trace(model, example_inputs=X)
    assert all(type(kept) is Tensor for kept in model.cache) and model.scale is scale and float(scale) == 2.0
    found = graph(X)
    model.scale = torch.tensor(2.0, dtype=torch.float64)
    assert_same(found, model(X), EXACT)


BY_ONE: dict[str, Callable[[Does, Tensor], Any]] = {
    "a batch of one": lambda module, x: x * 2 if x.shape[0] == 1 else x,
    "batches": lambda module, x: x * 2 if x.shape[0] > 1 else x,
    "a height of one": lambda module, x: x * 2 if x.shape[2] == 1 else x,
}


@pytest.mark.parametrize("case", BY_ONE)
def test_a_length_of_one_that_the_code_goes_by_is_another_path(case: str) -> None:
    """By itself torch.export takes free lengths for 2 or more, and checks nothing."""
    model = Does(BY_ONE[case]).double().eval()
    graph = trace(model, example_inputs=X)
    assert_same(graph(X[1:].repeat(4, 1, 1, 1)), model(X[1:].repeat(4, 1, 1, 1)), EXACT)
    for x in (X[:1], X[:, :, :1]):
        try:
            found = graph(x)
        except AssertionError as error:
            assert "Guard failed" in str(error)
        else:
            assert_same(found, model(x), EXACT)


def pasted(module: Does, x: Tensor) -> Tensor:
    whole = x.new_zeros(x.shape[0], 3, 4, 4)
    whole[:, :, :2] = x[..., :2, :4]
    return whole if x.shape[2] > 2 else -whole


def test_a_batch_of_one_is_free_where_only_torch_looks_whether_it_is_one() -> None:
    model = Does(pasted).double().eval()
    graph = trace(model, example_inputs=X)
    assert_same(graph(X[:1]), model(X[:1]), EXACT)


def test_a_length_of_one_that_is_broadcast_is_fixed() -> None:
    class Shifted(Does):
        def forward(self, x: Tensor, shift: Tensor) -> Any:  # type: ignore[override]
            return self.conv(x) + shift if x.shape[2] != 7 else x

    model, shift = Shifted(torch.relu).double().eval(), torch.randn(2, 1, 1, 6, dtype=torch.float64)
    graph = trace(model, example_inputs=(X, shift))
    assert_same(graph(X, shift), model(X, shift), EXACT)
    with pytest.raises(AssertionError, match="Guard failed"):
        graph(X, shift.expand(2, 3, 1, 6))


def counting(module: Does, x: Tensor) -> Tensor:
    return x * module.scale.add_(1.0)


def keeping(module: Does, x: Tensor) -> Tensor:
    module.kept = x
    return x


def collecting(module: Does, x: Tensor) -> Tensor:
    module.deep["a"][0].append(x)
    return x


KEEPS: dict[str, Callable[[Does, Tensor], Any]] = {
    "a buffer written": counting,
    "noise": lambda module, x: x + torch.rand_like(x),
    "an attribute": keeping,
    "in a list in a dict": collecting,
}


@pytest.mark.parametrize("case", KEEPS)
def test_what_a_forward_writes_and_draws_is_compared_and_put_back(case: str) -> None:
    model = Does(lambda module, x: KEEPS[case](module, x) if x.shape[0] < 9 else x).double().eval()
    model.deep = {"a": ([],)}
    attributes = dict(vars(model))
    graph, reference = trace(model, example_inputs=X), copy.deepcopy(model)
    assert vars(model) == attributes and model.deep == {"a": ([],)} and float(model.scale) == 2.0
    torch.manual_seed(0)
    expected = reference(X)
    torch.manual_seed(0)
    assert_same(graph(X), expected, EXACT)
    assert float(model.scale) == float(reference.scale)


@pytest.mark.parametrize("training", [False, True])
def test_code_that_goes_by_the_mode_is_in_that_of_the_model(training: bool) -> None:
    model = Branching()
    model.norm.eval()  # as in fine-tuning
    model.drop = nn.Identity()  # type: ignore[assignment]
    model.train(training).norm.eval()
    graph = trace(model, example_inputs=X.float())
    assert mode_of(graph) == ("train" if training else "eval") and graph.training == training
    by_flag = Does(lambda module, x: x * (2 if module.training else 3) if x.shape[0] < 9 else x).train(
        training
    )
    graph = trace(by_flag, example_inputs=X.float())
    assert_same(graph(X.float()), by_flag(X.float()), EXACT)
    with pytest.raises(UntraceableError, match="holds in that mode only"):
        graph.train(not training)(X.float())


def test_the_graph_is_traced_again_and_inside_another_model() -> None:
    model = network()
    graph = trace(model, example_inputs=X)
    assert not graph._forward_hooks and not graph._forward_pre_hooks
    again = symbolic(graph, example_inputs=X)
    assert mode_of(again) == "eval"
    around = symbolic(nn.Sequential(graph, nn.Identity()))
    assert mode_of(around) == "eval"
    assert_same(around(X)["out"], model(X)["out"], EXACT)
    with pytest.raises(UntraceableError, match="holds in that mode only"):
        around.train()(X)


def test_torch_export_prints_and_logs_nothing(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, x = Does(lambda module, x: x if x.sum() > 0 else -x).eval(), X.float()
    with pytest.raises(UntraceableError):
        trace(model, example_inputs=x)
    for fuse in (False, True):
        with pytest.raises(FxExpandError, match=r"^Does: torch cannot export it"):
            fxexpand.export_onnx(model, tmp_path / "model.onnx", x, fuse=fuse)
    trace(network(), example_inputs={"x": X, "mask": torch.rand(1, 1, 6, 4, dtype=torch.float64)})
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_a_string_that_torch_cannot_guard_is_an_error() -> None:
    class Chosen(Does):
        def forward(self, x: Tensor, how: str) -> Any:  # type: ignore[override]
            return self.conv(x) if how == "it's" and x.shape[0] < 9 else x

    with pytest.raises(UntraceableError, match=r"control flow; torch\.export: .*literal"):
        trace(Chosen(torch.relu).eval(), example_inputs=(X.float(), "it's"))


def test_neither_way_is_an_error_with_both_reasons() -> None:
    model = Does(lambda module, x: x if x.sum() > 0 else -x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UntraceableError, match=r"^Does: .*control flow; torch.export: .*\. fxexpand"
    ) as caught:
        trace(model, example_inputs=X.float())
    assert "\n" not in str(caught.value) and isinstance(caught.value, FxExpandError)
    assert model.cache == [] and model.state_dict().keys() == before.keys()


def test_leaves_are_wanted_whole() -> None:
    with pytest.raises(UntraceableError, match="control flow"):
        trace(network(), leaf=lambda name, module: False, example_inputs=X)
