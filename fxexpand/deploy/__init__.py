"""How does a model leave torch, and does what was written compute the same?

``onnx`` exports a model, fused if asked for, and compares the file in onnxruntime: ``onnx_writing`` writes
it, ``free_sizes`` says which sizes of the inputs stay free, ``sessions`` opens it, ``onnx_files`` reads files
and moves them into place, ``onnx_report`` has the result. ``quantization`` measures int8; ``latency`` is a
room of its own. ``options`` has the options of ``export_onnx`` and ``measure_latency``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxexpand.deploy.onnx import export_onnx
    from fxexpand.deploy.onnx_report import OnnxReport
    from fxexpand.deploy.quantization import Int8Report, RangeReport, WeightRange, check_int8, weight_ranges

__all__ = [
    "Int8Report",
    "OnnxReport",
    "RangeReport",
    "WeightRange",
    "check_int8",
    "export_onnx",
    "weight_ranges",
]


def __getattr__(name: str) -> Any:
    """Load a name when it is first used: the command line reads ``options`` without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "onnx" if name in ("OnnxReport", "export_onnx") else "quantization"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
