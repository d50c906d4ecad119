"""FLOP counts against sums done by hand: two per multiply-add."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxexpand.reporting.table import short, table
from fxexpand.running.flops import count_flops


class Twice(nn.Module):
    """A layer of two inputs, given one twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x, x)
        return result


DEVICES = ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("build", "shape", "expected"),
    [
        (lambda: nn.Linear(5, 7), (2, 3, 5), 2 * (2 * 3) * 5 * 7),
        (lambda: nn.Linear(5, 7), (5,), 2 * 5 * 7),
        # 9 channels, each from 6/3 = 2 channels of 3 x 2 taps, at 5 x 7 positions
        (
            lambda: nn.Conv2d(6, 9, (3, 2), (2, 1), (1, 0), groups=3),
            (2, 6, 10, 8),
            2 * 2 * 9 * (2 * 6) * 5 * 7,
        ),
        (lambda: nn.Conv1d(4, 4, 3, dilation=2, groups=4), (2, 4, 10), 2 * 2 * 4 * 3 * 6),
        (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6), 2 * 3 * (2 * 8) * 3 * 4 * 5),
        # every input position meets every tap of a transposed kernel once
        (lambda: nn.ConvTranspose2d(6, 4, 3, 2, groups=2), (2, 6, 4, 5), 2 * 2 * 6 * (2 * 9) * 4 * 5),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), (3, 4), 0),
        (lambda: Twice(nn.Bilinear(4, 4, 5)), (3, 4), 2 * 3 * 5 * (4 * 4 + 4)),
    ],
)
def test_one_layer(
    device: str, build: Callable[[], nn.Module], shape: tuple[int, ...], expected: int
) -> None:
    assert count_flops(build().to(device), torch.randn(shape, device=device)).total == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_count_on_every_device(
    device: str, kind: Callable[..., nn.Module], gates: int
) -> None:
    model = kind(5, 7, num_layers=2, bidirectional=True, batch_first=True, device=device)
    first, second = (5 + 7) * 7 * gates, (2 * 7 + 7) * 7 * gates
    positions = 3 * 11
    assert count_flops(model, torch.randn(3, 11, 5, device=device)).total == 2 * positions * 2 * (
        first + second
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_transformer_layer_is_counted(device: str, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, device=device).train(training)
    batch, length, width, hidden = 3, 11, 8, 16
    projections = 4 * width * width + 2 * width * hidden
    attention = 2 * length * width  # scores and the weighted sum, per position
    expected = 2 * batch * length * (projections + attention)
    report = count_flops(layer, torch.randn(batch, length, width, device=device))
    assert report.total == expected
    assert report.by_module["linear1"] == 2 * batch * length * width * hidden
    assert report.by_module["self_attn"] == 2 * batch * length * (4 * width * width + attention)


def test_functional_attention() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    report = count_flops(Attention(), {"q": q, "k": k, "v": k})
    assert report.total == report.own[""] == 2 * (2 * 3) * (5 * 7 * 8 + 5 * 7 * 8)


class Network(nn.Module):
    """A conv used twice, a head called from its sibling, a tied weight, and statistics to disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.twice = nn.Conv2d(4, 4, 1)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 6, bias=False), "b": nn.Linear(4, 6, bias=False)})
        self.heads["b"].weight = self.heads["a"].weight
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x))).mean((2, 3))
        tied = self.heads["b"].weight
        assert isinstance(tied, Tensor)
        out: Tensor = self.drop(self.heads["a"](x)) + x @ tied.T
        return out


def test_each_flop_has_one_owner() -> None:
    x = torch.randn(2, 3, 6, 5)
    report = count_flops(Network(), x)
    stem, twice, head = 2 * 2 * 30 * 4 * 27, 2 * (2 * 2 * 30 * 16), 2 * 2 * 4 * 6
    assert report.own == {
        "": head,  # x @ weight belongs to the network itself
        "stem": 0,
        "stem.0": stem,
        "stem.1": 0,
        "twice": twice,
        "heads": 0,
        "heads.a": head,
        "heads.b": 0,
        "drop": 0,
    }
    assert report.by_module[""] == report.total == sum(report.by_operator.values()) == stem + twice + 2 * head
    assert report.by_module["stem"] == stem
    assert report.by_operator["aten.convolution"] == stem + twice
    assert report.parameters == 4 * 27 + 4 + 8 + 16 + 4 + 24


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_no_trace(training: bool) -> None:
    model = Network().train(training)
    model.drop.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    count_flops(model, torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1)))
    assert model.training is training and not model.drop.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_fails_leaves_no_trace_either() -> None:
    model = Network().train()
    with pytest.raises(RuntimeError):
        count_flops(model, torch.randn(2, 5, 6, 5))
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()
    assert count_flops(model, torch.randn(1, 3, 4, 5)).total > 0


def test_a_compiled_model_counts_as_the_model_it_wraps() -> None:
    model, x = Network(), torch.randn(2, 3, 6, 5)
    plain = count_flops(model, x)
    assert count_flops(torch.compile(model), x) == plain  # type: ignore[arg-type]
    model.compile()
    assert count_flops(model, x) == plain


def test_a_comparison_shows_the_layer_that_was_replaced() -> None:
    def network(second: nn.Module, *more: nn.Module) -> nn.Module:
        body = nn.Sequential(nn.Conv2d(3, 4, 1), second, *more)
        return nn.Sequential(body, nn.Flatten(), nn.LazyLinear(2))

    x = torch.randn(1, 3, 4, 5)
    plain = network(nn.Conv2d(4, 4, 3, padding=1))
    chain = network(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)))
    longer = network(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    for model in (plain, chain, longer):
        model(x)
    one, two, three = (count_flops(model, x) for model in (plain, chain, longer))

    before, after = 2 * 20 * 4 * 36, 2 * 20 * (8 * 36 + 4 * 8)
    replaced = one.compare(two)
    assert [(c.path, c.before, c.after) for c in replaced.changes] == [("0.1", before, after)]
    assert (replaced.before, replaced.after) == (one.total, two.total)
    assert [(c.path, c.before, c.after) for c in two.compare(one).changes] == [("0.1", after, before)]
    assert [(c.path, c.before, c.after) for c in one.compare(three).changes] == [("0.2", 0, 2 * 20 * 16)]
    assert one.compare(one).changes == ()
    assert "2.22x" in str(replaced) and "0.1" in str(replaced)
    assert json.loads(json.dumps(replaced.to_dict()))["changes"][0]["after"] == after


def test_a_report_prints_and_serialises() -> None:
    report = count_flops(Network(), torch.randn(2, 3, 6, 5))
    text = str(report)
    assert "stem.0" in text and "aten.convolution" in text and "stem.1" not in text
    plain: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    assert plain["total"] == report.total and plain["by_module"]["twice"] == report.own["twice"]
    assert "total" in str(count_flops(nn.ReLU(), torch.randn(2)))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (999_600, "1.00 M"),
        (1814073344, "1.81 G"),
        (25.5e6, "25.5 M"),
    ],
)
def test_short_numbers(count: float, text: str) -> None:
    assert short(count) == text


def test_tables_align() -> None:
    assert table(("a", "bb"), [("xyz", "1"), ("", "22")]) == "a    bb\n---  --\nxyz   1\n     22"


def test_a_parameter_that_is_the_input_of_a_module() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 4))
            self.layer = nn.Sequential(nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(self.token) + self.layer(x)
            return result

    model = Token()
    model.layer[0].bias.requires_grad_(False)
    assert count_flops(model, torch.rand(5, 4)).total == 2 * 4 * 3 * 6
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]


def test_inputs_are_as_before() -> None:
    """A model that starts with an operator in place writes to what it is given."""
    x = torch.randn(4, 6)
    before = x.clone()
    count_flops(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2)), x)
    assert torch.equal(x, before)


class Applied(nn.Module):
    """A function of a weight (8, 6) and an input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight, x)


