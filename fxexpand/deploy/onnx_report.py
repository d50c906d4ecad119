"""The report of an ONNX file: its contents, and the proof that it computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxexpand.reporting.rows import plain
from fxexpand.reporting.table import short, table


@dataclass(frozen=True)
class OnnxReport:
    """An ONNX file that was written, and the proof that it computes the same.

    ``inputs`` and ``outputs`` map names to shapes, where a name in place of a length is a free dimension.
    ``error`` is the largest relative error over ``batch_sizes``; None where ``verify=False``.
    ``operators_before`` counts the operators of the model it was compared with, exported in the same way.
    """

    path: Path
    size: int
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    operators: Mapping[str, int]
    batch_sizes: tuple[int, ...]
    error: float | None
    tolerance: float | None
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    operators_before: Mapping[str, int] | None = None

    def __str__(self) -> str:
        shapes = [("input", name, shape_text(shape)) for name, shape in self.inputs.items()]
        shapes += [("output", name, shape_text(shape)) for name, shape in self.outputs.items()]
        if self.error is None:
            proof = "not compared with the model (verify=False)"
        else:
            sizes = ", ".join(map(str, self.batch_sizes)) or "as given"
            proof = (
                f"relative error {self.error:.1e} <= {self.tolerance:.0e} in onnxruntime, batch sizes {sizes}"
            )
        others = ", ".join(file.name for file in self.files if file != self.path)
        return (
            f"{self.path}: {short(self.size)}B{f' with {others}' if others else ''}, opset {self.opset}\n"
            f"{proof}\n\n{table(('', 'name', 'shape'), shapes, left=(0, 1, 2))}\n\n{self._histogram()}"
        )

    def _histogram(self) -> str:
        if self.operators_before is None:
            return table(("operator", "count"), [(name, str(n)) for name, n in self.operators.items()])
        before, names = self.operators_before, dict.fromkeys([*self.operators_before, *self.operators])
        rows = [(name, str(before.get(name, 0)), str(self.operators.get(name, 0))) for name in names]
        rows.append(("total", str(sum(before.values())), str(sum(self.operators.values()))))
        return table(("operator", "original", "this"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found: dict[str, Any] = plain(self)
        return found


def shape_text(shape: tuple[int | str, ...]) -> str:
    """``2 x 3 x height``; a scalar has no dimensions."""
    return " x ".join(map(str, shape)) or "scalar"
