"""factorize as it is used: structures built again, ranks as numpy has them, inputs and random state kept."""

from __future__ import annotations

import copy
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import fxexpand
from fxexpand import RefusedError, SelectionError, TrainedRankPruning, UnusableWeightError, count_flops, cuts
from fxexpand.passes import Factorize
from tests.compare import assert_same
from tests.factored import of_rank, rows_of
from tests.networks import Writer

factorize: Any = fxexpand.factorize  # its options of the wrong types are what is tested, too


class Twice(nn.Module):
    """Two Linear layers of one weight; each has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).relu())
        return result


def vectors() -> Tensor:
    return torch.randn(2, 16)


def tokens() -> Tensor:
    return torch.randint(0, 11, (2, 5))


@pytest.mark.parametrize("bad", [0, -1, 0.5, True, "x", ("channel", 0), ("channel", 0.5), ("depth", 2), ()])
def test_a_mapping_holds_ranks_of_1_or_more(bad: Any) -> None:
    with pytest.raises(SelectionError, match=r"rank: 0: .*give a rank of 1 or more"):
        factorize(nn.Sequential(nn.Linear(9, 9)), rank={"0": bad})
    with pytest.raises(SelectionError, match="no layer of that name"):
        factorize(nn.Sequential(nn.Linear(9, 9)), rank=MappingProxyType({"1": 2}))


@pytest.mark.parametrize("name", ["flops", "params"])
def test_a_share_is_at_most_1_and_a_number_may_be_numpys(name: str) -> None:
    """Half of a count is a float: as a share it would be met by any model, and nothing would be cut."""
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), torch.randn(1, 32)
    for bad in (1500.0, 1.01, float("inf"), float("nan"), True, "0.5"):
        with pytest.raises(SelectionError, match=rf"{name}={bad}: give a share .*\(0, 1\], or a number"):
            factorize(model, x, **{name: bad})
    expected = cuts(factorize(model, x, **{name: 1500}))
    assert expected and cuts(factorize(model, x, **{name: np.int64(1500)})) == expected
    assert cuts(factorize(model, rank=np.int64(3)))["0"].rank == 3
    for wrong in (True, [3]):
        with pytest.raises(SelectionError, match=r"choose an int, a share, a mapping"):
            factorize(model, rank=wrong)


@pytest.mark.parametrize("options", [{"rank": 4}, {"latency": 0.9}], ids=str)
def test_inputs_and_random_state_are_as_before(options: dict[str, float]) -> None:
    model, x = nn.Sequential(Writer(), nn.Linear(64, 2048)), torch.randn(64, 64)
    before, state = x.clone(), torch.get_rng_state()
    with suppress(SelectionError):  # so small a model may miss a budget of time
        factorize(model, x, **options)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("hook", ["prune", "weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_that_a_hook_computes_is_not_projected(hook: str) -> None:
    model: Any = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    if hook == "prune":
        prune.l1_unstructured(model[1], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    else:
        nn.utils.weight_norm(model[1])
    assert TrainedRankPruning(model).names == ["2"]
    small = factorize(model, rank=2)
    assert rows_of(small)["1"].action == "refused" and list(cuts(small)) == ["0", "2", "3"]


class Masked(nn.Module):
    """Scores of which some are -inf, and complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.linear(x)
        return scores.masked_fill(torch.eye(8, dtype=torch.bool), float("-inf")), torch.fft.fft(scores)


def test_the_error_of_the_outputs_is_measured_where_they_are_numbers() -> None:
    model, x = Masked(), torch.randn(8, 8)
    small = factorize(model, x, rank=3)
    lost = whole = 0.0
    with torch.no_grad():
        for before, after in zip(model(x), small(x), strict=True):
            kept = before.isfinite()
            lost += float((after - before)[kept].abs().square().sum())
            whole += float(before[kept].abs().square().sum())
    found: Any = fxexpand.report(small)
    assert found.output_error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)


