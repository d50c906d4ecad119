"""Values of the figures of Huh et al., read off their plots (about ±0.01 of the axis unit).

``V1`` are the figures of the first version (March 2021), ``V2`` those of the TMLR version. Entropies are in
nats. Their captions do not state widths, sample counts, step sizes or stop rules; where we had to choose
them, the experiment says so.
"""

from __future__ import annotations

DEPTHS_A = (1, 2, 4, 8, 16)
INITIALISATION = {
    # (network, measure, width): mean entropy at DEPTHS_A
    ("linear", "end-to-end matrix", 16): (2.54, 2.35, 2.05, 1.65, 1.18),
    ("relu", "cosine_distance", 16): (1.91, 1.77, 1.58, 1.37, 1.15),
    ("linear", "cosine_distance", 32): (2.15, 2.00, 1.82, 1.60, 1.38),
    ("relu", "cosine_distance", 32): (2.15, 2.07, 1.88, 1.67, 1.45),
}

DEPTHS_B = (1, 4, 8, 12, 16, 20, 24, 28, 32)
TEACHERS = {
    # (teacher, initialisation): measure -> values at DEPTHS_B
    ("low rank", "default"): {
        "initial": (3.24, 2.75, 2.31, 2.05, 1.80, 1.60, 1.43, 1.37, 1.27),
        "converged": (2.45, 2.40, 2.25, 2.17, 2.13, 2.10, 2.07, 2.02, 2.02),
        "test": (0.16, 0.11, 0.11, 0.12, 0.12, 0.13, 0.19, 0.23, 0.23),
    },
    ("full rank", "default"): {
        "converged": (3.22, 3.08, 2.87, 2.74, 2.59, 2.48, 2.33, 2.26, 2.18),
        "test": (0.19, 0.31, 0.47, 0.60, 0.70, 0.78, 0.89, 0.92, 0.98),
        "train": (0.00, 0.01, 0.05, 0.08, 0.14, 0.19, 0.27, 0.31, 0.38),
    },
    ("low rank", "low rank"): {
        "converged": (2.25, 2.12, 2.08, 2.05, 2.00, 2.03, 2.00, 2.02, 2.05),
    },
}
TRUTH = {"low rank": 2.07, "full rank": 3.23}

DEPTHS_C = (1, 2, 4, 8)
OPTIMISERS = {
    "SGD": (2.92, 2.82, 2.66, 2.38),
    "Nesterov": (2.86, 2.76, 2.53, 2.10),
    "Adam": (2.85, 2.74, 2.45, 2.08),
    "L-BFGS": (2.86, 2.75, 2.52, 2.15),
    "CMA-ES": (3.00, 2.91, 2.72, 2.46),
    "random search": (3.23, 3.06, 2.75, 2.30),
}

DEPTHS_D = (2, 4, 8, 16)
NONLINEARITIES = {
    "linear": (2.17, 1.98, 1.83, 1.68),
    "tanh": (2.17, 1.90, 1.49, 1.38),
    "ReLU": (2.17, 1.97, 1.70, 1.57),
    "leaky ReLU": (2.17, 1.98, 1.69, 1.55),
    "SELU": (2.17, 1.98, 1.81, 1.74),
    "GELU": (2.17, 2.03, 1.88, 1.64),
    "SIREN": (2.17, 2.05, 1.89, 1.82),
}
