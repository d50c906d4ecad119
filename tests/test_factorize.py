"""factorize on module trees: the same function at full energy, the bounds below it, and what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxexpand
from fxexpand import (
    SelectionError,
    UnusableWeightError,
    count_flops,
    cuts,
    effective_rank,
    factorize,
)
from fxexpand.kernel.algebra import compose
from fxexpand.kernel.modules import kernel_of
from fxexpand.lowrank.cuts import SCHEMES, Cut, Scheme, factors_of, matrix_of, schemes_of, weight_of
from fxexpand.lowrank.factored import (
    FACTORIZED,
    Factorized,
    Rows,
)
from fxexpand.lowrank.factorize_report import FactorizeReport
from fxexpand.lowrank.projection import spectrum
from tests.compare import assert_different, assert_same
from tests.factored import of_rank, rows_of
from tests.networks import ConvNet, Language, assert_untouched, perturb, snapshot, train_steps

EXACT = 1e-10


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 9), (3, 12)),
    "linear, no bias": (lambda: nn.Linear(7, 20, bias=False), (2, 4, 7)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 5, 2, 2, dilation=2), (2, 6, 21)),
    "conv2d": (lambda: nn.Conv2d(8, 10, 3, padding=1), (2, 8, 9, 7)),
    "conv2d, strided": (lambda: nn.Conv2d(8, 10, (3, 5), (2, 3), (1, 2)), (2, 8, 14, 13)),
    "conv2d, dilated, grouped": (lambda: nn.Conv2d(16, 24, 3, 1, 2, 2, groups=2), (2, 16, 9, 8)),
    "conv2d, same": (lambda: nn.Conv2d(8, 10, (4, 3), padding="same", dilation=(1, 2)), (1, 8, 9, 8)),
    "conv2d, reflect": (lambda: nn.Conv2d(8, 10, 3, 2, 1, padding_mode="reflect"), (1, 8, 9, 8)),
    "conv2d, circular": (lambda: nn.Conv2d(8, 10, 3, 1, (2, 1), padding_mode="circular"), (1, 8, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (3, 3, 2), (1, 2, 1), (1, 1, 0)), (1, 6, 6, 7, 5)),
    "pointwise": (lambda: nn.Conv2d(12, 10, 1, 2), (1, 12, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_low_rank_is_kept_exactly(name: str, scheme: Scheme) -> None:
    build, shape = LAYERS[name]
    layer: Any = build()
    own = scheme if scheme in schemes_of(kernel_of(layer)) else "channel"
    model: Any = nn.Sequential(of_rank(layer, 2, own))
    x = torch.randn(shape, dtype=torch.float64)
    small: Any = factorize(model, x, energy=1.0, scheme=scheme)
    assert cuts(small) == {"0": Cut(own, 2)}
    assert_same(small(x), model(x), EXACT)
    assert_same(small[0].weight, model[0].weight, EXACT)
    assert count_flops(small, x).total < count_flops(model, x).total
    assert rows_of(small)["0"].flops_after == count_flops(small, x).total
    with torch.no_grad():
        small.get_parameter("0.0.weight").mul_(1.001)
    assert_different(small(x), model(x), EXACT)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    taps=st.lists(st.integers(1, 3), min_size=0, max_size=3),
    seed=st.integers(0, 99),
)
def test_factors_compose_to_the_projected_weight(
    sizes: tuple[int, int, int, int], taps: list[int], seed: int
) -> None:
    groups, out, columns, rank = sizes
    groups = groups if taps else 1
    generator = torch.Generator().manual_seed(seed)
    shape = (groups * out, columns, *taps)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    kernel = fxexpand.kernel.Kernel(weight, groups=groups)
    for scheme in schemes_of(kernel):
        matrix = matrix_of(kernel, scheme)
        assert_same(weight_of(kernel, scheme, matrix), weight, 0.0)
        found = spectrum(matrix)
        rank = min(rank, found.full)
        first, second = factors_of(kernel, scheme, *found.factors(rank))
        product = compose(second, first).weight
        assert_same(product, weight_of(kernel, scheme, found.projected(rank)), 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.sampled_from([1e-200, 1e-3, 1.0, 1e200]))
def test_the_error_is_that_of_the_dropped_singular_values(m: int, n: int, seed: int, scale: float) -> None:
    """Eckart and Young, and invariance to scale, rotation and permutation."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(1, m, n, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix[0])
    found = spectrum(matrix * scale)
    turned = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q @ matrix
    for rank in range(1, found.full + 1):
        dropped = float(values[rank:].square().sum() / values.square().sum())
        assert float(found.errors[rank]) == pytest.approx(dropped, abs=1e-12)
        assert float(spectrum(turned).errors[rank]) == pytest.approx(dropped, abs=1e-12)
        assert float(spectrum(matrix[:, torch.randperm(m)]).errors[rank]) == pytest.approx(dropped, abs=1e-12)
        error = (found.projected(rank) / scale - matrix).square().sum() / matrix.square().sum()
        assert float(error) == pytest.approx(dropped, abs=1e-12)
    assert found.effective_rank() == pytest.approx(float(effective_rank(matrix[0])), rel=1e-6)


