"""Nothing is frozen and nothing is lost: modes, arguments, methods and keys after expanding and fusing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxexpand
from fxexpand import Chain
from fxexpand.errors import VerificationError
from fxexpand.running.outputs import outputs_of
from fxexpand.running.verify import require_same_outputs, rounded_to
from fxexpand.tracing.graphs import UntraceableError, trace
from tests.compare import assert_same, relative_error
from tests.journeys import EXACT, journey, outputs, same
from tests.networks import perturb


@dataclass
class Given:
    image: Tensor
    scale: float = 1.0


@dataclass
class Found:
    logits: Tensor
    features: list[Tensor]
    aux: Tensor | None = None


class Structured(nn.Module):
    """Structured inputs and outputs, helper methods, checkpointing, a head for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, groups=2) for _ in range(2))
        self.heads = nn.ModuleDict({"main": nn.Linear(6, 4), "aux": nn.Linear(6, 4)})
        self.tables = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
        self.named = nn.ParameterDict({"out": nn.Parameter(torch.randn(4, 5))})
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def reset_classifier(self, classes: int) -> None:
        self.heads["main"] = nn.Linear(6, classes).to(self.tables[0].dtype)

    def forward_features(self, given: Given) -> list[Tensor]:
        h = self.stem(given.image * given.scale)
        found = []
        for block, table in zip(self.blocks, self.tables, strict=True):
            if self.grad_checkpointing and self.training:
                h = checkpoint(block, h, use_reentrant=False)
            else:
                h = block(h)
            h = F.relu(torch.einsum("oi,bihw->bohw", table, F.relu(h))) + h
            found.append(h)
        return found

    def forward(self, given: Given, *, extra: dict[str, Tensor] | None = None, pool: str = "mean") -> Found:
        features = self.forward_features(given)
        last = features[-1] if extra is None else features[-1] + extra["shift"]
        pooled = last.mean((2, 3)) if pool == "mean" else last.amax((2, 3))
        logits = F.relu(self.heads["main"](pooled)) @ self.named["out"]
        aux = self.heads["aux"](features[0].mean((2, 3))) if self.training else None
        return Found(logits, features, aux)


def structured(**more: Any) -> dict[str, Any]:
    return {"given": Given(torch.randn(2, 3, 6, 6).double(), 0.5)} | more


def test_structured_inputs_and_outputs() -> None:
    model = Structured()
    fused = journey(model, structured(), sites=8)
    assert type(fused) is Structured
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    for inputs in (structured(pool="max"), structured(extra={"shift": torch.randn(2, 6, 1, 1).double()})):
        same(fused, model, inputs)


def test_methods_of_the_user_still_work() -> None:
    model = perturb(Structured().double())
    reference: Any = model
    given = structured()["given"]
    big = fxexpand.expand(model, Chain(depth=2, width=1))
    makers: list[Callable[[], nn.Module]] = [
        lambda: copy.deepcopy(big),
        lambda: fxexpand.fuse(big, scope="expanded"),
        lambda: fxexpand.fuse(copy.deepcopy(model).eval()),
    ]
    for make in makers:
        network: Any = make()
        expected = reference.train(network.training).forward_features(given)
        assert_same(network.forward_features(given)[-1], expected[-1], EXACT)
        network.train()
        model.train()
        plain = torch.autograd.grad(network(given).logits.sum(), next(network.blocks.parameters()))
        network.set_grad_checkpointing()
        again = torch.autograd.grad(network(given).logits.sum(), next(network.blocks.parameters()))
        assert_same(again[0], plain[0], EXACT)
        network.reset_classifier(4)
        assert type(network.heads["main"]) is nn.Linear and network(given).logits.shape == (2, 5)
        assert network(given).aux is not None and network.eval()(given).aux is None


