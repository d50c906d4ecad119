"""The ranks of a whole model: of every weight, and of the features its layers make of given inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.lowrank.features import kernel_rank, kernel_spectrum
from fxexpand.lowrank.measures import (
    Unfolding,
    energy_of,
    entropy_of,
    numerical_of,
    rounding_unit,
    roy_of,
    scaled_spectrum,
    stable_of,
    unfold,
)
from fxexpand.lowrank.sketch import sketch
from fxexpand.reporting.table import table
from fxexpand.running import inputs as arguments
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.outputs import tensors_of

CELL = ("weight_ih", "weight_hh")
ENERGY = 0.99  # of the squares of the singular values, for the energy rank of a report


@dataclass(frozen=True)
class WeightRank:
    """The ranks of one weight; ``shape`` is in the order ``(out, in/groups, *k)``.

    Attributes:
        numerical_rank: singular values that are more than rounding in the weight's own dtype.
        energy_rank: singular values that hold 99 % of the energy.
        before: the effective rank in the model that was given as ``before``.
        bounds: where the weight was sketched, the interval of the effective rank; the measures of such a row
            are those of the largest singular values alone.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    full_rank: int
    effective_rank: float
    entropy: float
    stable_rank: float
    numerical_rank: int
    energy_rank: int
    nuclear_norm: float
    before: float | None = None
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class FeatureRank:
    """The ranks of one layer's outputs for ``points`` inputs, each flattened to ``dimensions`` numbers.

    ``effective_rank`` is that of the Gram matrix, ``cosine_distance`` that of the kernel of Huh et al.; both
    are the exponential of the entropy. ``before`` is ``effective_rank`` in the model given as ``before``.
    """

    name: str
    kind: str
    points: int
    dimensions: int
    effective_rank: float
    entropy: float
    stable_rank: float
    cosine_distance: float
    before: float | None = None


@dataclass(frozen=True)
class RankReport:
    """The ranks of every weight of a model and of its features, in the model's order.

    Attributes:
        centered: whether the mean of the features was subtracted.
        compared: whether there is a column ``before``.
    """

    rows: tuple[WeightRank, ...]
    features: tuple[FeatureRank, ...] = ()
    unfolding: Unfolding = "channel"
    centered: bool = False
    compared: bool = False

    def __str__(self) -> str:
        head = [
            "weight",
            "kind",
            "shape",
            "full",
            "effective",
            "share",
            "entropy",
            "stable",
            "energy",
            "numerical",
        ]
        rows = [
            [
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                str(row.full_rank),
                f"{row.effective_rank:.2f}" if row.bounds is None else _interval(row.bounds),
                f"{row.effective_rank / row.full_rank:.1%}",
                f"{row.entropy:.3f}",
                f"{row.stable_rank:.2f}",
                str(row.energy_rank),
                str(row.numerical_rank),
            ]
            for row in self.rows
        ]
        text = table(*self._with_before(head, rows, self.rows), left=(0, 1))
        if not self.features:
            return text
        head = ["features of", "kind", "points", "dimensions", "effective", "entropy", "stable", "distance"]
        rows = [
            [
                feature.name,
                feature.kind,
                str(feature.points),
                str(feature.dimensions),
                f"{feature.effective_rank:.2f}",
                f"{feature.entropy:.3f}",
                f"{feature.stable_rank:.2f}",
                f"{feature.cosine_distance:.2f}",
            ]
            for feature in self.features
        ]
        return f"{text}\n\n{table(*self._with_before(head, rows, self.features), left=(0, 1))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "unfolding": self.unfolding,
            "centered": self.centered,
            "weights": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "features": [asdict(row) for row in self.features],
        }

    def _with_before(
        self, head: list[str], rows: list[list[str]], found: Sequence[WeightRank | FeatureRank]
    ) -> tuple[list[str], list[list[str]]]:
        if not self.compared:
            return head, rows
        place = head.index("effective")
        for cells, row in zip(rows, found, strict=True):
            cells.insert(place, "-" if row.before is None else f"{row.before:.2f}")
        return [*head[:place], "before", *head[place:]], rows