def test_a_calibration_without_numbers_is_an_error() -> None:
    """None of these may pass for a calibration: the weights alone would decide, and nothing would say so."""
    model, x = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9)), torch.randn(20, 9)
    used_up = iter([x])
    list(used_up)
    nothing: Any
    for nothing in ([], used_up):
        with pytest.raises(SelectionError, match="calibration: no batches"):
            factorize(model, rank=2, calibration=nothing)
    for value in (float("nan"), float("inf")):
        with pytest.raises(SelectionError, match="calibration: the inputs of 0 hold NaN or Inf"):
            factorize(model, rank=2, calibration=[x, torch.full((1, 9), value)])
    expected = factorize(model, rank=2, calibration=[x]).state_dict()
    with_empty = factorize(model, rank=2, calibration=[x, x[:0]]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in with_empty.items())


def test_a_lazy_layer_is_refused_and_the_others_are_factored() -> None:
    model = nn.Sequential(nn.LazyLinear(9), nn.Linear(9, 9))
    for options in ({"rank": 2}, {"params": 50}):
        small = factorize(model, **options)
        assert "lazy" in rows_of(small)["0"].reason and list(cuts(small)) == ["1"]


def test_a_weight_is_not_assigned_beside_the_factors() -> None:
    """It would be kept, saved, and never read."""
    model = factorize(nn.Sequential(nn.Linear(9, 9)), rank=2)
    for name in ("weight", "bias"):
        for value in (nn.Parameter(torch.zeros(9, 9)), None):
            with pytest.raises(AttributeError, match=f"FactorizedLinear.{name} is that of the factors"):
                setattr(model[0], name, value)
    assert list(model.state_dict()) == ["0.0.weight", "0.1.weight", "0.1.bias"]


@pytest.mark.parametrize("layer", [nn.Linear(9, 9), nn.Embedding(9, 9)])
def test_the_weight_of_a_factored_layer_cannot_be_parametrized(layer: nn.Module) -> None:
    """The forward would never read it."""
    model = factorize(nn.Sequential(layer), rank=2)
    with pytest.raises(AttributeError, match=r"weight: is computed from the factors \(0 and 1\)"):
        torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert type(model[0]).__name__.startswith("Factorized") and "weight" not in dict(
        model[0].named_children()
    )


def test_a_checkpoint_with_nan_is_an_error_that_names_it() -> None:
    model = nn.Sequential(nn.Linear(9, 9))
    small, broken = factorize(model, rank=2), dict(model.state_dict())
    broken["0.weight"] = broken["0.weight"] * float("nan")
    with pytest.raises(UnusableWeightError, match=r"^0\.weight \(Linear\): holds NaN or Inf"):
        small.load_state_dict(broken)


def test_a_layer_costs_what_it_computes_whatever_a_hook_makes_of_it() -> None:
    """Sizes are those of the layer's own output: a hook that pools it, or wraps it, changes nothing."""
    x = torch.randn(2, 8, 16, 16)
    for hook in (lambda _m, _x, y: y.mean((2, 3), keepdim=True), lambda _m, _x, y: [y]):
        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False))
        model[0].register_forward_hook(hook)
        small = factorize(model, x, rank=2)
        row = rows_of(small)["0"]
        assert row.flops_before == count_flops(model, x).total == 2 * 8 * 72 * 2 * 256
        assert row.flops_after == count_flops(small, x).total


