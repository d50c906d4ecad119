"""Networks that break naive surgery; each is expanded exactly, or refused with the true reason."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxexpand
from fxexpand import Chain, RefusedError, SelectionError, expand, fuse, report
from fxexpand.layers.expanded import Expanded
from tests.compare import assert_same
from tests.networks import ConvNet, StandardisedConv2d, fresh, train_steps

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def refusals(model: Any) -> dict[str, str]:
    return {row.site: row.reason for row in report(model).refusals}


def assert_round_trip(model: Any, x: Any, **options: Any) -> Any:
    """Expand, compare, train, fuse, compare; the expanded network."""
    reference = fresh(model)
    big = expand(model, **options)
    assert_same(big(x), reference(x), rel=1e-10)
    train_steps(big, x)
    small = fuse(big, scope="expanded")
    assert list(small.state_dict()) == list(reference.state_dict())
    fresh(reference).load_state_dict(small.state_dict())
    assert_same(small(x), big(x), rel=1e-10)
    assert [type(m) for m in small.modules()] == [type(m) for m in reference.modules()]
    return big


def test_a_module_called_twice_is_one_expansion() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(torch.tanh(self.layer(x)))
            return result

    big = assert_round_trip(Twice().double(), X)
    assert len(report(big).changed) == 1


def test_a_module_under_two_names_stays_one_module() -> None:
    layer = nn.Linear(6, 6)
    model: Any = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.Tanh())}).double()
    big = expand(model)
    assert big["a"] is big["b"][0]
    assert len(report(big).changed) == 1
    small = fuse(big, scope="expanded")
    assert small["a"] is small["b"][0]
    assert list(small.state_dict()) == list(model.state_dict())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.table = nn.Embedding(6, 6)
        self.b.weight = self.a.weight
        self.table.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.tanh(self.a(x))) + self.table(torch.arange(4))
        return result


def test_a_weight_tied_across_modules_and_types_stays_tied() -> None:
    big = assert_round_trip(Tied().double(), X)
    assert len(report(big).changed) == 1
    assert torch.equal(big.a.weight, big.table.weight)
    assert sum(p.numel() for p in big.parameters()) == 12 * 6 + 12 * 12 + 6 * 12 + 6
    small = fuse(big, scope="expanded")
    assert small.a.weight is small.b.weight is small.table.weight


def test_a_weight_read_by_its_parent() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(6, 18, bias=False)
            self.q_bias = nn.Parameter(torch.randn(6))
            self.v_bias = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
            return F.linear(x, self.qkv.weight, bias)

    assert_round_trip(Packed().double(), X)


@pytest.mark.parametrize("where", ["module", "attribute"])
def test_a_subclass_with_its_own_forward(where: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2.0, self.bias)

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_round_trip(nn.Sequential(Doubled(6, 4)).double(), X)
    assert_round_trip(StandardisedConv2d(3, 4, 3).double(), x)
    if where == "attribute":
        layer: Any = nn.Linear(6, 4).double()
        layer.forward = lambda x: F.linear(x, layer.weight) * 3.0
        big = expand(layer, inplace=True)
        assert not isinstance(big, Expanded)
        assert_same(big(X), F.linear(X, big.weight) * 3.0, rel=0.0)


def test_hooks_stay_and_see_what_they_saw() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
    seen: list[tuple[str, Tensor]] = []

    def record(module: nn.Module, into: Any, out: Any) -> None:
        seen.append(("grad", out[0]))

    model[0].register_forward_pre_hook(lambda m, args: seen.append(("pre", args[0])))
    model[0].register_forward_hook(lambda m, args, out: out * 2.0)
    model[0].register_full_backward_hook(record)
    reference = fresh(model)
    x = X.clone().requires_grad_()
    expected = reference(x)
    expected.sum().backward()
    wanted = list(seen)
    seen.clear()
    big = expand(model)
    output = big(x)
    output.sum().backward()
    assert_same(output, expected, rel=1e-12)
    assert [kind for kind, _ in seen] == [kind for kind, _ in wanted] == ["pre", "grad"]
    for (_, a), (_, b) in zip(seen, wanted, strict=True):
        assert_same(a, b, rel=1e-10)
    assert len(fuse(big, scope="expanded")[0]._forward_hooks) == 1


def test_normed_weights_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        legacy = nn.Sequential(
            torch.nn.utils.weight_norm(nn.Linear(6, 5)), torch.nn.utils.spectral_norm(nn.Linear(5, 4))
        )
    current = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)),
    )
    for model, words in ((legacy, "hook"), (current, "parametrize")):
        model = model.double().eval()
        expected = model(X)
        big = expand(model)
        assert_same(big(X), expected, rel=0.0)
        assert set(refusals(big)) >= {"0", "1"} and all(words in refusals(big)[name] for name in ("0", "1"))
        with pytest.raises(RefusedError, match=r"^0 \(.*not changed: .*Norm"):
            expand(model, strict=True)


def test_a_parametrized_neighbour_survives_the_round_trip() -> None:
    layer = nn.LSTM(6, 5, batch_first=True).double()
    nn.utils.parametrizations.weight_norm(layer, "weight_ih_l0")
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = layer(x)[0]
    big = expand(layer)
    assert {row.site for row in report(big).changed} == {"weight_hh_l0"}
    assert_same(big(x)[0], expected, rel=1e-10)
    small = fuse(big, scope="expanded")
    assert_same(small(x)[0], expected, rel=1e-10)
    assert_same(big(x)[0], expected, rel=1e-10)
    assert list(small.state_dict()) == list(layer.state_dict())


def test_frozen_parameters_stay_frozen() -> None:
    model = ConvNet()
    model.stem.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    big = expand(model)
    assert not any(p.requires_grad for p in big.stem.parameters())
    assert not big.head.bias.requires_grad and big.head.weight.requires_grad
    small = fuse(big, scope="expanded")
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


def test_parameters_that_cannot_be_factored_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyLinear(4)
            self.complex = nn.Linear(3, 3, dtype=torch.complex64)
            self.sparse = nn.Parameter(torch.eye(3).to_sparse())
            self.integers = nn.Parameter(torch.ones(2, 2, dtype=torch.int32), requires_grad=False)
            self.empty = nn.Parameter(torch.zeros(0, 4))
            self.plain = nn.Linear(3, 3)
            self.renormed = nn.Embedding(5, 3, max_norm=1.0)
            self.sparse_table = nn.Embedding(5, 3, sparse=True)
            self.padded = nn.Embedding(5, 3, padding_idx=1)
            nn.init.ones_(self.padded.weight)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = Odd()
    big = expand(model)
    found = refusals(big)
    words = {
        "lazy": "lazy",
        "complex": "complex",
        "sparse": "sparse tensor",
        "integers": "int32",
        "empty": "empty",
        "renormed": "max_norm",
        "sparse_table": "sparse gradients",
        "padded": "padding_idx",
    }
    for name, word in words.items():
        (site,) = [site for site in found if site.split(".")[0] == name]
        assert word in found[site]
    assert [row.site for row in report(big).changed] == ["plain"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantised_layers_are_refused() -> None:
    quantise: Any = torch.ao.quantization.quantize_dynamic
    quantised = quantise(nn.Sequential(nn.Linear(6, 5)), {nn.Linear})
    big = expand(nn.Sequential(quantised, nn.Linear(5, 4)))
    assert "quantised" in refusals(big)["0.0"]
    assert isinstance(big[1], Expanded)


def test_scripted_parts_are_refused_and_a_scripted_model_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(6, 5))
    with pytest.raises(fxexpand.FxExpandError, match="TorchScript"):
        expand(scripted)
    big = expand(nn.Sequential(scripted, nn.Linear(5, 4)))
    assert any("TorchScript" in reason for reason in refusals(big).values())
    assert isinstance(big[1], Expanded)


def test_compiled_and_wrapped_models_are_refused() -> None:
    compiled: Any = torch.compile(nn.Linear(3, 3))
    with pytest.raises(fxexpand.FxExpandError, match="compiled already"):
        expand(compiled)
    others: list[Any] = [3, None, [nn.Linear(2, 2)]]
    for given in others:
        with pytest.raises(SelectionError, match=r"give an nn\.Module"):
            expand(given)


def test_control_flow_does_not_matter() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                result: Tensor = self.a(x) + x @ self.w
                return result
            result = self.b(x)
            return result

    model = Branching().double()
    big = expand(model)
    assert {row.site for row in report(big).changed} == {"a", "b"}
    assert "cannot trace" in refusals(big)["w"] and "example_inputs" in refusals(big)["w"]
    for x in (X.abs(), -X.abs()):
        assert_same(big(x), model(x), rel=1e-10)
    watched = expand(model, example_inputs=X.abs())
    assert {row.site for row in report(watched).changed} == {"a", "b", "w"}
    assert_same(watched(X.abs()), model(X.abs()), rel=1e-10)


def test_a_root_that_is_a_layer_and_a_model_that_is_empty() -> None:
    big = assert_round_trip(nn.Linear(6, 4).double(), X)
    assert isinstance(big, Expanded) and report(big).changed[0].site == "Linear"
    assert_round_trip(nn.Embedding(6, 4).double(), torch.arange(3))
    for empty in (nn.Identity(), nn.Sequential(), nn.ReLU()):
        assert not report(expand(empty)).rows
        assert "no site" in str(report(expand(empty)))
        assert type(fuse(expand(empty), scope="expanded")) is type(empty)


def test_weights_in_any_memory_layout() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2)).double()
    model[0].weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64).t())
    model[2].to(memory_format=torch.channels_last)
    assert_round_trip(model, X)


def test_a_model_on_two_devices() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, device="meta"))
    big = expand(model)
    assert {p.device.type for p in big[0].parameters()} == {"cpu"}
    assert {p.device.type for p in big[1].parameters()} == {"meta"}
    small = fuse(big, scope="expanded")
    assert_same(small[0](X.float()), model[0](X.float()), rel=1e-5)
    assert small[1].weight.is_meta


def test_a_parameter_held_in_a_plain_attribute_is_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model.extra = [model[0].weight]
    big = expand(model)
    assert "plain attribute extra" in refusals(big)["0"]
    assert isinstance(big[1], Expanded)


def test_plain_parameters_by_use() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Parameter(torch.randn(4, 6))
            self.matmul = nn.Parameter(torch.randn(4, 5))
            self.einsum = nn.Parameter(torch.randn(2, 5, 3))
            self.position = nn.Parameter(torch.randn(2, 3))
            self.gain = nn.Parameter(torch.randn(3, 1, 1))
            self.list = nn.ParameterList([nn.Parameter(torch.randn(3, 3))])
            self.kernel = nn.Parameter(torch.randn(3, 1, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(F.linear(x, self.linear)) @ self.matmul
            x = torch.einsum("bi,gij->bgj", x, self.einsum).mean(1) + self.position.sum(0) + self.gain.view(3)
            return F.conv1d((x @ self.list[0]).unsqueeze(-1).expand(-1, -1, 4), self.kernel, groups=3)

    big = assert_round_trip(Plain().double(), X)
    actions = {row.site: row.action for row in report(big).rows}
    assert actions.pop("position") == actions.pop("gain") == "left"
    assert set(actions.values()) == {"expanded"} and len(actions) == 5
    reasons = {row.site: row.reason for row in report(big).rows}
    assert "used by sum" in reasons["position"] and "single row or column" in reasons["gain"]


def test_writing_to_an_expanded_weight() -> None:
    layer = expand(nn.Linear(6, 4).double())
    wanted = torch.randn(4, 6, dtype=torch.float64)
    layer.weight = nn.Parameter(wanted)
    assert_same(layer.weight, wanted, rel=1e-12)
    assert [name for name, _ in layer.named_parameters()] == [
        "bias",
        "expansion.0.weight",
        "expansion.1.weight",
        "expansion.2.weight",
    ]
    with pytest.raises(ValueError, match="shape"):
        layer.weight = torch.zeros(6, 4)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.allclose(layer.weight, before)


def test_attention_takes_its_fast_path_with_expanded_weights() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    big = expand(layer, Chain(depth=2, width=1))
    with torch.no_grad():
        assert_same(big(x), layer(x), rel=1e-10)
    assert {row.site for row in report(big).changed} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    }
    different = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True).double()
    values = (x, x[..., :6], x[..., :4])
    assert_same(expand(different)(*values)[0], different(*values)[0], rel=1e-10)
    assert len(report(expand(different)).changed) == 4


def test_a_copy_of_an_expanded_model_is_independent() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double()
    big = expand(model)
    twin = copy.deepcopy(big)
    x = torch.arange(5)
    train_steps(twin, x)
    assert_same(big(x), model(x), rel=1e-10)
    fuse(twin, inplace=True, scope="expanded")
    assert_same(big(x), model(x), rel=1e-10)
    train_steps(big, x)
