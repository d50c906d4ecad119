"""Does it work, on real data and on this machine?

``experiment`` trains the small ``network`` plain and expanded, fuses it and proves the result; ``findings``
has the figures and their meaning, ``page`` and ``plots`` show them.
"""

from fxexpand.training.demo.experiment import FILES, run
from fxexpand.training.demo.findings import Findings, Proof, Run, Spread, describe
from fxexpand.training.demo.network import NETWORK, Digits

__all__ = ["FILES", "NETWORK", "Digits", "Findings", "Proof", "Run", "Spread", "describe", "run"]
