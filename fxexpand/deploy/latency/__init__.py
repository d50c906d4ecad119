"""How fast is a model on each backend, and is a difference between two models real?

``measure`` times models in turns and compares them by their ratio within a round; ``candidates`` gets them
ready on ``backends`` and proves that they agree, ``timing`` times the calls, ``intervals`` says how sure a
median is; ``page`` and ``plots`` show it.
"""

from fxexpand.deploy.latency.measure import Difference, LatencyReport, Measurement, measure_latency
from fxexpand.deploy.options import BACKENDS, EVERY_BACKEND

__all__ = [
    "BACKENDS",
    "EVERY_BACKEND",
    "Difference",
    "LatencyReport",
    "Measurement",
    "measure_latency",
]
