"""A write into a weight that factors compute takes effect, or raises with the sentence that helps."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor

from fxexpand import Chain, FxExpandError, RepVGG, UnusableWeightError, expand, factorize, fuse
from tests.compare import assert_same
from tests.processes import ranks

prune: Any = torch.nn.utils.prune
MAKERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: expand(nn.Sequential(nn.Linear(6, 5)).double())[0],
    "convolution": lambda: expand(nn.Sequential(nn.Conv2d(3, 4, 3)).double(), RepVGG()).eval()[0],
    "transposed": lambda: expand(nn.Sequential(nn.ConvTranspose2d(4, 3, 2)).double())[0],
    "weight space": lambda: expand(nn.Sequential(nn.Embedding(6, 5)).double())[0],
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def no_grad(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight.mul_(2)


def augmented(layer: Any) -> None:
    layer.weight.data += 1


def assigned_data(layer: Any) -> None:
    layer.weight.data = torch.ones_like(layer.weight)


def assigned(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.ones_like(layer.weight))


def first_row(layer: Any) -> None:
    layer.weight.data[0].zero_()


def first_item(layer: Any) -> None:
    layer.weight.data[0] = 0.0


def rows(layer: Any) -> None:
    for row in layer.weight.detach().unbind():
        row.fill_(1.0)


def without_first(weight: Tensor) -> Tensor:
    changed = weight.clone()
    changed[0] = 0.0
    return changed


WRITES: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "init": (lambda layer: nn.init.zeros_(layer.weight), torch.zeros_like),
    "grad mode": (lambda layer: layer.weight.mul_(2), lambda weight: weight * 2),
    "no_grad": (no_grad, lambda weight: weight * 2),
    "inference mode": (inference_mode, lambda weight: weight * 2),
    "data +=": (augmented, lambda weight: weight + 1),
    "data.copy_": (lambda layer: layer.weight.data.copy_(torch.ones_like(layer.weight)), torch.ones_like),
    "data =": (assigned_data, torch.ones_like),
    "a parameter": (assigned, torch.ones_like),
    "a row": (first_row, without_first),
    "an item": (first_item, without_first),
    "rows": (rows, torch.ones_like),
    "a flat view": (lambda layer: layer.weight.data.flatten().fill_(1.0), torch.ones_like),
    "out=": (
        lambda layer: torch.add(layer.weight.detach(), 1, out=layer.weight.data),
        lambda weight: weight + 1,
    ),
    "an operator": (lambda layer: torch.ops.aten.zero_(layer.weight.data), torch.zeros_like),
    "foreach": (lambda layer: torch._foreach_mul_([layer.weight.data], 2), lambda weight: weight * 2),
}


@makers
@pytest.mark.parametrize("write", WRITES)
def test_a_write_takes_effect(make: Callable[[], Any], write: str) -> None:
    layer = make()
    before, (act, law) = layer.weight.detach().clone(), WRITES[write]
    names = list(layer.state_dict())
    act(layer)
    assert_same(layer.weight, law(before), rel=1e-10)
    assert list(layer.state_dict()) == names
    twin = copy.deepcopy(layer)  # the factors were written, not a tensor that only this layer knows
    assert_same(twin.weight, law(before), rel=1e-10)


def test_a_written_model_computes_with_the_new_weight_and_trains() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    big: Any = expand(model)
    x = torch.randn(7, 6, dtype=torch.float64)
    for layer in (*big, *model):
        if isinstance(layer, nn.Linear):
            layer.weight.data += 0.5
    assert_same(big(x), model(x), rel=1e-10)
    nn.init.zeros_(big[2].weight)  # the start of an adapter: a gradient has to reach it
    big(x).sum().backward()
    optimizer = torch.optim.SGD(big.parameters(), lr=0.1)
    optimizer.step()
    assert float(big[2].weight.detach().abs().max()) > 0
    assert_same(fuse(big, scope="expanded")(x), big(x), rel=1e-10)


def test_functions_that_draw_the_weights_of_a_model() -> None:
    def draw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.constant_(module.weight, 0.25)

    big: Any = expand(nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 4)).double())
    big.apply(draw)
    for layer in big:
        assert_same(layer.weight, torch.full_like(layer.weight, 0.25), rel=1e-10)


def test_transformers_draws_the_weights_of_a_model() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6, initializer_range=3.0
    )
    big = expand(transformers.GPT2Model(config), Chain(2, 1))
    for module in (big.wte, big.h[0].mlp.c_fc):
        nn.init.zeros_(module.weight)
        assert float(module.weight.detach().abs().max()) < 1e-6
        big._init_weights(module)
        assert float(module.weight.detach().std()) > 1.0


def test_an_adapter_merges_into_an_expanded_layer() -> None:
    """As peft does: the product of the adapter's factors is added to ``weight.data``."""
    big: Any = expand(nn.Sequential(nn.Linear(6, 5)).double())
    x = torch.randn(3, 6, dtype=torch.float64)
    down, up = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    expected = big(x) + x @ down.T @ up.T
    big[0].weight.data += up @ down
    assert_same(big(x), expected, rel=1e-10)


