"""How does one weight become two smaller ones?

``cuts`` says where a kernel is cut, and which kernels the factors are; ``projection`` and ``lp`` find the
factors of the matrix there, in l_2 and in l_p; ``factored`` has the layers that run them. Which layers and at
which rank, is the question of ``fxexpand.compression``.
"""

from fxexpand.lowrank.cuts import Cut, Scheme
from fxexpand.lowrank.factored import Factorized
from fxexpand.lowrank.lp import lp_spectrum
from fxexpand.lowrank.projection import Spectrum, spectrum

__all__ = ["Cut", "Factorized", "Scheme", "Spectrum", "lp_spectrum", "spectrum"]
