"""What users do to an expanded network besides training it: it works as before, or the error says why not."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fxexpand import DBB, Chain, DOConv, ExpandNetCL, RepVGG, expand, factorize, fuse
from fxexpand.errors import FxExpandError, InexactError, RefusedError
from fxexpand.layers.accumulation import accumulate
from tests.compare import assert_same
from tests.networks import perturb

prune: Any = torch.nn.utils.prune
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Twice(nn.Module):
    """Uses one parameter twice, functionally: it is expanded in weight space."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(width, width) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.kernel).tanh(), self.kernel)


def linear(**options: Any) -> Any:
    return expand(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), **options)


def gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad)
    return found


@pytest.mark.parametrize("form", ["auto", "chain"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_one_image_without_a_batch_and_a_batch_norm_inside(dimensions: int, form: Any) -> None:
    make: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    big = expand(nn.Sequential(make(3, 5, 3)).double(), Chain(2, 2, batch_norm=True), form=form)
    perturb(big).eval()
    x = torch.randn(1, 3, *(8, 5, 6)[:dimensions], dtype=torch.float64)
    assert_same(big(x[0]), big(x)[0], rel=1e-12)
    big.train()
    twin = copy.deepcopy(big)
    assert_same(big(x[0]), twin(x)[0], rel=1e-12)
    for (name, a), b in zip(big.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_expanding_in_inference_mode_leaves_a_model_that_trains() -> None:
    with torch.inference_mode():
        big = expand(nn.Sequential(nn.Linear(6, 5), Twice(5)).double(), example_inputs=(X,))
    big(X).sum().backward()
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients(big))
    with torch.inference_mode():
        fused = fuse(big)
    fused(X).sum().backward()
    assert len(gradients(fused)) == 3
    with torch.inference_mode():
        thin = factorize(nn.Sequential(nn.Linear(6, 5)).double(), rank=2)
    thin(X).sum().backward()
    assert len(gradients(thin)) == 3


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(6, 6), nn.Conv1d(4, 3, 1)), Twice])
def test_autocast_around_the_surgery_rounds_nothing(make: Callable[[], nn.Module]) -> None:
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        big = expand(model)
        fused = fuse(big)
    assert_same(big(X.float()), model(X.float()), rel=1e-5)
    assert_same(fused(X.float()), model(X.float()), rel=1e-5)
    other = make()
    with torch.autocast("cpu", torch.bfloat16):
        big.load_state_dict(other.state_dict())
    assert_same(big(X.float()), other(X.float()), rel=1e-5)