@makers
def test_a_write_that_cannot_be_factored_raises(make: Callable[[], Any]) -> None:
    layer = make()
    before = layer.weight.detach().clone()
    with pytest.raises(UnusableWeightError, match="NaN"):
        nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(ValueError, match="shape"):
        layer.weight.data = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[0] = 0.0
    with pytest.raises(FxExpandError, match="gradients of the factors"):
        layer.weight.grad = torch.zeros_like(layer.weight)
    assert torch.equal(layer.weight, before)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which the compiler reads
@makers
def test_a_compiled_function_reads_the_weight_and_does_not_write_it(make: Callable[[], Any]) -> None:
    def double(weight: Tensor) -> Tensor:
        return weight.flatten() * 2

    read: Any = torch.compile(double, fullgraph=True, backend="eager")
    write: Any = torch.compile(Tensor.zero_, fullgraph=True, backend="eager")
    layer = make()
    assert_same(read(layer.weight), layer.weight.flatten() * 2, rel=1e-12)
    with pytest.raises(Exception, match=r"Write outside torch\.compile"):
        write(layer.weight.data)


@makers
def test_copies_of_the_weight_are_their_own(make: Callable[[], Any]) -> None:
    layer = make()
    before = layer.weight.detach().clone()
    for taken in (
        nn.Parameter(layer.weight),
        layer.weight.clone(),
        copy.deepcopy(layer.weight.detach()),
        pickle.loads(pickle.dumps(layer.weight.detach())),
        layer.weight + 0,
    ):
        assert type(taken) in (Tensor, nn.Parameter)
        taken.data.zero_()
    assert torch.equal(layer.weight, before)


@makers
def test_freezing_the_weight_freezes_its_factors(make: Callable[[], Any]) -> None:
    layer = make()
    bias = layer._parameters.get("bias")
    for flag in (False, True):
        layer.weight.requires_grad_(flag)
        assert {p.requires_grad for p in layer.parameters() if p is not bias} == {flag}
        assert layer.weight.requires_grad == flag and (bias is None or bias.requires_grad)
    layer.weight.requires_grad = False
    assert not layer.weight.requires_grad


