"""Which layers are worth factoring, and at which rank?

``criteria`` is what a user asks for; ``watching`` and ``costs`` measure what layers see and what they cost,
whole and in two; ``allocation`` spreads a budget over layers; ``decisions`` decides before anything
is changed, and ``report`` says what. ``trp`` trains towards low rank. ``fxexpand.factorize`` changes models.
"""

from fxexpand.compression.criteria import Method, Ranks
from fxexpand.compression.report import FactorizeReport, FactorRow
from fxexpand.compression.trp import TrainedRankPruning

__all__ = ["FactorRow", "FactorizeReport", "Method", "Ranks", "TrainedRankPruning"]
