"""How does a model leave torch, and does what was written compute the same?

``onnx`` writes a model as a file and proves it in onnxruntime, whose ``sessions`` it opens; ``folding``
fuses what is written, ``free_sizes`` says which sizes of the inputs stay free, ``onnx_files`` what a file
holds. ``quantization`` tells what int8 would do; ``latency`` is a room of its own.
"""

from fxexpand.deploy.onnx import OnnxReport, export_onnx
from fxexpand.deploy.quantization import (
    Int8Report,
    RangeReport,
    WeightRange,
    check_int8,
    weight_ranges,
)

__all__ = [
    "Int8Report",
    "OnnxReport",
    "RangeReport",
    "WeightRange",
    "check_int8",
    "export_onnx",
    "weight_ranges",
]
