"""G: gradient descent on balanced factors moves their product by one rule, and only the depth matters.

With balanced factors, a small step moves ``W = W_N ... W_1`` as

    ``W <- W - η Σ_j (W Wᵀ)^((j-1)/N) G (Wᵀ W)^((N-j)/N)``,  j = 1..N,  G the gradient at W.

Here the rule is run on W itself, beside real gradient descent on the factors, for hidden widths above the
full rank too: the distance at one time must shrink with the step, η and η/2 in the ratio 2.

Source: S. Arora, N. Cohen, E. Hazan, "On the Optimization of Deep Networks: Implicit Acceleration by
Overparameterization", ICML 2018, theorem 1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fxexpand.reporting.figures import new_figure

TITLE = "G. The end-to-end update rule (Arora et al.)"
ROWS, COLUMNS, SAMPLES = 6, 9, 40
TIME = 1.0  # steps times rate
RATES = (0.02, 0.01, 0.005, 0.0025)
DEPTHS = (1, 2, 3, 5)
HIDDEN = (6, 24)


def run(quick: bool = False) -> dict[str, Any]:
    """Relative distances between the rule and the factors after ``TIME``."""
    rates = RATES[:2] if quick else RATES
    rows = []
    for depth in DEPTHS:
        for hidden in HIDDEN:
            errors, moved = [], 0.0
            for rate in rates:
                rule, real, start = both(depth, hidden, rate, round(TIME / rate))
                errors.append(float((rule - real).norm() / real.norm()))
                moved = float((real - start).norm() / start.norm())
            rows.append({"depth": depth, "hidden": hidden, "errors": errors, "moved": moved})
    return {"rates": list(rates), "rows": rows}


def both(depth: int, hidden: int, rate: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The product by the rule, by gradient descent on the factors, and at the start."""
    generator = torch.Generator().manual_seed(depth)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    start = 0.5 * normal(ROWS, COLUMNS) / COLUMNS**0.5
    x = normal(COLUMNS, SAMPLES)
    y = normal(ROWS, COLUMNS) @ x / COLUMNS**0.5

    def gradient(product: Tensor) -> Tensor:
        found: Tensor = (product @ x - y) @ x.mT / SAMPLES
        return found

    factors = balanced(start, depth, hidden, normal)
    whole = start.clone()
    for _ in range(steps):
        whole = whole - rate * step(whole, gradient(whole), depth)
        factors = descend(factors, gradient, rate)
    return whole, product_of(factors), start


def step(whole: Tensor, gradient: Tensor, depth: int) -> Tensor:
    """``Σ_j (W Wᵀ)^((j-1)/N) G (Wᵀ W)^((N-j)/N)``."""
    u, s, v = torch.linalg.svd(whole)
    full = torch.zeros(v.shape[0], dtype=s.dtype)
    full[: len(s)] = s

    def power(basis: Tensor, values: Tensor, exponent: float) -> Tensor:
        return (basis * values.pow(2 * exponent)) @ basis.mT

    total = torch.zeros_like(whole)
    for j in range(1, depth + 1):
        # 0 to the power of 0 is 1: without a factor on that side there is the identity.
        total += power(u, s, (j - 1) / depth) @ gradient @ power(v.mT, full, (depth - j) / depth)
    return total


def balanced(whole: Tensor, depth: int, hidden: int, normal: Any) -> list[Tensor]:
    """Factors with ``W_{j+1}ᵀ W_{j+1} = W_j W_jᵀ`` and the product ``whole``, first applied first."""
    if depth == 1:
        return [whole.clone()]
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    bases = [torch.linalg.qr(normal(hidden, len(s)))[0] for _ in range(depth - 1)]
    share = s.pow(1 / depth)
    sides = [v.mT, *bases, u]
    return [(after * share) @ before.mT for before, after in pairwise(sides)]


def product_of(factors: list[Tensor]) -> Tensor:
    """``W_N ... W_1``."""
    whole = factors[0]
    for factor in factors[1:]:
        whole = factor @ whole
    return whole


def descend(factors: list[Tensor], gradient: Any, rate: float) -> list[Tensor]:
    """One step of real gradient descent, by autograd."""
    leaves = [factor.detach().requires_grad_() for factor in factors]
    product = product_of(leaves)
    torch.autograd.backward([product], [gradient(product.detach())])
    moved = []
    for leaf in leaves:
        assert leaf.grad is not None
        moved.append((leaf - rate * leaf.grad).detach())
    return moved


HEAD = ["depth, hidden width", "W moved by", "distance at each rate", "ratio of the last two"]


def table_rows(content: dict[str, Any]) -> list[list[str]]:
    """Relative distances; a rule that holds to first order has the ratio 2."""
    return [
        [
            f"{row['depth']}, {row['hidden']}",
            f"{row['moved']:.0%}",
            " ".join(f"{error:.1e}" for error in row["errors"]),
            "-" if row["depth"] == 1 else f"{row['errors'][-2] / row['errors'][-1]:.2f}",
        ]
        for row in content["rows"]
    ]


def failures(content: dict[str, Any]) -> list[str]:
    """Distances that do not halve with the rate."""
    return [
        f"G: depth {row['depth']}, hidden {row['hidden']}: distances {row['errors']}"
        for row in content["rows"]
        if (row["errors"][-1] > 1e-12 if row["depth"] == 1 else row["errors"][-2] < 1.8 * row["errors"][-1])
    ]


def plot(content: dict[str, Any]) -> Any:
    """Distance over the rate, with the slope of a rule that holds to first order."""
    figure, (axis,) = new_figure(1, 1, width=4.2, height=3.0)
    for row in content["rows"]:
        if row["depth"] > 1:
            style = "-" if row["hidden"] == HIDDEN[0] else "--"
            label = f"depth {row['depth']}, hidden {row['hidden']}"
            axis.plot(content["rates"], row["errors"], style, marker=".", label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(content["rates"], [f"{rate:g}" for rate in content["rates"]])
    axis.minorticks_off()
    axis.set_xlabel("learning rate")
    axis.set_ylabel("relative distance, rule to factors")
    axis.legend(fontsize=7)
    return figure