class Scaled(nn.Module):
    """A parameter and a buffer that others put on a layer, and read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(9, 9)
        self.inner.register_parameter("scale", nn.Parameter(torch.rand(9)))
        self.inner.register_buffer("mask", torch.ones(9))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x) * self.inner.scale * self.inner.mask
        return result


def test_what_others_put_on_a_layer_stays() -> None:
    model, x = Scaled().double(), torch.randn(4, 9, dtype=torch.float64)
    of_rank(model.inner, 2)
    small: Any = factorize(model, x, rank=2, strict=True)
    assert_same(small(x), model(x), 1e-12)
    own = {"inner.scale", "inner.mask", "inner.0.weight", "inner.1.weight", "inner.1.bias"}
    assert own == small.state_dict().keys()
    small(x).sum().backward()
    assert small.inner.scale.grad is not None
    assert fxexpand.report(small).to_dict()["params_after"] == sum(p.numel() for p in small.parameters())
    result = Factorize(rank=2)(symbolic_trace(model))
    assert_same(result.graph_module(x), model(x), 1e-12)


class Decoder(nn.Module):
    """The table is also the matrix of the scores, by a function; a hook keeps a layer's weight small."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.small = nn.Embedding(40, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.small.register_forward_pre_hook(self.shorten)

    @staticmethod
    def shorten(layer: Any, _: Any) -> None:
        with torch.no_grad():
            layer.weight.clamp_(-0.01, 0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.inner(self.table(tokens).to(self.inner.weight.dtype))
        return torch.nn.functional.linear(y + self.small(y), self.table.weight)


@pytest.mark.parametrize("options", [{"rank": 2}, {"params": 0.9}, {"flops": 0.95}, {"energy": 0.5}], ids=str)
def test_a_weight_that_is_read_outside_of_its_layer_is_refused(options: dict[str, float]) -> None:
    """Multiplied out in each forward it would cost more than ever; what is written to it would be lost."""
    model, tokens = Decoder().eval(), torch.randint(0, 40, (2, 5))
    small = factorize(model, tokens, **options)
    rows = rows_of(small)
    for name in ("table.weight", "small"):
        assert rows[name].action == "refused" and "read outside" in rows[name].reason
    assert list(cuts(small)) == ["inner"]
    found: Any = fxexpand.report(small)
    assert found.flops_after == count_flops(small, tokens).total < count_flops(model, tokens).total
    with pytest.raises(RefusedError, match="Call the layer"):
        factorize(model, tokens, strict=True, **options)


class ByKeyword(nn.Module):
    """Calls its layers by the name that their input has in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.conv = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Conv2d(8, 8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.linear(input=self.table(input=tokens)).mT
        result: Tensor = self.conv(input=x[..., None].expand(-1, -1, -1, 5))
        return result


def test_a_factored_layer_is_called_by_keyword_as_before() -> None:
    model, tokens = ByKeyword().double(), torch.randint(0, 30, (2, 5))
    assert isinstance(model.table, nn.Embedding) and isinstance(model.linear, nn.Linear)
    for layer in (model.table, model.linear, model.conv):
        of_rank(layer, 2)
    small = factorize(model, tokens, rank=2, scheme="channel", strict=True)
    assert len(cuts(small)) == 3
    assert_same(small(tokens), model(tokens), 1e-12)
    assert rows_of(small)["linear"].flops_before == 2 * 8 * 8 * 10
    result = Factorize(rank=2, scheme="channel")(symbolic_trace(model))
    assert result.modified
    assert_same(result.graph_module(tokens), model(tokens), 1e-12)


@pytest.mark.usefixtures("even_clock")
@pytest.mark.parametrize("budget", [{"flops": 0.6}, {"latency": 0.6}], ids=str)
def test_what_a_budget_cannot_see_is_left_and_says_why(budget: dict[str, float]) -> None:
    """A table costs no FLOPs and no time to speak of: it is no failure, and strict passes."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.wide, self.idle = nn.Embedding(50, 512), nn.Linear(512, 2048), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.wide(self.table(x))
            return result

    small = factorize(Both(), torch.randint(0, 50, (8, 16)), strict=True, **budget)
    rows = rows_of(small)
    assert rows["table.weight"].action == "left" and "look-up" in rows["table.weight"].reason
    assert rows["idle"].action == "left" and "not called" in rows["idle"].reason
    assert list(cuts(small)) == ["wide"]


@pytest.mark.usefixtures("even_clock")
def test_a_layer_that_is_called_often_has_the_time_of_all_its_calls() -> None:
    """As the one block of ALBERT: of a single call, most of the time would be out of reach."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(768, 768)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(8):
                x = self.block(x)
            return x

    small = factorize(Again(), torch.randn(64, 768), latency=0.6)
    assert list(cuts(small)) == ["block"]


@pytest.mark.usefixtures("even_clock")
def test_shared_weights_are_not_timed_and_say_so() -> None:
    class Wide(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.slow = nn.Linear(1024, 2048)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(self.slow(x)[:, :16])
            return result

    small = factorize(Wide(), torch.randn(64, 1024), latency=0.8, strict=True)
    assert "shared" in rows_of(small)["first.weight"].reason and list(cuts(small)) == ["slow"]


class Asks(nn.Module):
    """As T5 and CLIP of transformers do: the inputs get the dtype of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 32, 3, padding=1), nn.Embedding(32, 24)
        self.inner = nn.Linear(24, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.to(self.conv.weight.dtype)).amax((2, 3)).argmax(1)
        y = self.table(y).to(self.inner.weight.device, self.inner.weight.dtype)
        result: Tensor = self.inner(y) * self.table.weight.shape[1] + self.inner.weight.ndim
        return result