@makers
def test_the_gradient_is_that_of_the_factors(make: Callable[[], Any]) -> None:
    """``weight.grad`` is None, without torch's warning; a weight that was read once keeps its gradient."""
    layer = make()
    weight = layer.weight
    weight.retain_grad()
    weight.square().sum().backward()
    assert_same(weight.grad, 2 * weight, rel=1e-10)
    assert any(factor.grad is not None for factor in layer.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.weight.grad is None
    layer.weight.grad = None
    again = layer.weight
    (found,) = torch.autograd.grad(again.square().sum(), again)
    assert_same(found, 2 * again, rel=1e-10)


@makers
def test_tools_that_need_the_original_weight_say_fuse_first(make: Callable[[], Any]) -> None:
    first = r'Fuse the layer first, fxexpand\.fuse\(model, scope="expanded"\)'
    layer = make()
    before = layer.weight.detach().clone()
    with pytest.raises(AttributeError, match=first):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    with pytest.raises(AttributeError, match=first):
        torch.nn.utils.parametrizations.weight_norm(layer)
    quantized = TwoTensor(torch.zeros_like(layer.weight), torch.zeros_like(layer.weight))
    with pytest.raises(AttributeError, match=first):  # as torchao's quantize_ assigns a quantized weight
        layer.weight = nn.Parameter(quantized)
    assert torch.equal(layer.weight, before)


def test_the_older_weight_norm_leaves_the_layer_as_it_was() -> None:
    layer = MAKERS["linear"]()
    names, x = list(layer.state_dict()), torch.randn(3, 6, dtype=torch.float64)
    before = layer(x)
    with warnings.catch_warnings(), pytest.raises(AttributeError, match="Fuse the layer first"):
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(layer)
    assert list(layer.state_dict()) == names and torch.equal(layer(x), before)


def test_recurrent_weights_are_written_and_restored() -> None:
    model = nn.Sequential(nn.LSTM(4, 3, bidirectional=True)).double()
    big: Any = expand(model)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    for layer in (big[0], model[0]):
        for name in ("weight_ih_l0", "weight_hh_l0_reverse"):
            getattr(layer, name).data.mul_(2)
            nn.init.ones_(getattr(layer, name)[:2].data)
    assert_same(big(x)[0], model(x)[0], rel=1e-10)
    assert_same(fuse(big, scope="expanded")(x)[0], model(x)[0], rel=1e-10)


def test_a_bias_with_a_share_of_a_norm_is_written_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    layer: Any = expand(model, RepVGG()).eval()[0]
    layer.expansion(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    for norm in layer.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias)
    assert float(layer.bias.detach().abs().max()) > 0
    with pytest.raises(AttributeError, match="Fuse the layer first"):
        layer.bias.requires_grad_(False)
    nn.init.ones_(layer.bias)
    assert_same(layer.bias, torch.ones_like(layer.bias), rel=1e-10)


def test_a_write_into_the_weight_of_a_factored_layer_raises() -> None:
    """Another weight may have another rank."""
    for original in (nn.Linear(9, 9), nn.Embedding(9, 9), nn.Conv2d(3, 9, 3)):
        layer: Any = factorize(nn.Sequential(original), rank=2)[0]
        before = layer.weight.clone()
        for write in (
            lambda layer: nn.init.zeros_(layer.weight),
            lambda layer: layer.weight.data.add_(1),
            assigned_data,
            first_row,
        ):
            with pytest.raises(AttributeError, match=r"weight is that of the factors.*\(0 and 1\)"):
                write(layer)
        assert torch.equal(layer.weight, before)
        layer.weight.requires_grad_(False)
        assert not any(part.weight.requires_grad for part in layer.factors())


def written_in_shards(rank: int) -> None:
    torch.manual_seed(rank)  # the parts of the factors that are drawn come from the first process
    layers = nn.Linear(6, 5), nn.Embedding(6, 5), nn.Conv2d(3, 4, 3)
    model: Any = expand(nn.Sequential(*layers).double())
    for layer in model:
        fully_shard(layer)
        before = layer.weight.full_tensor().detach()
        no_grad(layer)
        layer.weight.data.mul_(2)
        augmented(layer)
        assert_same(layer.weight.full_tensor(), 4 * before + 1, rel=1e-10)
        layer.weight = torch.ones_like(before)
        assert_same(layer.weight.full_tensor(), torch.ones_like(before), rel=1e-10)
        layer.weight.requires_grad_(False)
        assert not layer.weight.requires_grad
        assert isinstance(getattr(layer, "bias", None), nn.Parameter | None)


def test_the_weight_of_a_sharded_layer_is_written_in_every_process() -> None:
    ranks(2, written_in_shards)


def test_the_class_of_the_weight_stays_inside() -> None:
    """Results are plain tensors; a forward and a compiled graph take the product itself."""

    class Reader(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            self.kind = type(self.inner.weight)
            output: Tensor = self.inner(x)
            return output

    for make in (MAKERS["linear"], MAKERS["weight space"]):
        reader = Reader(make())
        reader(torch.ones(2, 6, dtype=torch.float64) if make is MAKERS["linear"] else torch.tensor([1]))
        assert reader.kind is Tensor
        weight: Any = reader.inner.weight
        assert type(weight + 1) is type(weight.sum()) is type(weight @ weight.mT) is Tensor
