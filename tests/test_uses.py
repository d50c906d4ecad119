"""Which parameters are weights of linear maps: from the forward's graph, and from a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxexpand.passes.uses import UnknownUse, Use, observed_uses, parameter_uses

X = torch.randn(2, 5, 4)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Holder(nn.Module):
    """A module with a parameter ``w`` and the given forward."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = parameter(*shape)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


LINEAR = Use("linear", "linear")
CASES: dict[str, tuple[tuple[int, ...], Callable[[Any, Tensor], Tensor], Use]] = {
    "linear": ((3, 4), lambda m, x: F.linear(x, m.w), LINEAR),
    "keyword": ((3, 4), lambda m, x: F.linear(x, weight=m.w), LINEAR),
    "linear of a transpose": ((4, 3), lambda m, x: F.linear(x, m.w.t()), Use("linear", "linear", True)),
    "as the input": ((2, 4), lambda m, x: F.linear(m.w, x[0]), Use("other", "linear")),
    "x @ w": ((4, 3), lambda m, x: x @ m.w, Use("matmul", "matmul", True)),
    "x @ w.T": ((3, 4), lambda m, x: x @ m.w.T, Use("matmul", "matmul")),
    "w @ x": ((3, 5), lambda m, x: m.w @ x, Use("matmul", "matmul")),
    "x.matmul": ((4, 3), lambda m, x: x.matmul(m.w), Use("matmul", "matmul", True)),
    "batched": ((2, 4, 3), lambda m, x: torch.bmm(x, m.w), Use("matmul", "bmm", True)),
    "permuted": ((2, 3, 4), lambda m, x: torch.bmm(x, m.w.permute(0, 2, 1)), Use("matmul", "bmm")),
    "swapped": ((2, 3, 4), lambda m, x: torch.bmm(x, m.w.transpose(-1, -2)), Use("matmul", "bmm")),
    "swapped elsewhere": (
        (4, 2, 3),
        lambda m, x: torch.bmm(x, m.w.transpose(0, 1)),
        Use("matmul", "bmm", True),
    ),
    "addmm": ((4, 3), lambda m, x: torch.addmm(torch.zeros(3), x[0], m.w), Use("matmul", "addmm", True)),
    "einsum": ((4, 3), lambda m, x: torch.einsum("bnd, dk -> bnk", x, m.w), Use("einsum", "einsum", True)),
    "einsum out in": ((3, 4), lambda m, x: torch.einsum("bnd,kd", x, m.w), Use("einsum", "einsum")),
    "einsum of heads": (
        (2, 3, 4),
        lambda m, x: torch.einsum("...d,hkd->...hk", x, m.w),
        Use("einsum", "einsum"),
    ),
    "einsum scaling": ((5, 4), lambda m, x: torch.einsum("bnd,nd->bnd", x, m.w), Use("other", "einsum")),
    "tensordot": ((4, 3), lambda m, x: torch.tensordot(x, m.w, 1), Use("tensordot", "tensordot", True)),
    "conv": ((3, 5, 2), lambda m, x: F.conv1d(x, m.w), Use("conv", "conv1d")),
    "conv_transpose": (
        (5, 3, 2),
        lambda m, x: F.conv_transpose1d(x, m.w),
        Use("conv_transpose", "conv_transpose1d"),
    ),
    "bilinear": ((3, 4, 4), lambda m, x: F.bilinear(x, x, m.w), Use("bilinear", "bilinear")),
    "embedding": ((9, 3), lambda m, x: F.embedding(x.long() % 9, m.w), Use("embedding", "embedding", True)),
    "a part": ((9, 4), lambda m, x: F.linear(x, m.w[3:6]), LINEAR),
    "parts": ((9, 4), lambda m, x: F.linear(x, m.w.chunk(3)[1]) + F.linear(x, m.w.split(3)[0]), LINEAR),
    "joined": ((3, 4), lambda m, x: F.linear(x, torch.cat([m.w, torch.zeros(2, 4)])), LINEAR),
    "cast and scaled": ((3, 4), lambda m, x: F.linear(x, (m.w * 0.1).to(x.dtype)), LINEAR),
    "scaled by the input": ((3, 4), lambda m, x: F.linear(x, m.w * x[0, 0]), LINEAR),
    "normalised": ((3, 4), lambda m, x: F.linear(x, F.normalize(m.w, dim=1)), LINEAR),
    "standardised": (
        (3, 5, 2),
        lambda m, x: F.conv1d(x, (m.w - m.w.mean((1, 2), keepdim=True)) / (m.w.std() + 1e-5)),
        Use("conv", "conv1d"),
    ),
    "sized by the input": ((3, 4), lambda m, x: F.linear(x, m.w.expand(3, x.shape[2])), LINEAR),
    "position": ((5, 4), lambda m, x: x + m.w, Use("other", "add")),
    "expanded position": ((1, 5, 4), lambda m, x: x + m.w.expand(x.shape[0], -1, -1), Use("other", "add")),
    "scale": ((5, 4), lambda m, x: x * m.w, Use("other", "mul")),
    "scale, then a product": ((5, 4), lambda m, x: (x * m.w) @ torch.ones(4, 3), Use("other", "mul")),
    "looked up": ((9, 4), lambda m, x: m.w[(x.long() % 9)[..., 0]], Use("other", "getitem")),
    "statistic": ((3, 4), lambda m, x: x * m.w.mean(), Use("other", "mean")),
    "returned": ((3, 4), lambda m, x: m.w.t(), Use("other", "output")),
    "shape only": ((3, 4), lambda m, x: x * m.w.shape[0], Use("unused", "nothing")),
    "unused": ((3, 4), lambda m, x: x, Use("unused", "nothing")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_use_is_read_off_the_graph(case: str) -> None:
    shape, function, expected = CASES[case]
    assert parameter_uses(Holder(shape, function)) == {"w": expected}


@pytest.mark.parametrize("case", [case for case in CASES if case != "returned"])
def test_a_run_shows_the_same_use(case: str) -> None:
    shape, function, expected = CASES[case]
    assert observed_uses(Holder(shape, function), X) == {"w": expected}


class Mixed(nn.Module):
    """A weight with a gain, lists of parameters, a child's weight used past the child, and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.called = nn.Linear(12, 4)
        self.weight = parameter(4, 4)
        self.gain = parameter(4, 1)
        self.again = self.weight
        self.down, self.up = parameter(2, 4), parameter(4, 2)
        self.ws = nn.ParameterList([parameter(4, 4), parameter(4, 4)])
        self.named = nn.ParameterDict({"a": parameter(4, 4), "b": parameter(5, 4)})
        self.bias = parameter(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(F.linear(x, self.qkv.weight, torch.cat((self.bias[:4], self.bias[4:]))))
        x = F.linear(x, self.gain * F.normalize(self.weight)) + F.linear(x, self.again + self.up @ self.down)
        for w in self.ws:
            x = x @ w
        y: Tensor = F.linear(x, self.named["a"]) + self.named["b"]
        return y


EXPECTED = {
    "weight": LINEAR,
    "again": LINEAR,
    "gain": Use("other", "mul"),
    "down": Use("matmul", "matmul", True),
    "up": Use("matmul", "matmul"),
    "ws.0": Use("matmul", "matmul", True),
    "ws.1": Use("matmul", "matmul", True),
    "named.a": LINEAR,
    "named.b": Use("other", "add"),
    "qkv.weight": LINEAR,
}


def test_own_parameters_and_those_read_past_a_child() -> None:
    assert parameter_uses(Mixed()) == EXPECTED


def test_a_run_names_every_parameter_of_the_model() -> None:
    uses = observed_uses(nn.Sequential(Mixed(), nn.LSTM(4, 3)), X)
    recurrent = {f"1.weight_{which}_l0": Use("recurrent", "lstm") for which in ("ih", "hh")}
    inner = {f"0.{name}": use for name, use in EXPECTED.items()}
    assert uses == {**inner, "0.called.weight": LINEAR, **recurrent}


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = parameter(4, 4), parameter(4, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x @ self.a if x.sum() > 0 else x @ self.b


def test_a_forward_without_a_graph_is_an_error_with_the_reason() -> None:
    model = Branching()
    with pytest.raises(UnknownUse, match="control flow"):
        parameter_uses(model)
    assert isinstance(model.seen, Tensor)


def test_a_run_shows_what_it_took_and_leaves_no_trace() -> None:
    model = Branching().train()
    uses = observed_uses(model, {"x": X.abs()})
    assert uses == {"a": Use("matmul", "matmul", True), "b": Use("unused", "nothing")}
    assert model.training and float(model.seen) == 0.0


@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_layers_with_packed_weights(batch_first: bool) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, add_bias_kv=True)
    uses = observed_uses(attention, (X, X, X))
    packed = Use("attention", "multi_head_attention_forward")
    assert uses["in_proj_weight"] == uses["out_proj.weight"] == packed
    assert uses["bias_k"].kind == "other"
    cell = observed_uses(nn.GRUCell(4, 3), X[0])
    assert cell == {"weight_ih": Use("recurrent", "gru_cell"), "weight_hh": Use("recurrent", "gru_cell")}
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)
    kinds = {name: use.kind for name, use in observed_uses(layer, X).items()}
    assert kinds == {
        "self_attn.in_proj_weight": "attention",
        "self_attn.out_proj.weight": "attention",
        "linear1.weight": "linear",
        "linear2.weight": "linear",
    }


def test_a_view_kept_outside_the_parameters_is_known_by_its_storage() -> None:
    model = Holder((6, 4), lambda m, x: F.linear(x, m.half))
    model.half = model.w.detach()[:3]  # type: ignore[assignment]
    assert observed_uses(model, X) == {"w": LINEAR}


def test_lazy_and_other_modules_do_not_disturb() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LazyLinear(3)
            self.w = parameter(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ self.w  # type: ignore[no-any-return]

    assert parameter_uses(Lazy()) == {"w": Use("matmul", "matmul", True)}
    assert parameter_uses(nn.ReLU()) == {}


def test_functions_of_strangers_are_not_taken_for_torch_s() -> None:
    assert parameter_uses(Holder((3, 4), lambda m, x: linear(x, m.w)))["w"] == Use("other", "tests.linear")


@torch.fx.wrap
def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x[..., :3] * weight[:, 0]


def test_timm_s_weight_standardisation() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    conv = timm_layers.ScaledStdConv2d(4, 6, 3)
    expected = {"weight": Use("conv", "conv2d"), "gain": Use("other", "batch_norm")}
    assert observed_uses(conv, torch.randn(1, 4, 5, 5)) == expected
    assert parameter_uses(conv) == expected
