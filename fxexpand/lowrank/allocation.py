"""Allocation of a budget to layers: the ranks of small total error for a given total cost.

Each layer has options with a cost and an error, and exactly one is taken: a multiple-choice knapsack. On the
lower convex hull of the options of a layer, error falls ever more slowly with cost. Taking the steepest step
of all layers, again and again, solves the linear relaxation: it is optimal for every budget that it meets
exactly. For a budget in between, its error exceeds the optimum by less than the error of the one step that
did not fit; the rest of the budget is then spent on single layers, off the hull too.

Source: Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27, 1979.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from fxexpand.errors import SelectionError


@dataclass(frozen=True)
class Option:
    """The cost (in any unit) and the error (additive over layers) of one choice for a layer."""

    cost: float
    error: float


@dataclass(frozen=True)
class Allocation:
    """One option per layer, by index; ``gap`` bounds the difference of ``error`` and the optimum."""

    chosen: tuple[int, ...]
    cost: float
    error: float
    gap: float


def allocate(layers: Sequence[Sequence[Option]], budget: float) -> Allocation:
    """The options of small total error whose total cost is at most ``budget``.

    Raises: SelectionError: even the cheapest options cost more; the message says how much.
    """
    hulls = [_hull(options) for options in layers]
    at = [0] * len(layers)
    cost = sum(layers[i][hull[0]].cost for i, hull in enumerate(hulls))
    slack = budget * 1e-12  # sums of many costs round
    if cost > budget + slack:
        raise SelectionError(f"the smallest reachable is {cost:.6g}, above the budget of {budget:.6g}")
    steps = [(-_slope(layers[i], hull, 0), i) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    error = sum(layers[i][hull[0]].error for i, hull in enumerate(hulls))
    bound: float | None = None  # the error of the linear relaxation
    while steps:
        negative, i = heapq.heappop(steps)
        now, then = (layers[i][hulls[i][at[i] + k]] for k in (0, 1))
        if cost + then.cost - now.cost > budget + slack:
            bound = error + (budget - cost) * negative if bound is None else bound
            continue  # a smaller step of another layer may still fit
        cost += then.cost - now.cost
        error += then.error - now.error
        at[i] += 1
        if at[i] + 1 < len(hulls[i]):
            heapq.heappush(steps, (-_slope(layers[i], hulls[i], at[i]), i))
    chosen = [hull[position] for hull, position in zip(hulls, at, strict=True)]
    chosen, cost = _spend(layers, chosen, cost, budget + slack)
    error = sum(options[k].error for options, k in zip(layers, chosen, strict=True))
    return Allocation(tuple(chosen), cost, error, 0.0 if bound is None else max(0.0, error - bound))


def _spend(
    layers: Sequence[Sequence[Option]], chosen: list[int], cost: float, budget: float
) -> tuple[list[int], float]:
    """Take single better options that fit the budget, largest gain first, until none does."""
    while True:
        best: tuple[float, int, int] | None = None
        for i, options in enumerate(layers):
            now = options[chosen[i]]
            for k, option in enumerate(options):
                gain = now.error - option.error
                if cost - now.cost + option.cost <= budget and gain > 0 and (best is None or gain > best[0]):
                    best = (gain, i, k)
        if best is None:
            return chosen, cost
        _, i, k = best
        cost += layers[i][k].cost - layers[i][chosen[i]].cost
        chosen[i] = k


def _hull(options: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull, cheapest first, by index."""
    hull: list[int] = []
    for k in sorted(range(len(options)), key=lambda k: (options[k].cost, options[k].error)):
        new = options[k]
        if hull and new.error >= options[hull[-1]].error:
            continue  # costs more, with no less error
        if hull and new.cost == options[hull[-1]].cost:
            hull.pop()
        while len(hull) > 1:
            a, b = options[hull[-2]], options[hull[-1]]
            # b is above the line from a to the new one
            if (b.error - a.error) * (new.cost - a.cost) < (new.error - a.error) * (b.cost - a.cost):
                break
            hull.pop()
        hull.append(k)
    return hull


def _slope(options: Sequence[Option], hull: Sequence[int], at: int) -> float:
    """The error saved per cost by the next step on the hull."""
    now, then = options[hull[at]], options[hull[at + 1]]
    return (now.error - then.error) / (then.cost - now.cost)