def rank_report(
    model: nn.Module,
    inputs: ExampleInputs | None = None,
    *,
    before: nn.Module | None = None,
    unfolding: Unfolding = "channel",
    centered: bool = False,
    sketched: int | None = None,
) -> RankReport:
    """The ranks of every Linear, convolution, embedding, attention and recurrent weight, and of features.

    Weights are read through ``module.weight``: on an expanded layer or a parametrized one that is the
    effective weight, one row under the layer's own name. A packed attention projection is three rows.

    Args:
        inputs: two inputs or more; each layer's outputs for them, in evaluation mode, are measured too. The
            first dimension of an output must be that of the inputs; of a layer called several times it is
            the first call. Only one output is held at a time.
        before: a model with the same names, for a column to compare with: the model before training, or
            before its expansion. If its dtype is another one, it gets the inputs in that.
        unfolding: how a kernel becomes a matrix, see ``fxexpand.rank.spectra.unfold``.
        centered: subtract the mean of the features (double-centre the kernel).
        sketched: measure weights whose smaller side is more than twice this by that many singular values,
            at a fraction of the time, with bounds; see ``fxexpand.rank.sketch``. By default all are exact.

    Raises:
        UnusableWeightError: a weight or an output with NaN or Inf; the message names it.
        SelectionError: fewer than two inputs, or an option out of range.
    """
    if sketched is not None and sketched < 1:
        raise SelectionError(f"sketched={sketched}: choose 1 singular value or more.")
    rows = tuple(_weight_rows(model, unfolding, sketched))
    features = () if inputs is None else tuple(_feature_rows(model, inputs, centered))
    if before is not None:
        past = {row.name: row.effective_rank for row in _weight_rows(before, unfolding, sketched)}
        rows = tuple(replace(row, before=past.get(row.name)) for row in rows)
        if inputs is not None:
            given = (
                arguments.move(inputs, dtype=_dtype(before)) if _dtype(before) != _dtype(model) else inputs
            )
            past = {row.name: row.effective_rank for row in _feature_rows(before, given, centered)}
            features = tuple(replace(row, before=past.get(row.name)) for row in features)
    return RankReport(rows, features, unfolding, centered, before is not None)


