"""The order in which a chain of kernels is multiplied: the cheapest of the exact associations."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import apply, compose, compose_all
from fxexpand.kernel.geometry import Association, Geometry, association, composition, composition_macs
from tests.compare import assert_same
from tests.kernels import geometries, in_turn, kernel, outputs


def trees(start: int, stop: int) -> list[Association]:
    """All associations of the kernels ``start`` to ``stop``."""
    if stop - start == 1:
        return [start]
    splits = range(start + 1, stop)
    return [(a, b) for split in splits for a in trees(start, split) for b in trees(split, stop)]


def cost(tree: Association, chain: tuple[Geometry, ...]) -> tuple[int, Geometry] | None:
    """Multiply-adds along a tree and what it composes to; None where a step is refused."""
    if isinstance(tree, int):
        return 0, chain[tree]
    inner, outer = cost(tree[0], chain), cost(tree[1], chain)
    if inner is None or outer is None:
        return None
    step = composition(outer[1], inner[1])
    return (
        None
        if isinstance(step, str)
        else (inner[0] + outer[0] + composition_macs(outer[1], inner[1]), step.result)
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_association_is_the_cheapest_exact_one(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.sampled_from([2, 4, 8, 12]), min_size=4, max_size=6))
    kernels = [data.draw(geometries(out, inp, crops=True)) for inp, out in itertools.pairwise(widths)]
    chain = tuple(k.geometry for k in kernels)
    costs = [found[0] for tree in trees(0, len(chain)) if (found := cost(tree, chain)) is not None]
    tree = association(chain)
    if isinstance(tree, str):
        assert not costs
        with pytest.raises(InexactError):
            compose_all(kernels)
        return
    found = cost(tree, chain)
    assert found is not None
    assert found[0] == min(costs)
    merged = compose_all(kernels)
    pairs = outputs(lambda x: in_turn(kernels, x), lambda x: apply(merged, x), widths[0], range(8, 40, 5))
    for got, want in pairs:
        assert_same(got, want, 1e-12)


def test_the_cost_is_the_flops_of_the_product() -> None:
    for outer, inner in [
        (kernel(6, 8, 1, 1), kernel(8, 4, 3, 3)),
        (kernel(6, 8, 1, 1, groups=2), kernel(8, 4, 3, 3, groups=2)),
        (kernel(6, 8, 3, 3), kernel(8, 4, 1, 1)),
        (kernel(8, 8, 1, 1, groups=8), kernel(8, 4, 3, 3)),
        (kernel(5, 7), kernel(7, 3)),
    ]:
        with FlopCounterMode(display=False) as counter:
            compose(outer, inner)
        assert counter.get_total_flops() == 2 * composition_macs(outer.geometry, inner.geometry)


def test_pointwise_factors_are_multiplied_first() -> None:
    chain = (kernel(64, 16, 3, 3), kernel(64, 64, 1, 1), kernel(16, 64, 1, 1))
    assert association(tuple(k.geometry for k in chain)) == (0, (1, 2))


def test_a_chain_folds_where_only_one_association_is_exact() -> None:
    full = [kernel(4, 4, 1, padding=((2, 2),)), kernel(4, 4, 3), kernel(4, 4, 3, padding=((1, 1),))]
    crop = [
        kernel(4, 4, 3, bias=True),
        kernel(4, 4, 3, padding=((1, 1),)),
        kernel(4, 4, 1, padding=((-1, -1),)),
    ]
    x = torch.randn(2, 4, 13, dtype=torch.float64)
    for chain, expected in [(full, ((0, 1), 2)), (crop, (0, (1, 2)))]:
        assert association(tuple(k.geometry for k in chain)) == expected
        assert_same(apply(compose_all(chain), x), in_turn(chain, x), 1e-12)
    with pytest.raises(InexactError, match="zero padding follows a bias"):
        compose_all([*crop[:2], kernel(4, 4, 1)])
    with pytest.raises(ValueError, match="no kernels"):
        compose_all([])
