"""The effect of int8 on a network before and after fusing: ranges of weights, and errors of outputs.

Folding a norm scales each output channel by ``gamma / sigma``, and folding branches adds kernels of unlike
size: one channel may end up with a range far above the others, and one scale per tensor then leaves the
others few of the 256 steps. RepVGG loses most of its accuracy that way; one scale per channel, or training
without a norm on the identity branch, avoids it.
Source: Chu et al., "Make RepVGG Greater Again" (QARepVGG), 2022.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxexpand.deploy.onnx import export_onnx
from fxexpand.deploy.onnx_writing import quiet
from fxexpand.deploy.sessions import feeds, open_session
from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.layers.rewritten import Rewritten, original_class
from fxexpand.passes.sites import own_modules
from fxexpand.reporting.rows import plain
from fxexpand.reporting.table import short, table
from fxexpand.running.evaluation import evaluating
from fxexpand.running.finite import require_finite
from fxexpand.running.inputs import ExampleInputs, call, copy, tensors
from fxexpand.running.outputs import tensors_of
from fxexpand.zoo import required

if TYPE_CHECKING:
    import onnxruntime

_STEPS = 127  # of a symmetric int8 weight on each side of zero


@dataclass(frozen=True)
class WeightRange:
    """The range of one layer's weight, and the error of rounding it to int8.

    ``spread`` is the largest absolute value over the median of the output channels' largest: how much finer a
    scale per channel is than one per tensor. An error is the norm of the change by rounding to nearest over
    the norm of the weight, per channel, as the root mean square over the channels: all channels count alike.
    """

    largest: float
    spread: float
    error_tensor: float
    error_channel: float


@dataclass(frozen=True)
class RangeReport:
    """Weight ranges per layer before and after fusing; None where one network lacks the layer."""

    rows: Mapping[str, tuple[WeightRange | None, WeightRange | None]]

    @property
    def widened(self) -> tuple[str, ...]:
        """The layers whose error with one scale per tensor grew by more than half, the worst first."""
        worse = {
            name: after.error_tensor / before.error_tensor
            for name, (before, after) in self.rows.items()
            if before and after and before.error_tensor and after.error_tensor > 1.5 * before.error_tensor
        }
        return tuple(sorted(worse, key=lambda name: -worse[name]))

    def __str__(self) -> str:
        def cells(found: WeightRange | None) -> tuple[str, ...]:
            if found is None:
                return ("-",) * 4
            errors = (f"{found.error_tensor:.2%}", f"{found.error_channel:.2%}")
            return (f"{found.largest:.3g}", f"{found.spread:.3g}", *errors)

        rows = [(name, *cells(before), *cells(after)) for name, (before, after) in self.rows.items()]
        columns = ("max", "spread", "tensor", "channel")
        text = table(("layer", *columns, *(f"{column}'" for column in columns)), rows)
        note = f"{len(self.widened)} layers lose over half as much again with one scale per tensor"
        worst = f": {', '.join(self.widened[:3])}" if self.widened else ""
        return (
            f"{text}\n' after fusing; errors of int8 weights by scale per tensor, per channel. {note}{worst}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        pairs = {name: plain(pair) for name, pair in self.rows.items()}
        layers = {name: {"before": before, "after": after} for name, (before, after) in pairs.items()}
        return {"widened": list(self.widened), "layers": layers}


def weight_ranges(model: nn.Module, fused: nn.Module | None = None) -> RangeReport:
    """The ranges of the weights of every Linear and convolution, by the name of the layer.

    An expanded layer counts by its effective weight, a factored one by the two factors that run.

    Args:
        model: before fusing.
        fused: after; a fused branch has the name of its largest layer, which pairs it with that one.

    Raises: UnusableWeightError: a weight holds NaN or Inf, or has no values (meta device).
    """
    before = dict(_ranges(model))
    after = {} if fused is None else dict(_ranges(fused))
    names = dict.fromkeys([*before, *after])
    return RangeReport({name: (before.get(name), after.get(name)) for name in names})


@dataclass(frozen=True)
class Int8Result:
    """One network in int8 against itself in torch, over all samples.

    ``error`` is the norm of the difference over the norm of the outputs, ``float_error`` that of the
    unquantised file in onnxruntime; ``agreement`` is the share of rows whose largest output (of the first
    tensor, along its last dimension) is the same.
    """

    model: str
    error: float
    float_error: float
    agreement: float
    size: int
    float_size: int


@dataclass(frozen=True)
class Int8Report:
    """Networks after onnxruntime's static quantisation."""

    results: tuple[Int8Result, ...]
    per_channel: bool
    calibration: int
    samples: int

    def __str__(self) -> str:
        rows = []
        for each in self.results:
            sizes = (f"{short(each.size)}B", f"{short(each.float_size)}B")
            errors = (f"{each.error:.2%}", f"{each.agreement:.1%}", f"{each.float_error:.1e}")
            rows.append((each.model, *errors, *sizes))
        head = ("model", "int8 error", "same class", "float error", "int8", "float")
        scales = "channel" if self.per_channel else "tensor"
        return (
            f"{table(head, rows)}\none scale per {scales}, calibrated on {self.calibration} inputs, "
            f"measured on {self.samples}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found: dict[str, Any] = plain(self)
        return found


def check_int8(
    models: Mapping[str, nn.Module],
    calibration: Iterable[ExampleInputs],
    *,
    samples: Iterable[ExampleInputs] | None = None,
    per_channel: bool = True,
) -> Int8Report:
    """Quantise each model to int8 with ``onnxruntime.quantization.quantize_static``, and measure the outputs.

    Args:
        models: by name, in evaluation mode; for example before and after fusing.
        calibration: inputs whose least and largest activations become the ranges; their batches may differ
            in length.
        samples: inputs to measure on; None takes those of the calibration.
        per_channel: one scale per output channel of a weight, instead of one per tensor.

    Raises:
        SelectionError: no calibration inputs, or inputs of several shapes.
        FxExpandError: a model cannot be exported, or onnxruntime is not installed.
    """
    calibration = list(calibration)
    given = calibration if samples is None else list(samples)
    if not calibration or not given:
        raise SelectionError("calibration: no inputs. Give a few batches that are like those of use.")
    shapes = {
        ", ".join("x".join(["batch", *map(str, tensor.shape[1:])]) for tensor in tensors(each))
        for each in (*calibration, *given)
    }
    if len(shapes) > 1:
        two = " and of ".join(sorted(shapes)[:2])
        raise SelectionError(f"calibration: inputs of {two}; only the batch may differ. Pad them.")
    required("onnxruntime", "onnx")
    results = []
    with tempfile.TemporaryDirectory(prefix="fxexpand-int8-") as folder:
        for i, (name, model) in enumerate(models.items()):
            whole, small = Path(folder) / f"{i}.onnx", Path(folder) / f"{i}-int8.onnx"
            export_onnx(model, whole, calibration[0], verify=False)
            with evaluating(model):
                expected = [tensors_of(call(model, copy(each)))[0].detach().cpu() for each in given]
            _quantise(whole, small, calibration, per_channel)
            exact, rounded = (_first_outputs(open_session(path), given) for path in (whole, small))
            errors = (_distance(rounded, expected), _distance(exact, expected))
            same = [(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(rounded, expected, strict=True)]
            agreement = float(torch.cat(same).double().mean())
            sizes = (small.stat().st_size, whole.stat().st_size)
            results.append(Int8Result(name, *errors, agreement, *sizes))
    return Int8Report(tuple(results), per_channel, len(calibration), len(given))


def _ranges(model: nn.Module) -> Iterator[tuple[str, WeightRange]]:
    for name, module in own_modules(model):
        if not isinstance(module, nn.Linear | _ConvNd):
            continue
        if isinstance(module, Rewritten) and module.traced_inside:
            continue  # its factors are layers with rows of their own
        with evaluating(module):  # spectral norm would take a step, a chain with norms has no weight
            weight = module.weight.detach()
        where = (f"{name}.weight" if name else "weight", original_class(module).__name__)
        if weight.is_meta:
            raise UnusableWeightError(
                f"{where[0]} ({where[1]}): is on the meta device and has no values. "
                "Materialise the model first."
            )
        require_finite(weight, *where)
        weight = weight.double()
        if isinstance(module, _ConvTransposeNd):  # (in, out / groups, *k)
            grouped = weight.reshape(module.groups, -1, *weight.shape[1:]).transpose(1, 2)
            weight = grouped.flatten(0, 1)
        rows = weight.flatten(1)
        channels = rows.abs().amax(1, keepdim=True)
        largest = channels.max()
        spread = float(largest / channels.median()) if channels.median() else float("inf")
        errors = (_rounding(rows, largest), _rounding(rows, channels))
        yield name, WeightRange(float(largest), spread, *errors)


def _rounding(rows: Tensor, largest: Tensor) -> float:
    scale = largest / _STEPS
    steps = (rows / scale.where(scale > 0, torch.ones_like(scale))).round()
    lost, norm = (steps * scale - rows).norm(dim=1), rows.norm(dim=1)
    return float((lost / norm.where(norm > 0, torch.ones_like(norm))).square().mean().sqrt())


def _quantise(path: Path, out: Path, calibration: Sequence[ExampleInputs], per_channel: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    session = open_session(path)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rest = (feeds(session, each) for each in calibration)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return next(self.rest, None)

    prepared, formats = path.with_suffix(".prepared.onnx"), {"quant_format": QuantFormat.QDQ}
    types = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    with quiet(""):  # the quantiser logs its advice to the root logger
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(out), Reader(), per_channel=per_channel, **formats, **types)


def _first_outputs(session: onnxruntime.InferenceSession, given: Sequence[ExampleInputs]) -> list[Tensor]:
    return [torch.from_numpy(session.run(None, feeds(session, each))[0]) for each in given]


def _distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    a, b = (torch.cat([each.double().flatten() for each in side]) for side in (actual, expected))
    lost, norm = float((a - b).norm()), float(b.norm())
    return lost / norm if norm else (float("inf") if lost else 0.0)