class Encoder(nn.TransformerEncoder):
    """In evaluation it hands its weights to a kernel that does the whole layer."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 48, dropout=0.0, batch_first=True)
        super().__init__(layer, 2)


@pytest.mark.parametrize(
    ("make", "inputs"), [(Asks, lambda: torch.randn(4, 3, 6, 6)), (Encoder, lambda: torch.randn(2, 5, 16))]
)
def test_a_weight_that_is_asked_for_its_dtype_is_not_multiplied_out(make: Any, inputs: Any) -> None:
    """That would cost more than the layer did; counted as it runs, without hooks. (Attention is no operator
    that is counted there.)"""
    x = inputs()
    small = factorize(make().eval(), x, rank=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = small(x)
    done = [row.flops_after for row in rows_of(small).values() if row.action == "factorized"]
    assert len(done) >= 3 and counter.get_total_flops() == sum(done)
    assert_same(y, small(x), 1e-5)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 6, (3, 5)), torch.randn(2, 4, 7, 7)),
        (nn.Conv2d(4, 6, (3, 5), 2, 1, groups=2, padding_mode="circular"), torch.randn(2, 4, 7, 7)),
        (nn.Linear(9, 8), torch.randn(2, 9)),
        (nn.Embedding(30, 5), torch.randint(0, 30, (2, 3))),
    ],
    ids=["conv2d", "conv2d, grouped, strided, circular", "linear", "table"],
)
def test_the_effective_weight_is_a_tensor_in_every_way(layer: Any, x: Tensor) -> None:
    layer = copy.deepcopy(layer).double()
    x = x.double() if x.is_floating_point() else x
    small: Any = factorize(nn.Sequential(layer), rank=2, strict=True)[0]
    first, second = (part.weight for part in small._modules.values())
    weight = small.weight
    assert isinstance(weight, Tensor) and weight.shape == layer.weight.shape
    assert (weight.dtype, weight.device, weight.requires_grad) == (torch.float64, first.device, True)
    wanted = weight.detach()
    layer.weight.data = wanted
    assert_same(small(x), layer(x), 1e-12)
    assert type(wanted.clone()) is Tensor and repr(weight).startswith("tensor(")
    assert_same(torch.stack(list(weight)), wanted, 0.0)
    assert_same(torch.as_tensor(weight.detach().numpy().copy()), wanted, 0.0)
    assert_same(copy.deepcopy(weight.detach()), wanted, 0.0)
    (weight * wanted).sum().backward()  # type: ignore[no-untyped-call]
    assert first.grad is not None and second.grad is not None
    with torch.no_grad():
        first.mul_(2.0)
        assert_same(small.weight, 2 * wanted, 1e-12)
        assert not small.weight.requires_grad
    assert not small.requires_grad_(False).weight.requires_grad