@pytest.mark.parametrize(
    ("function", "shape", "flops"),
    [
        (lambda w, x: torch.addbmm(torch.zeros(4, 6), x, w.expand(3, 8, 6)), (3, 4, 8), 2 * 3 * 4 * 8 * 6),
        (lambda w, x: torch.vdot(w[0], x), (6,), 2 * 6),
        (
            lambda w, x: torch.conv_tbc(x, w.reshape(2, 4, 6), torch.zeros(6)),
            (5, 3, 4),
            2 * 4 * 3 * 6 * 2 * 4,
        ),
    ],
    ids=["addbmm", "vdot", "conv_tbc"],
)
def test_products_that_the_counter_passes_over(
    function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], flops: int
) -> None:
    assert count_flops(Applied(function), torch.randn(shape)).total == flops


def test_a_model_that_takes_gradients_itself() -> None:
    """A force is the gradient of an energy: one product there, and one back."""

    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                places = x.detach().requires_grad_()
                [force] = torch.autograd.grad(self.energy(places).sum(), places)
            return force

    model = Force()
    assert count_flops(model, torch.randn(5, 8)).by_module == {"": 480, "energy": 240}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(8, 3)
    assert count_flops(model, torch.randn(5, 8)).total == 240
    assert model.weight.requires_grad