def test_layer_errors_bound_the_error_of_the_outputs() -> None:
    """Through 1-Lipschitz activations: the sum over layers of error times the norms of the other layers."""
    model: Any = nn.Sequential(
        nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 8)
    ).double()
    x = torch.randn(50, 20, dtype=torch.float64)
    for energy in (0.3, 0.5, 0.7):
        small: Any = factorize(model, x, energy=energy)
        layers = [(model.get_submodule(i), small.get_submodule(i)) for i in "024"]
        # The norm of a layer's input is bounded by what comes before it, biases included.
        bound, reach = torch.zeros(50, dtype=torch.float64), x.norm(dim=1)
        for before, after in layers:
            gap, norm = (
                float(torch.linalg.matrix_norm(w.detach(), 2))
                for w in (before.weight - after.weight, after.weight)
            )
            bound = gap * reach + norm * bound
            reach = (
                float(torch.linalg.matrix_norm(before.weight.detach(), 2)) * reach
                + before.bias.detach().norm()
            )
        apart = (small(x) - model(x)).detach().norm(dim=1)
        assert bool((apart <= bound).all()) and float(apart.max()) > 0
        found = fxexpand.report(small)
        assert isinstance(found, FactorizeReport)
        expected = float(((small(x) - model(x)).norm() / model(x).norm()).detach())
        assert found.output_error == pytest.approx(expected)


def test_a_table_must_save_parameters_and_keeps_its_padding() -> None:
    model: Any = nn.Sequential(of_rank(nn.Embedding(50, 16, padding_idx=3), 3))
    tokens = torch.randint(0, 50, (2, 7))
    small: Any = factorize(model, tokens, energy=1.0)
    assert isinstance(small[0], FACTORIZED[nn.Embedding]) and isinstance(small[0], nn.Embedding)
    assert_same(small(tokens), model(tokens), EXACT)
    assert small[0](torch.tensor([3])).abs().max() == 0
    full = factorize(nn.Sequential(nn.Embedding(9, 8)), energy=1.0)
    assert "times its parameters" in rows_of(full)["0.weight"].reason


def test_tied_weights_stay_tied() -> None:
    model: Any = perturb(Language()).double()
    with torch.no_grad():
        model.tokens.weight.copy_(spectrum(model.tokens.weight[None]).projected(2)[0])
    tokens = torch.randint(0, 11, (2, 5))
    small: Any = factorize(model, tokens, energy=1.0, select="tokens")
    assert_same(small(tokens), model(tokens), EXACT)
    table, head = small.tokens, small.head
    assert isinstance(table, FACTORIZED[nn.Embedding]) and isinstance(head, FACTORIZED[nn.Linear])
    assert table.get_submodule("0").weight is head.get_submodule("1").weight
    assert isinstance(table.get_submodule("1"), Rows)
    assert table.get_submodule("1").weight is head.get_submodule("0").weight
    [row] = [row for row in rows_of(small).values() if row.action == "factorized"]
    assert "shared by 2 layers" in row.reason
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    assert row.params_after - row.params_before == after - before
    assert copy.deepcopy(small).tokens.get_submodule("0").weight.shape == (11, 2)
    train_steps(small, tokens)
    assert_same(small.tokens.weight, small.head.weight, EXACT)


def test_what_cannot_be_factored_is_refused_with_a_reason() -> None:
    small: Any = factorize(perturb(Language()), rank=2)
    rows = rows_of(small)
    assert "two layers cannot stand in" in rows["attention.in_proj_weight"].reason
    assert rows["recurrent.weight_ih_l0"].action == "refused"
    net = factorize(perturb(ConvNet()), rank=1)
    assert "ConvTranspose2d has no factored form" in rows_of(net)["up"].reason
    assert isinstance(net.stem, FACTORIZED[nn.Conv2d])


def test_class_names_hooks_mode_and_gradients_are_kept() -> None:
    model: Any = perturb(ConvNet(bias=True)).train()
    seen: list[int] = []
    model.stem.register_forward_hook(lambda *_: seen.append(1))
    model.pointwise.weight.requires_grad_(False)
    x = torch.randn(2, 3, 20, 20)
    before: Any = snapshot(model)
    small: Any = factorize(model, rank=2)
    assert_untouched(model, before)
    assert type(small) is ConvNet and isinstance(small.stem, nn.Conv2d) and small.stem.kernel_size == (3, 5)
    small(x)
    assert seen == [1]
    assert all(module.training for module in small.modules())
    assert {n for n, _ in small.stem.named_parameters()} == {"0.weight", "1.weight", "1.bias"}
    assert not small.get_parameter("pointwise.0.weight").requires_grad
    assert small.get_parameter("stem.0.weight").requires_grad
    losses = train_steps(small, x, lr=1e-3)
    assert all(torch.isfinite(torch.tensor(losses)))


def test_memory_format_and_dtype_are_kept() -> None:
    model: Any = nn.Sequential(nn.Conv2d(8, 12, 3)).to(memory_format=torch.channels_last).to(torch.bfloat16)
    small: Any = factorize(model, rank=2)
    for parameter in small.parameters():
        assert parameter.dtype == torch.bfloat16
    assert small.get_parameter("0.0.weight").is_contiguous(memory_format=torch.channels_last)