def test_a_default_device_is_not_where_the_model_lies() -> None:
    model = nn.Sequential(nn.Linear(6, 5), Twice(5)).double()
    torch.set_default_device("meta")
    try:
        big = expand(model, example_inputs=(X,))
        fused = fuse(big)
    finally:
        torch.set_default_device(None)
    assert {parameter.device.type for parameter in (*big.parameters(), *fused.parameters())} == {"cpu"}
    assert_same(big(X), model(X), rel=1e-12)
    assert_same(fused(X), model(X), rel=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_a_weight_that_is_read_twice(reentrant: bool) -> None:
    big = expand(Twice().double())
    twin = copy.deepcopy(big)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    checkpoint(big, x, use_reentrant=reentrant).square().sum().backward()
    twin(y).square().sum().backward()
    assert x.grad is not None and y.grad is not None
    assert_same(x.grad, y.grad, rel=1e-12)
    for a, b in zip(gradients(big), gradients(twin), strict=True):
        assert_same(a, b, rel=1e-12)


def test_a_checkpoint_within_a_forward_that_has_read_the_weight_before() -> None:
    class Inner(Twice):
        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.linear(x, self.kernel).tanh()
            result: Tensor = checkpoint(
                lambda y: nn.functional.linear(y, self.kernel), hidden, use_reentrant=False
            )
            return result

    big, plain = expand(Inner().double()), expand(Twice().double())
    plain.load_state_dict(big.state_dict())
    for model in (big, plain):
        model(X).square().sum().backward()
    for a, b in zip(gradients(big), gradients(plain), strict=True):
        assert_same(a, b, rel=1e-12)


def test_two_threads_go_backwards_through_one_model_each_for_itself() -> None:
    meeting, errors = [threading.Barrier(1)], []

    class Meets(Twice):
        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.linear(x, self.kernel).tanh()
            meeting[0].wait(20)
            return nn.functional.linear(hidden, self.kernel)

    big = expand(Meets().double())
    meeting[0] = threading.Barrier(2)

    def step() -> None:
        try:
            torch.autograd.grad(big(X).sum(), list(big.parameters()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=step) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def each_parameter(module: nn.Module) -> list[nn.Parameter]:
    """Outside of the forward, whose own code would have the weights refused."""
    return list(module.parameters())


def test_factors_that_change_within_a_forward() -> None:
    class Steps(Twice):
        def forward(self, x: Tensor) -> Tensor:
            first = nn.functional.linear(x, self.kernel)
            with torch.no_grad():
                for parameter in each_parameter(self):
                    parameter.mul_(2.0)
            return first + nn.functional.linear(x, self.kernel)

    big = expand(Steps().double())
    depth = len(list(big.parameters()))
    before = big.kernel.detach()
    assert_same(big(X), X @ before.T * (1 + 2**depth), rel=1e-12)


def test_another_data_within_a_forward_is_another_weight() -> None:
    class Swaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            first = nn.functional.linear(x, self.kernel)
            with torch.no_grad():
                for parameter in each_parameter(self):
                    parameter.data = parameter * 2
            return first + nn.functional.linear(x, self.kernel)

    big = expand(Swaps().double())
    before = big.kernel.detach()
    assert_same(big(X), X @ before.T * (1 + 2 ** len(list(big.parameters()))), rel=1e-12)


def test_factors_under_vmap() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.kernel) + self.kernel.sum()

    models = [expand(Reads().double()) for _ in range(3)]
    states = [dict(model.named_parameters()) for model in models]
    stacked = {name: torch.stack([state[name] for state in states]).detach() for name in states[0]}
    found = torch.func.vmap(lambda held: torch.func.functional_call(models[0], held, (X,)))(stacked)
    for one, model in zip(found, models, strict=True):
        assert_same(one, model(X), rel=1e-12)


def test_backward_after_the_block_of_accumulate_is_an_error() -> None:
    big = linear()
    with accumulate(big):
        loss = big(X).sum()
    with pytest.raises(FxExpandError, match="backward was called after the block"):
        loss.backward()


def test_lent_and_exchanged_factors_inside_accumulate() -> None:
    big = linear(form="collapsed")
    lent = {name: parameter.detach() * 2 for name, parameter in big.named_parameters()}
    expected = torch.func.functional_call(big, lent, (X,))
    with accumulate(big):
        assert_same(torch.func.functional_call(big, lent, (X,)), expected, rel=1e-12)
        big(X).sum().backward()
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients(big))
    with pytest.raises(FxExpandError, match="factors changed inside"), accumulate(big):
        big(X).sum().backward()
        weight = big[0].expansion[0].weight
        weight.data = weight.data * 2
    with pytest.raises(FxExpandError, match="factors changed inside"), accumulate(big):
        big(X).sum().backward()
        big.load_state_dict({k: v * 2 for k, v in big.state_dict().items()}, assign=True)


def test_copies_made_inside_accumulate_stand_on_their_own() -> None:
    for big in (linear(form="collapsed"), expand(Twice().double())):
        with accumulate(big):
            big(X).sum().backward()
            twin, fused = copy.deepcopy(big), fuse(big)
        twin.zero_grad()
        twin(X).sum().backward()
        assert_same(fused(X), big(X), rel=1e-12)
        for a, b in zip(gradients(twin), gradients(big), strict=True):
            assert_same(a, b, rel=1e-12)