class Silent(nn.Module):
    """Everything that goes by the mode: dropout, stochastic depth, statistics, an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.inner, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)
        self.dropout, self.rate = nn.Dropout(0.3), 0.5
        self.head, self.aux = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.conv(x)))
        branch = self.norm2(self.inner(x))
        if self.training:
            keep = torch.rand(len(x), 1, 1, 1, dtype=x.dtype) > self.rate
            branch = branch * keep / (1 - self.rate)
        x = (x + branch).mean((2, 3))
        out = self.head(F.dropout(self.dropout(x), 0.2, self.training))
        return (out, self.aux(x)) if self.training else out


def test_modes_behave_as_before() -> None:
    model = perturb(Silent().double())
    x = torch.randn(4, 3, 7, 7).double()
    big = fxexpand.expand(model, Chain(depth=3, width=1), example_inputs=x)
    for network in (big, fxexpand.fuse(big, scope="expanded")):
        reference = copy.deepcopy(model)
        for _ in range(3):  # statistics, and the counters that momentum=None reads
            same(network.train(), reference.train(), x)
        for name, buffer in reference.named_buffers():
            assert_same(network.get_buffer(name), buffer, EXACT)
        assert int(network.get_buffer("norm2.num_batches_tracked")) == 3
        assert len(outputs(copy.deepcopy(network), x)) == 2
        same(network.eval(), reference.eval(), x)
        assert len(outputs(network, x)) == 1


def test_every_key_of_the_original_is_reachable() -> None:
    model = Structured().double()
    big = fxexpand.expand(model, Chain(depth=2, width=1))
    for name, value in model.state_dict().items():
        path, _, attribute = name.rpartition(".")
        owner: Any = big.get_submodule(path)
        reached = owner[int(attribute)] if path == "tables" else getattr(owner, attribute)
        assert_same(reached.detach(), value, EXACT)
    assert list(fxexpand.fused_state_dict(big)) == list(model.state_dict())
    big.load_state_dict(Structured().double().state_dict())


class Optional(nn.Module):
    """Two layers that are one kernel for some arguments only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, norm: bool = True, mask: Tensor | None = None) -> Any:
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        return F.relu(self.norm(x)) if norm else x