def _dtype(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _weight_rows(model: nn.Module, unfolding: Unfolding, sketched: int | None) -> Iterator[WeightRank]:
    with evaluating(model):
        for name, kind, weight, groups in layer_weights(model):
            try:
                yield _weight_row(name, kind, weight, groups, unfolding, sketched)
            except (UnusableWeightError, SelectionError) as error:  # the latter for a layer without a number
                raise type(error)(f"{name} ({kind}): {error}") from None


def _weight_row(
    name: str, kind: str, weight: Tensor, groups: int, unfolding: Unfolding, sketched: int | None
) -> WeightRank:
    bounds = None
    matrices = unfold(weight, unfolding, groups=groups)
    full = groups * min(matrices.shape[1:])
    if sketched is not None and groups == 1 and full > 2 * sketched:
        directions = torch.Generator(weight.device).manual_seed(0)  # the user's random state is not ours
        found = sketch(matrices[0], sketched, generator=directions)
        spectrum = torch.tensor(found.values, dtype=torch.float64, device="cpu")
        scale = torch.tensor(found.scale, dtype=torch.float64, device="cpu")
        interval = found.effective_rank()
        bounds = (interval.low, interval.high)
    else:
        spectrum, scale = scaled_spectrum(weight, groups=groups, unfolding=unfolding)
    return WeightRank(
        name=name,
        kind=kind,
        shape=tuple(weight.shape),
        full_rank=full,
        effective_rank=float(roy_of(spectrum)),
        entropy=float(entropy_of(spectrum)),
        stable_rank=float(stable_of(spectrum)),
        numerical_rank=int(numerical_of(spectrum, rounding_unit(matrices))),
        energy_rank=int(energy_of(spectrum, ENERGY)),
        nuclear_norm=float(spectrum.sum() * scale),
        bounds=bounds,
    )


def _feature_rows(model: nn.Module, inputs: ExampleInputs, centered: bool) -> list[FeatureRank]:
    points = arguments.batch_size(inputs)
    if points is None or points < 2:
        raise SelectionError(f"rank report: {points or 'no'} input; the rank of features needs two or more.")
    found: dict[str, FeatureRank] = {}
    order: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        kind = type(module).__name__.removeprefix("Parametrized")

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs = tensors_of(output)
            if name in found or not outputs:
                return
            values = outputs[0]
            if values.ndim < 2 or values.shape[0] != points or not values.is_floating_point():
                return  # not one output per input, such as the packed sequences of a recurrent layer
            if not values.numel():
                return
            try:
                found[name] = _feature_row(name, kind, values, centered)
            except UnusableWeightError:
                raise UnusableWeightError(f"{name} ({kind}): its outputs hold NaN or Inf.") from None

        return module.register_forward_hook(hook)

    handles = []
    try:
        for name, module in _layers(model):
            order.append(name)
            handles.append(watch(name, module))
        with evaluating(model):
            arguments.call(model, arguments.copy(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return [found[name] for name in order if name in found]


def _feature_row(name: str, kind: str, values: Tensor, centered: bool) -> FeatureRank:
    spectrum = kernel_spectrum(values, centered=centered)
    return FeatureRank(
        name=name,
        kind=kind,
        points=values.shape[0],
        dimensions=values[0].numel(),
        effective_rank=float(roy_of(spectrum)),
        entropy=float(entropy_of(spectrum)),
        stable_rank=float(stable_of(spectrum)),
        cosine_distance=float(kernel_rank(values, "cosine_distance", centered=centered)),
    )


def _interval(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:.2f}..{high:.2f}" if math.isfinite(high) else f">= {low:.2f}"


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights are reported, by path; not the factors inside them."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if _has_one_weight(module):
            inside = (*inside, f"{path}.")
        elif not isinstance(module, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase):
            continue
        yield path, module


def layer_weights(model: nn.Module) -> Iterator[tuple[str, str, Tensor, int]]:
    """(name, kind, weight (out, in/groups, *k), groups) of each weight; factors of a weight are left out.

    To be read while ``evaluating``: in training mode reading is a step of a power iteration (spectral norm),
    and an expansion with a BatchNorm has no single weight.

    Raises: UnusableWeightError: a lazy layer that has not run.
    """
    for path, module in _layers(model):
        kind = type(module).__name__.removeprefix("Parametrized")
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            packed: Tensor | None = module.in_proj_weight
            if packed is not None:
                for part, weight in zip("qkv", packed.chunk(3), strict=True):
                    yield f"{prefix}in_proj_weight[{part}]", kind, weight, 1
            else:
                for part in "qkv":
                    yield f"{prefix}{part}_proj_weight", kind, getattr(module, f"{part}_proj_weight"), 1
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            layers = module._all_weights if isinstance(module, nn.RNNBase) else [CELL]
            for name in (n for names in layers for n in names if n.startswith("weight")):
                yield f"{prefix}{name}", kind, getattr(module, name), 1
        else:
            whole = module.weight
            assert isinstance(whole, Tensor)
            if is_lazy(whole):
                raise UnusableWeightError(
                    f"{prefix}weight ({kind}): is not initialised yet (lazy). Run the model once first."
                )
            weight = whole.detach()  # one tensor, where the weight is a product that is made at each use
            groups = getattr(module, "groups", 1)
            groups = groups if isinstance(groups, int) else 1
            if isinstance(module, _ConvTransposeNd):
                blocks = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, in/groups, out/groups, *k)
                weight = blocks.transpose(1, 2).flatten(0, 1)
            yield f"{prefix}weight", kind, weight, groups


def _has_one_weight(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | _ConvNd | nn.Embedding | nn.EmbeddingBag):
        return True
    # An expanded layer need not be a subclass of the layer it replaces: its weight is computed by a property.
    # So is a parametrized one, of a layer that is not reported as it is.
    if is_parametrized(module) or not isinstance(getattr(type(module), "weight", None), property):
        return False
    weight = module.weight
    return isinstance(weight, Tensor) and weight.ndim >= 2
