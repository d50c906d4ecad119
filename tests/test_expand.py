"""``expand`` and ``fuse`` on whole networks: same function, same structure afterwards, nothing lost."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxexpand
from fxexpand import Chain, expand, fuse, fused_state_dict, report
from tests.compare import assert_different, assert_same
from tests.networks import ConvNet, Language, StandardisedConv2d, fresh, perturb, train_steps

IMAGES = torch.randn(3, 3, 10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[1, 2, 0, 4, 10], [3, 3, 5, 0, 7]])


def convnet() -> tuple[Any, Tensor]:
    return perturb(ConvNet()).double(), IMAGES


def language() -> tuple[Any, Tensor]:
    return perturb(Language()).double(), TOKENS


def standardised() -> tuple[Any, Tensor]:
    model = nn.Sequential(
        StandardisedConv2d(3, 6, 3, padding=1), nn.ReLU(), StandardisedConv2d(6, 4, 3, groups=2)
    )
    return model.double(), IMAGES


def volumes() -> tuple[Any, Tensor]:
    model = nn.Sequential(
        nn.Conv3d(2, 4, (1, 3, 2)), nn.Tanh(), nn.ConvTranspose3d(4, 2, 2, stride=2, groups=2)
    )
    return model.double(), torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)


def signals() -> tuple[Any, Tensor]:
    model = nn.Sequential(
        nn.Conv1d(2, 6, 4, stride=3), nn.GELU(), nn.ConvTranspose1d(6, 2, 4, stride=3, dilation=2)
    )
    return model.double(), torch.randn(2, 2, 13, dtype=torch.float64)


def gru() -> tuple[Any, Tensor]:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 5, num_layers=2, bidirectional=True, batch_first=True)
            self.cell = nn.LSTMCell(10, 3)
            self.bilinear = nn.Bilinear(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h, c = self.cell(self.gru(x)[0].mean(1))
            result: Tensor = self.bilinear(h, c)
            return result

    return Last().double(), torch.randn(2, 6, 4, dtype=torch.float64)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    f.__name__: f for f in (convnet, language, standardised, volumes, signals, gru)
}


@pytest.fixture(params=list(MODELS))
def model_and_input(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return MODELS[request.param]()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("form", ["auto", "chain", "collapsed"])
def test_the_function_is_kept_in_float64(model_and_input: tuple[Any, Any], form: Any, training: bool) -> None:
    model, x = model_and_input
    model.train(training)
    reference = fresh(model)
    big = expand(model, form=form)
    assert isinstance(big, type(model))
    assert big.training is training
    assert_same(big(x), reference(x), rel=1e-10)
    if training:
        for name, buffer in reference.named_buffers():
            assert_same(big.get_buffer(name), buffer, rel=1e-10)
    if form == "auto":
        assert report(big).changed and not report(big).refusals
        error = report(big).worst_error
        assert error is not None and error <= 1e-12


def test_the_function_is_kept_in_float32(model_and_input: tuple[Any, Any]) -> None:
    model, x = model_and_input
    model = model.float().eval()
    x = x.float() if x.is_floating_point() else x
    big = expand(model, example_inputs=x)
    assert_same(big(x), model(x), rel=1e-5)
    with torch.no_grad():
        parameter = next(p for p in big.parameters() if p.ndim >= 3)
        parameter.add_(0.1 * torch.randn_like(parameter))
    assert_different(big(x), model(x), rel=1e-5)


def test_gradients_reach_every_factor(model_and_input: tuple[Any, Any]) -> None:
    model, x = model_and_input
    big = expand(model)
    big(x).square().sum().backward()
    unused = {"cell.parametrizations.weight_hh"}  # its hidden state is zero at the first step
    for name, parameter in big.named_parameters():
        if name.rpartition(".")[0] not in unused:
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


def test_the_round_trip_is_the_identity_on_structure(model_and_input: tuple[Any, Any]) -> None:
    model, x = model_and_input
    big = expand(model)
    before = [parameter.detach().clone() for parameter in big.parameters()]
    assert all(math.isfinite(loss) for loss in train_steps(big, x))
    assert any(not torch.equal(a, b) for a, b in zip(before, big.parameters(), strict=True))
    trained = copy.deepcopy(big)
    small = fuse(big, example_inputs=x, scope="expanded")
    assert type(small) is type(model)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    state = small.state_dict()
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert state[name].shape == tensor.shape and state[name].dtype == tensor.dtype
        assert state[name].stride() == tensor.stride()
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    blank = fresh(model)
    blank.load_state_dict(state, strict=True)
    for network in (small, blank):
        assert_same(network.eval()(x), trained.eval()(x), rel=1e-10)
    assert flops(small.train(), x) == flops(model.train(), x)
    assert train_steps(small, x)[0] > 0
    # the expanded model is still whole: fusing worked on a copy
    assert_same(big.eval()(x), trained(x), rel=0.0)
    assert train_steps(big, x)[0] > 0


def flops(model: nn.Module, x: Any) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


def test_the_fused_state_dict_is_that_of_the_fused_model(model_and_input: tuple[Any, Any]) -> None:
    model, x = model_and_input
    big = expand(model)
    train_steps(big, x)
    direct, through = fused_state_dict(big), fuse(big, scope="expanded").state_dict()
    assert list(direct) == list(through)
    assert all(torch.equal(direct[name], through[name]) for name in through)
    assert list(big.state_dict()) != list(direct), "the expanded network stays expanded"


def test_passes_are_idempotent(model_and_input: tuple[Any, Any]) -> None:
    model, _ = model_and_input
    big = expand(model)
    again = expand(big)
    assert list(again.state_dict()) == list(big.state_dict())
    assert not report(again).changed and not report(again).refusals
    small = fuse(big, scope="expanded")
    twice = fuse(small, scope="expanded")
    assert list(twice.state_dict()) == list(small.state_dict())
    assert not report(twice).rows


def test_original_checkpoints_load_and_keep_their_function(model_and_input: tuple[Any, Any]) -> None:
    model, x = model_and_input
    model.eval()
    other = fresh(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7).add_(0.01)
        if isinstance(other, Language):
            other.tokens.weight[0] = 0.0
    big = expand(model)
    assert not big.load_state_dict(other.state_dict()).missing_keys
    assert_same(big(x), other(x), rel=1e-10)
    own = expand(other)
    big.load_state_dict(own.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(big.state_dict().values(), own.state_dict().values(), strict=True)
    )


def test_a_wrong_checkpoint_is_the_usual_error(model_and_input: tuple[Any, Any]) -> None:
    model, _ = model_and_input
    big = expand(model)
    state = dict(model.state_dict())
    name = next(
        key for key, value in state.items() if value.ndim >= 2 and key.endswith(("weight", "weight_ih_l0"))
    )
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}: copying a param with shape"):
        big.load_state_dict({**state, name: state[name][:1]})
    missing = {key: value for key, value in state.items() if key != name}
    if name != "tokens.weight":  # tied: the head brings it
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: "):
            big.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"bogus\.weight\""):
        big.load_state_dict({**state, "bogus.weight": torch.zeros(1)})


@pytest.mark.parametrize("init", ["matched", "kaiming"])
def test_random_starts(init: Any) -> None:
    model, x = convnet()
    big = expand(model, init=init, generator=torch.Generator().manual_seed(3))
    twin = expand(model, init=init, generator=torch.Generator().manual_seed(3))
    assert torch.equal(big(x), twin(x))
    assert_different(big(x), model(x), rel=1e-2)
    if init == "matched":
        ratio = float((big.pointwise.weight.norm() / model.pointwise.weight.norm()).detach())
        assert abs(ratio - 1.0) < 1e-9
    assert_same(fuse(big.eval(), scope="expanded")(x), big(x), rel=1e-10)


def test_batch_norm_inside_folds_in_eval_mode() -> None:
    model, x = convnet()
    model.eval()
    big = expand(model, Chain(depth=2, width=1, batch_norm=True))
    assert_same(big(x), model(x), rel=1e-10)
    with pytest.raises(fxexpand.InexactError, match="in training mode"):
        _ = big.train().stem.weight
    for _ in range(3):
        train_steps(big, x)
    big.eval()
    for training in (False, True):
        small = fuse(big.train(training), scope="expanded")
        assert small.training is training
        assert type(small) is ConvNet
        assert_same(small.eval()(x), big.eval()(x), rel=1e-10)
    assert "stem.bias" in small.state_dict(), "BatchNorm gives a layer without a bias one"
    assert any("bias added" in row.reason for row in report(small).rows)


def test_attributes_that_other_code_reads() -> None:
    model, _ = convnet()
    big = expand(model.requires_grad_(False))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            twin: Any = big.get_submodule(name)
            assert isinstance(twin, type(module))
            for attribute in ("kernel_size", "stride", "padding", "groups", "in_features", "out_channels"):
                assert getattr(twin, attribute, None) == getattr(module, attribute, None)
            assert twin.weight.shape == module.weight.shape and twin.weight.dtype == module.weight.dtype
            assert not twin.weight.requires_grad
            assert_same(twin.weight, module.weight, rel=1e-12)
            assert (twin.bias is None) == (module.bias is None)
            assert str(type(module).__name__) in repr(twin) and "Chain" in repr(twin)


class Doubles(nn.Module):
    """Calls with keywords, as decoders make them: ``output_size`` decides between two sizes of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(input=self.down(input=x), output_size=x.shape[2:])
        result: Tensor = self.head(input=y.mean((2, 3)))
        return result


@pytest.mark.parametrize("form", ["auto", "chain", "collapsed"])
def test_arguments_by_keyword(form: Any) -> None:
    model = Doubles().double()
    big = expand(model, form=form)
    for size in ((8, 8), (7, 9)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert_same(big(x), model(x), rel=1e-10)
