"""How many directions do the weights of a model use, and the features its layers make?

The measures of one matrix are in ``spectra``, those of a big one, within bounds, in ``sketch``, those of
features in ``features``; ``report`` measures a whole model, ``plots`` draws it, and ``tracker`` follows it
over training.
"""

from fxexpand.rank.features import kernel_rank
from fxexpand.rank.plots import plot_ranks, plot_report, plot_spectra
from fxexpand.rank.report import FeatureRank, RankReport, WeightRank, layer_weights, rank_report
from fxexpand.rank.spectra import effective_rank, spectral_entropy, stable_rank
from fxexpand.rank.tracker import RankTracker

__all__ = [
    "FeatureRank",
    "RankReport",
    "RankTracker",
    "WeightRank",
    "effective_rank",
    "kernel_rank",
    "layer_weights",
    "plot_ranks",
    "plot_report",
    "plot_spectra",
    "rank_report",
    "spectral_entropy",
    "stable_rank",
]
