"""Rank: the number of directions that weights and features use, and layers factored into two of low rank.

Measures: ``measures`` of one matrix, ``sketch`` of a big one within bounds, ``features`` of the outputs of
layers; ``model_ranks`` measures a whole model, ``rank_plots`` draws it, ``tracker`` records it in training.
Factors: ``cuts`` has the ways to cut a kernel, ``projection`` and ``lp`` compute the factors, in l_2 and in
l_p, ``factored`` has the layers that run them. Choice of layers and ranks: ``options`` are those of a user,
``criteria`` their ranges, ``calibration`` and ``costs`` measure inputs and costs of layers, ``allocation``
spreads a budget, ``decisions`` decides before anything is changed, ``factorize_report`` reports it. ``trp``
trains towards low rank.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxexpand.lowrank.cuts import Cut, Scheme
    from fxexpand.lowrank.factored import Factorized
    from fxexpand.lowrank.factorize_report import FactorizeReport, FactorRow
    from fxexpand.lowrank.features import kernel_rank
    from fxexpand.lowrank.lp import lp_spectrum
    from fxexpand.lowrank.measures import effective_rank, spectral_entropy, stable_rank
    from fxexpand.lowrank.model_ranks import FeatureRank, RankReport, WeightRank, layer_weights, rank_report
    from fxexpand.lowrank.options import Method, Ranks
    from fxexpand.lowrank.projection import Spectrum, spectrum
    from fxexpand.lowrank.rank_plots import plot_ranks, plot_report, plot_spectra
    from fxexpand.lowrank.tracker import RankTracker
    from fxexpand.lowrank.trp import TrainedRankPruning

__all__ = ["Cut", "FactorRow", "FactorizeReport", "Factorized", "FeatureRank", "Method", "RankReport"]
__all__ += ["RankTracker", "Ranks", "Scheme", "Spectrum", "TrainedRankPruning", "WeightRank"]
__all__ += ["effective_rank", "kernel_rank", "layer_weights", "lp_spectrum", "plot_ranks", "plot_report"]
__all__ += ["plot_spectra", "rank_report", "spectral_entropy", "spectrum", "stable_rank"]

_HOMES = (
    *("cuts", "factored", "factorize_report", "features", "lp", "measures", "model_ranks"),
    *("options", "projection", "rank_plots", "tracker", "trp"),
)


def __getattr__(name: str) -> Any:
    """Load a name when it is first used: the command line reads ``options`` without torch."""
    if name in __all__:
        modules = (importlib.import_module(f"{__name__}.{home}") for home in _HOMES)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