def test_twice_is_once() -> None:
    model, x = perturb(ConvNet()).eval(), torch.randn(2, 3, 20, 20)
    small: Any = factorize(model, x, rank=1)
    again = factorize(small, x, rank=1)
    assert list(again.state_dict()) == list(small.state_dict())
    assert not fxexpand.report(again).changed
    assert "factorized already" in {r.site: r for r in fxexpand.report(again).rows}["stem"].reason


def test_the_structure_can_be_built_again_and_original_names_load() -> None:
    model, x = perturb(ConvNet(bias=True)).eval(), torch.randn(2, 3, 20, 20)
    small: Any = factorize(model, x, flops=0.6)
    torch.manual_seed(1)
    other = perturb(ConvNet(bias=True)).eval()
    fresh = factorize(other, rank=cuts(small))
    fresh.load_state_dict(small.state_dict())
    assert_same(fresh(x), small(x), 0.0)
    fresh = factorize(other, rank=cuts(small))
    fresh.load_state_dict(model.state_dict())
    assert_same(fresh(x), small(x), 1e-5)
    with pytest.raises(RuntimeError, match=r"size mismatch for stem\.weight"):
        fresh.load_state_dict({**model.state_dict(), "stem.weight": torch.zeros(1, 2)})


def test_inplace_changes_the_model_itself_and_errors_leave_it() -> None:
    model: Any = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    before: Any = snapshot(model)
    with pytest.raises(SelectionError):
        factorize(model, torch.randn(1, 9), flops=0.01, inplace=True)
    with torch.no_grad():
        broken: Any = copy.deepcopy(model)
        broken[1].weight[0, 0] = float("nan")
    with pytest.raises(UnusableWeightError, match=r"1 .*NaN or Inf"):
        factorize(broken, rank=2, inplace=True)
    assert_untouched(model, before)
    assert factorize(model, rank=2, inplace=True) is model
    assert isinstance(model[0], Factorized)


def test_degenerate_weights() -> None:
    zero: Any = nn.Sequential(nn.Linear(6, 6))
    nn.init.zeros_(zero[0].weight)
    small: Any = factorize(zero, energy=0.9)
    assert cuts(small) == {"0": Cut("channel", 1)} and small[0].weight.abs().max() == 0
    assert rows_of(small)["0"].error == 0.0
    for scale in (1e-30, 1e30):
        huge: Any = nn.Sequential(nn.Linear(6, 6, bias=False))
        with torch.no_grad():
            huge[0].weight.copy_(torch.outer(torch.randn(6), torch.randn(6)) * scale)
        kept = factorize(huge, energy=0.999)
        assert cuts(kept) == {"0": Cut("channel", 1)}
        assert_same(kept[0].weight.detach(), huge[0].weight.detach(), 1e-5)
    empty: Any = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
    empty[0].weight, empty[1].weight = nn.Parameter(torch.ones(0, 4)), nn.Parameter(torch.ones(4, 0))
    assert {row.reason for row in rows_of(factorize(empty, rank=1)).values()} == {"the weight is empty"}
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(9, 9))
    assert "no values" in rows_of(factorize(meta, rank=1))["0"].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"rank": 2, "energy": 0.5}, "got rank, energy"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, r"rank=1.5: a share"),
        ({"rank": "most"}, "'effective'"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"flops": 0.5}, "give example_inputs"),
        ({"latency": 1.5}, "latency=1.5"),
        ({"rank": 2, "method": "qr"}, "method='qr'"),
        ({"rank": 2, "p": 1.5}, "p=1.5, body='lewis': are those of l_p, but method='svd'"),
        ({"rank": 2, "method": "trp", "body": "lowner"}, "Give method='lp'"),
        ({"rank": 2, "scheme": "depth"}, "scheme='depth'"),
        ({"rank": 2, "method": "lp", "p": 3.0}, "p=3.0"),
        ({"rank": {"9": 2}}, "no layer of that name"),
        ({"rank": {"0": ("spatial", 2)}}, "has no cut"),
        ({"rank": 2, "select": "nothing"}, "matches no site"),
    ],
)
def test_wrong_options_say_what_is_right(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        factorize(nn.Sequential(nn.Linear(9, 9)), **options)


def test_the_report_shows_the_totals() -> None:
    model, x = nn.Sequential(nn.Linear(30, 30)), torch.randn(2, 30)
    found = fxexpand.report(factorize(model, x, rank=2))
    assert "params 930 -> 150" in str(found) and "of the outputs" in str(found)
    assert found.to_dict()["rows"][0]["cut"] == {"scheme": "channel", "rank": 2}


def test_weights_read_by_others_still_have_a_value() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x) + x @ self.inner.weight.mT
            return result

    model: Any = Reader().double()
    of_rank(model.inner, 2)
    x = torch.randn(3, 12, dtype=torch.float64)
    assert_same(factorize(model, energy=1.0, strict=True)(x), model(x), EXACT)
