"""The structure of a factorised network is built again from its ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxexpand import SelectionError, count_flops, cuts
from fxexpand.lowrank.cuts import Cut
from tests.compare import assert_same
from tests.networks import Language
from tests.test_factorize_uses import Twice, factorize, tokens, vectors


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(Twice, vectors), (Language, tokens), (lambda: nn.Sequential(nn.Embedding(40, 12)), tokens)],
    ids=["tied layers", "tied table", "table"],
)
def test_the_structure_of_shared_weights_can_be_built_again(make: Any, inputs: Any) -> None:
    """The keys of ``cuts`` are layers, the weight they share is a site of its own."""
    small, x = factorize(make(), rank=2), inputs()
    assert len(cuts(small)) >= 1
    again = factorize(make(), rank=cuts(small))
    assert cuts(again) == cuts(small)
    again.load_state_dict(small.state_dict())
    assert_same(again(x), small(x), 0.0)


def test_two_ranks_for_one_weight_are_an_error() -> None:
    assert cuts(factorize(Twice(), rank={"second": 2}))["first"].rank == 2
    with pytest.raises(SelectionError, match=r"first: 2, second: 3: they are one weight"):
        factorize(Twice(), rank={"first": 2, "second": 3})


def test_a_cut_that_a_layer_does_not_have_says_which_it_has() -> None:
    """Of a whole mapping of ranks only the one that is wrong."""
    model = nn.Sequential(nn.Linear(8, 9), nn.Conv2d(4, 6, 3))
    right = {"0": Cut("channel", 2)}
    for wrong, message in (
        (
            {**right, "1": ("spatial", 13)},
            r"1 \(Conv2d .*\('spatial', 13\): choose channel up to 6, spatial up to 12\.",
        ),
        ({"0": ("spatial", 2)}, r"0 \(Linear .* has no cut \('spatial', 2\): choose channel up to 8\."),
    ):
        with pytest.raises(SelectionError, match=message) as caught:
            factorize(model, rank=wrong)
        assert "{" not in str(caught.value)


def test_a_cut_that_saved_at_the_measured_sizes_is_built_again_without_them() -> None:
    """At 4 x 4 and a padding of 2 a spatial cut costs less than at the sizes that are guessed."""
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2)), torch.randn(1, 8, 4, 4)
    small = factorize(model, x, rank=14)
    assert cuts(small) == {"0": Cut("spatial", 14)}
    assert count_flops(small, x).total < count_flops(model, x).total
    again = factorize(model, rank=cuts(small), strict=True)
    assert list(again.state_dict()) == list(small.state_dict())
    # What sizes have no say in is refused all the same, and so is what was measured.
    assert not cuts(factorize(model, rank={"0": 14}))
    assert not cuts(factorize(nn.Sequential(nn.Linear(9, 9)), rank={"0": ("channel", 9)}))
    assert not cuts(factorize(model, torch.randn(1, 8, 32, 32), rank=cuts(small)))