def test_torch_tools_on_the_weight_of_an_expanded_layer_are_refused() -> None:
    big = linear()
    with pytest.raises(AttributeError, match=r"ExpandedLinear\.weight is that of the factors.*\(expansion\)"):
        big[0].register_parameter("weight", nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(AttributeError, match="Fuse the layer first"):
        torch.nn.utils.parametrizations.orthogonal(big[0])
    with warnings.catch_warnings(), pytest.raises((TypeError, AttributeError), match="weight"):
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(big[0])
    with pytest.raises(TypeError, match="would not train"):
        big[0].weight = big[2].weight.T @ big[2].weight @ torch.ones(5, 6, dtype=torch.float64)


def test_a_parametrization_on_top_of_an_expanded_parameter_is_not_lost() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    big = expand(Twice().double())
    parametrize.register_parametrization(big, "kernel", Double())
    with pytest.raises(RefusedError, match=r"^kernel: .*Double was registered on top"):
        fuse(big, strict=True)
    assert_same(fuse(big)(X), big(X), rel=1e-12)


@pytest.mark.parametrize("recipe", [Chain(), RepVGG(), DBB(), DOConv(), ExpandNetCL()], ids=str)
@pytest.mark.parametrize("form", ["auto", "collapsed"])
def test_torch_func_on_every_recipe(recipe: Any, form: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(72, 5)).double()
    big, x = expand(model, recipe, form=form).eval(), torch.randn(4, 3, 4, 3, dtype=torch.float64)
    named = dict(big.named_parameters())

    def loss(parameters: Any, inputs: Tensor) -> Any:
        outputs: Tensor = torch.func.functional_call(big, parameters, (inputs,))
        return outputs.square().sum()

    found = torch.func.grad(loss)(named, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(named, x[:, None])
    loss(named, x).backward()
    for name, parameter in named.items():
        assert parameter.grad is not None
        assert_same(found[name], parameter.grad, rel=1e-10)
        assert_same(each[name].sum(0), parameter.grad, rel=1e-10)


@pytest.mark.parametrize("recipe", [Chain(), RepVGG()], ids=str)
@pytest.mark.parametrize("form", ["auto", "chain"])
def test_weights_lent_under_their_original_names_are_used(recipe: Any, form: Any) -> None:
    layers = nn.Conv2d(3, 6, 3, bias=False), nn.Tanh(), nn.Conv2d(6, 6, 1)
    model, x = nn.Sequential(*layers).double(), torch.randn(2, 3, 8, 9, dtype=torch.float64)
    big = expand(model, recipe, form=form)
    before, lent = big(x), {name: value.detach() * 2 for name, value in model.named_parameters()}
    expected = torch.func.functional_call(model, lent, (x,))
    assert_same(torch.func.functional_call(big, lent, (x,)), expected, rel=1e-12)
    assert_same(big(x), before, rel=1e-12)


def test_torch_s_parametrize_on_a_factor_and_on_a_bias() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model: Any = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)  # so many positions that a product would pay off
    big: Any = expand(model)
    assert len(big[0]._plan(x)) == 1
    parametrize.register_parametrization(big[0].expansion[0], "weight", Double())
    bias = model[0].bias.view(-1, 1, 1)
    assert_same(big(x) - bias, 2 * (model(x) - bias), rel=1e-12)
    with pytest.raises(AttributeError, match=r"^bias: .*Fuse the layer first"):
        parametrize.register_parametrization(big[0], "bias", Double())
    assert_same(big(x) - bias, 2 * (model(x) - bias), rel=1e-12)


@pytest.mark.parametrize("form", ["auto", "chain", "collapsed"])
def test_torch_tools_on_a_factor(form: Any) -> None:
    big, twin = linear(form=form), linear(form="chain")
    twin.load_state_dict(big.state_dict())
    for model in (big, twin):
        prune.l1_unstructured(model[0].expansion[0], "weight", amount=0.5)
        with torch.no_grad():
            model[0].expansion[0].weight_orig.mul_(3.0)
    if form == "collapsed":
        with pytest.raises(InexactError, match="computed by a hook"):
            big(X)
    else:
        assert_same(big(X), twin(X), rel=1e-12)
    with pytest.raises(RefusedError, match=r"^0 \("):
        fuse(big, strict=True)
    for model in (big, twin):
        prune.remove(model[0].expansion[0], "weight")
    assert_same(fuse(big)(X), twin(X), rel=1e-12)


@pytest.mark.parametrize("init", ["preserve", "matched", "kaiming"])
@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_the_row_of_padding_idx_is_and_stays_zero(make: Any, init: Any) -> None:
    model = nn.Sequential(make(9, 6, padding_idx=2)).double()
    big: Any = expand(model, Chain(3, 2), init=init)
    tokens = torch.arange(9).reshape(3, 3)
    optimizer = torch.optim.SGD(big.parameters(), lr=0.1)
    for _ in range(3):
        assert not big[0].weight[2].any() and big[0].weight[1].any()
        optimizer.zero_grad()
        big(tokens).square().sum().backward()
        optimizer.step()
    assert not fuse(big)[0].weight[2].any()


def test_values_that_are_not_finite_are_named_where_they_come_in() -> None:
    big = linear()
    before = big(X)
    with pytest.raises(FxExpandError, match="weight"):
        big[0].weight = torch.full((5, 6), torch.nan, dtype=torch.float64)
    assert torch.equal(big(X), before)
    in_weight_space: Any = expand(Twice().double())
    with pytest.raises(FxExpandError, match="weight"):
        in_weight_space.kernel = torch.full((6, 6), torch.inf, dtype=torch.float64)


def test_what_draws_in_evaluation_mode_is_compared_with_the_same_draws() -> None:
    """The factors are random, too: a comparison after them must not go on from there."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x)
            return out + torch.randn_like(out)

    model, state = Noisy().double(), torch.get_rng_state()
    fuse(expand(model, example_inputs=X, generator=torch.Generator()), example_inputs=X)
    assert torch.equal(torch.get_rng_state(), state)
    fuse(expand(model, example_inputs=X), example_inputs=X)
