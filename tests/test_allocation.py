"""The allocation of a budget over layers: against all combinations, on small cases."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxexpand.errors import SelectionError
from fxexpand.lowrank.allocation import Option, allocate

number = st.floats(0.0, 10.0, allow_nan=False)
layer = st.lists(st.builds(Option, number, number), min_size=1, max_size=5)


def best(layers: list[list[Option]], budget: float) -> float | None:
    """The least total error of all combinations within the budget."""
    errors = [
        sum(option.error for option in combination)
        for combination in itertools.product(*layers)
        if sum(option.cost for option in combination) <= budget
    ]
    return min(errors, default=None)


@settings(max_examples=300, deadline=None)
@given(st.lists(layer, min_size=1, max_size=4), st.floats(0.0, 40.0))
def test_within_its_gap_of_the_best_of_all_combinations(layers: list[list[Option]], budget: float) -> None:
    least = best(layers, budget)
    if least is None:
        with pytest.raises(SelectionError, match="smallest reachable"):
            allocate(layers, budget - 1e-6)
        return
    found = allocate(layers, budget)
    chosen = [options[k] for options, k in zip(layers, found.chosen, strict=True)]
    assert found.cost == pytest.approx(sum(option.cost for option in chosen), abs=1e-9)
    assert found.error == pytest.approx(sum(option.error for option in chosen), abs=1e-9)
    assert found.cost <= budget + 1e-9
    assert least - 1e-9 <= found.error <= least + found.gap + 1e-9
    # The gap is at most one step's error: never more than what the worst layer has in all.
    spread = max(max(o.error for o in options) - min(o.error for o in options) for options in layers)
    assert found.gap <= spread + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(0, 999))
def test_near_the_optimum_for_ranks_of_layers(count: int, seed: int) -> None:
    """Layers as they are: cost proportional to the rank, convex errors. The gap is one unit of rank."""
    import random

    draw = random.Random(seed)
    layers = []
    for _ in range(count):
        squares = sorted((draw.random() ** 3 for _ in range(6)), reverse=True)
        price = draw.randint(1, 5)
        errors = [sum(squares[r:]) / sum(squares) for r in range(1, 7)]
        layers.append([Option(price * (r + 1.0), errors[r]) for r in range(6)])
    budget = draw.uniform(0.3, 1.0) * sum(options[-1].cost for options in layers)
    least = best(layers, budget)
    if least is not None:
        found = allocate(layers, budget)
        assert found.error <= least + found.gap + 1e-12
        step = max(a.error - b.error for options in layers for a, b in itertools.pairwise(options))
        assert found.gap <= step + 1e-12


def test_a_budget_that_is_met_exactly_is_optimal() -> None:
    layers = [
        [Option(1, 1.0), Option(2, 0.4), Option(3, 0.1)],
        [Option(1, 2.0), Option(2, 0.5), Option(3, 0.2)],
    ]
    found = allocate(layers, 4.0)
    assert (found.chosen, found.cost, found.gap) == ((1, 1), 4.0, 0.0)
    assert found.error == best(layers, 4.0)


def test_the_rest_of_a_budget_is_spent_off_the_hull() -> None:
    """The step to the hull's next option does not fit, one above the hull does."""
    layers = [[Option(0, 10.0), Option(4, 7.0), Option(6, 0.0)]]
    found = allocate(layers, 5.0)
    assert found.chosen == (1,) and found.error == 7.0
    assert found.gap >= 7.0 - 10.0 * (1 - 5 / 6) - 1e-9


def test_options_that_are_dearer_and_no_better_are_never_taken() -> None:
    found = allocate([[Option(1, 1.0), Option(2, 1.0), Option(3, 2.0)]], 9.0)
    assert found.chosen == (0,) and found.cost == 1.0


def test_no_layers_cost_nothing() -> None:
    assert allocate([], 0.0).chosen == ()


def test_an_unreachable_budget_says_what_is_reachable() -> None:
    with pytest.raises(SelectionError, match="smallest reachable is 3, above the budget of 2"):
        allocate([[Option(1, 0.0)], [Option(2, 0.0), Option(4, 0.0)]], 2.0)