class Chooses(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.part, self.arguments = Optional(), arguments

    def forward(self, x: Tensor) -> Any:
        if x.shape[0] > 1 and float(x.sum()) > 1e9:  # no graph holds the whole
            return x
        return self.part(x, **self.arguments)


@pytest.mark.parametrize("arguments", [{}, {"norm": False}, {"mask": torch.tensor(0.3).double()}])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_layers_are_merged_only_where_every_argument_allows_it(
    arguments: dict[str, Any], whole: bool, given: bool
) -> None:
    x = torch.randn(1, 3, 5, 5).double()
    model = perturb(Optional() if whole else Chooses(**arguments)).double().eval()
    fused = fxexpand.fuse(model, x if given else None)
    for network in (model, fused):
        network.requires_grad_(False)
    inputs = {"x": x} | (arguments if whole else {})
    same(fused, model, inputs)
    report = fxexpand.report(fused)
    assert not report.changed
    if not given or whole or not arguments:
        assert report.refusals and all("of the argument " in row.reason for row in report.refusals)


class Frozen(nn.Module):
    """BatchNorm written out, as detectors have it: several operations, one module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean"):
            self.register_buffer(name, torch.randn(channels))
        self.register_buffer("variance", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), Frozen(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("given", [False, True])
def test_a_module_of_several_operations_becomes_nothing_and_classes_stay(given: bool) -> None:
    model, x = Backbone().double().eval(), torch.randn(1, 3, 7, 7).double()
    fused = fxexpand.fuse(model, x if given else None)
    assert [type(part) for part in fused.modules()] == [Backbone, nn.Conv2d, nn.Identity]
    same(fused, model, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto"])
def test_methods_of_timm_still_work(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = {"img_size": 32} if name.startswith("vit") else {}
    model: Any = perturb(timm.create_model(name, num_classes=5, **size)).double().eval()
    x = torch.randn(2, 3, 32, 32).double()
    big = fxexpand.expand(model, Chain(depth=2, width=1))
    for network in (big, fxexpand.fuse(big, scope="expanded"), fxexpand.fuse(model), fxexpand.fuse(model, x)):
        with torch.no_grad():
            assert_same(network.forward_features(x), model.forward_features(x), EXACT)
            features = network.forward_features(x)
            assert_same(
                network.forward_head(features, pre_logits=True), model.forward_head(features, True), EXACT
            )
            if hasattr(model, "get_intermediate_layers"):
                found = network.get_intermediate_layers(x, n=2, norm=True)
                for a, b in zip(found, model.get_intermediate_layers(x, n=2, norm=True), strict=True):
                    assert_same(a, b, EXACT)
        assert network.no_weight_decay() == model.no_weight_decay() if name.startswith("vit") else True
        network.set_grad_checkpointing()
        network.train()(x).sum().backward()
        network.eval()
        network.reset_classifier(7)
        assert network(x).shape == (2, 7) and network.num_classes == 7


def decorated(forward: Any) -> Any:
    """As the decorators of transformers: a wrapper with fewer variables than the forward has arguments."""

    @wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    @decorated
    def forward(
        self, x: Tensor, one: int | None = None, two: str = "", *, three: bool = False, **more: Any
    ) -> Any:
        return {"out": F.relu(self.norm(self.conv(x))), "more": len(more)}


def test_a_decorated_forward_with_open_keywords_has_a_graph() -> None:
    model, x = perturb(Decorated().double()).eval(), torch.randn(1, 3, 6, 6).double()
    graph_module = trace(model)
    assert_same(graph_module(x)["out"], model(x)["out"], EXACT)
    with pytest.raises(UntraceableError, match="argument three"):
        graph_module(x, three=True)
    with pytest.raises(UntraceableError, match=r"argument \*\*more"):
        graph_module(x, other=1)
    fused = fxexpand.fuse(model, x)
    assert len(fxexpand.report(fused).changed) == 1
    same(fused, model, x)
    assert fused(x, other=1)["more"] == 1


class Masked(nn.Module):
    """Scores of which some are hidden, as -inf and as NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        scores = self.head(torch.tanh(self.body(x)))
        hidden = torch.tensor([0.0, 0.0, float("-inf"), float("nan"), 0.0]).to(x.dtype)
        return scores + hidden


class Returns(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def test_hidden_scores_do_not_hide_the_others() -> None:
    model, x = Masked().double(), torch.randn(3, 4).double()
    big = fxexpand.expand(model, Chain(depth=3, width=1), example_inputs=x)
    assert len(fxexpand.report(big).changed) == 2
    before = outputs_of(model, x)
    for place in (0, 2, 3):  # a wrong number, and one where there was none
        after = before[0].clone()
        after[1, place] = 0.5
        with pytest.raises(VerificationError):
            require_same_outputs(before, Returns(after), x, 1, "test")


class InFloat32(nn.Module):
    """A norm that computes in float32 whatever it is given, as that of many language models, and autocast."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.cast, self.body, self.head = cast, nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cast):
            hidden = self.body(x)
        hidden = hidden.float()
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        return self.head(hidden.to(x.dtype))


@pytest.mark.parametrize("cast", [False, True])
def test_a_model_that_rounds_on_its_way_is_not_held_to_more(cast: bool) -> None:
    model = InFloat32(cast).to(torch.float32 if cast else torch.float64)
    if cast:
        x = torch.randn(99, 64)
    else:  # halfway between two numbers of float32, where the last bit of a double decides
        x = 1 + (2 * torch.randint(0, 2**20, (99, 64)) + 1).double() / 2**24
        nn.init.eye_(model.body.weight)
        nn.init.zeros_(model.body.bias)
    big = fxexpand.expand(model, example_inputs=x)
    error = relative_error(big(x), model(x))
    assert error > (1e-4 if cast else 1e-10)  # which would be too much for a model of one precision
    assert rounded_to(big, x) == {torch.bfloat16 if cast else torch.float32}
    off = model(x).detach() * 1.5
    with pytest.raises(VerificationError, match="changed by a relative"):
        require_same_outputs([off], model, x, 1, "test")


def test_the_report_says_how_the_model_was_read() -> None:
    whole, parts = Optional().eval(), Chooses().eval()
    assert fxexpand.report(fxexpand.fuse(whole)).traced == "as one graph"
    report = fxexpand.report(fxexpand.fuse(parts))
    assert report.traced.startswith("in parts, 1 of them a graph; the whole has none: ")
    assert report.to_dict()["traced"] == report.traced and report.traced in str(report)


def test_a_model_that_keeps_what_an_inference_made() -> None:
    class Positions(nn.Module):
        """Makes its positions when it first runs, as ConViT does."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Any:
            if not hasattr(self, "places"):
                self.register_buffer("places", torch.linspace(0, 1, x.shape[-1]), persistent=False)
            return self.linear(self.norm(x + self.get_buffer("places")))

    model, x = Positions().eval(), torch.randn(3, 6)
    with torch.inference_mode():
        expected = model(x)
    assert model.get_buffer("places").is_inference()
    assert_same(fxexpand.fuse(model, x)(x), expected.clone(), 1e-6)
    assert_same(fxexpand.expand(model, example_inputs=x)(x), expected.clone(), 1e-6)
