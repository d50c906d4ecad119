"""How does a model leave torch, and does what was written compute the same?

``onnx`` writes a model as a file and proves it in onnxruntime, whose ``sessions`` it opens; ``free_sizes``
says which sizes of the inputs stay free, ``files`` what a file holds; ``quantization``, what int8 would do.
"""

from fxexpand.export.onnx import OnnxReport, export_onnx
from fxexpand.export.quantization import (
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
