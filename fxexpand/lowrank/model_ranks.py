"""The ranks of a whole model: of every weight, and of the features of every layer for given inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.kernel.taps import exchanged
from fxexpand.lowrank import measures
from fxexpand.lowrank.features import kernel_rank, kernel_spectrum
from fxexpand.lowrank.measures import Unfolding
from fxexpand.lowrank.sketch import sketch
from fxexpand.reporting.table import table
from fxexpand.running import inputs as arguments
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs
from fxexpand.running.outputs import tensors_of

CELL = ("weight_ih", "weight_hh")
ENERGY = 0.99  # the share of the squared singular values that the energy rank of a report keeps


@dataclass(frozen=True)
class WeightRank:
    """The ranks of one weight; ``shape`` is in the order ``(out, in/groups, *k)``.

    Attributes:
        numerical_rank: number of singular values above the rounding of the weight's own dtype.
        energy_rank: number of singular values that hold 99 % of the energy.
        before: the effective rank in the model that was given as ``before``.
        bounds: the interval of the effective rank, if the weight was sketched; the measures of such a row are
            those of the largest singular values alone.
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
        text = self._table(WEIGHT_COLUMNS, self.rows)
        return f"{text}\n\n{self._table(FEATURE_COLUMNS, self.features)}" if self.features else text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "unfolding": self.unfolding,
            "centered": self.centered,
            "weights": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "features": [asdict(row) for row in self.features],
        }

    def _table(self, columns: Mapping[str, Callable[[Any], str]], rows: Sequence[object]) -> str:
        shown = {head: cell for head, cell in columns.items() if self.compared or head != "before"}
        return table(list(shown), [[cell(row) for cell in shown.values()] for row in rows], left=(0, 1))


def _interval(row: WeightRank) -> str:
    if row.bounds is None:
        return f"{row.effective_rank:.2f}"
    low, high = row.bounds
    return f"{low:.2f}..{high:.2f}" if math.isfinite(high) else f">= {low:.2f}"


def _before(row: WeightRank | FeatureRank) -> str:
    return "-" if row.before is None else f"{row.before:.2f}"


WEIGHT_COLUMNS: dict[str, Callable[[WeightRank], str]] = {
    "weight": lambda row: row.name,
    "kind": lambda row: row.kind,
    "shape": lambda row: "x".join(map(str, row.shape)),
    "full": lambda row: str(row.full_rank),
    "before": _before,
    "effective": _interval,
    "share": lambda row: f"{row.effective_rank / row.full_rank:.1%}",
    "entropy": lambda row: f"{row.entropy:.3f}",
    "stable": lambda row: f"{row.stable_rank:.2f}",
    "energy": lambda row: str(row.energy_rank),
    "numerical": lambda row: str(row.numerical_rank),
}
FEATURE_COLUMNS: dict[str, Callable[[FeatureRank], str]] = {
    "features of": lambda row: row.name,
    "kind": lambda row: row.kind,
    "points": lambda row: str(row.points),
    "dimensions": lambda row: str(row.dimensions),
    "before": _before,
    "effective": lambda row: f"{row.effective_rank:.2f}",
    "entropy": lambda row: f"{row.entropy:.3f}",
    "stable": lambda row: f"{row.stable_rank:.2f}",
    "distance": lambda row: f"{row.cosine_distance:.2f}",
}


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
        inputs: two inputs or more; the outputs of each layer for them, in evaluation mode, are measured too.
            The first dimension of an output must be that of the inputs. A layer that is called several times
            is measured at its first call. Only one output is in memory at a time.
        before: a model with the same names, for a column to compare with: the model before training, or
            before its expansion. It gets the inputs in its own dtype.
        unfolding: how a kernel becomes a matrix, see ``fxexpand.lowrank.measures.unfold``.
        centered: subtract the mean of the features (double-centre the kernel).
        sketched: a number of singular values by which larger weights (smaller side more than twice this) are
            measured, at a fraction of the time, with bounds; see ``fxexpand.lowrank.sketch``. By default all
            measures are exact.

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
            same = _dtype(before) == _dtype(model)
            given = inputs if same else arguments.move(inputs, dtype=_dtype(before))
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
            except (UnusableWeightError, SelectionError) as error:  # the latter for an empty weight
                raise type(error)(f"{name} ({kind}): {error}") from None


def _weight_row(
    name: str, kind: str, weight: Tensor, groups: int, unfolding: Unfolding, sketched: int | None
) -> WeightRank:
    bounds = None
    matrices = measures.unfold(weight, unfolding, groups=groups)
    full = groups * min(matrices.shape[1:])
    if sketched is not None and groups == 1 and full > 2 * sketched:
        directions = torch.Generator(weight.device).manual_seed(0)  # leaves the user's random state alone
        found = sketch(matrices[0], sketched, generator=directions)
        spectrum = torch.tensor(found.values, dtype=torch.float64, device="cpu")
        scale = torch.tensor(found.scale, dtype=torch.float64, device="cpu")
        interval = found.effective_rank()
        bounds = (interval.low, interval.high)
    else:
        spectrum, scale = measures.scaled_spectrum(weight, groups=groups, unfolding=unfolding)
    return WeightRank(
        name=name,
        kind=kind,
        shape=tuple(weight.shape),
        full_rank=full,
        **measures.summary_of(spectrum),
        numerical_rank=int(measures.numerical_of(spectrum, measures.rounding_unit(matrices))),
        energy_rank=int(measures.energy_of(spectrum, ENERGY)),
        nuclear_norm=float(spectrum.sum() * scale),
        bounds=bounds,
    )


def _feature_rows(model: nn.Module, inputs: ExampleInputs, centered: bool) -> list[FeatureRank]:
    points = arguments.batch_size(inputs)
    if points is None or points < 2:
        raise SelectionError(f"rank report: {points or 'no'} input; the rank of features needs two or more.")
    found: dict[str, FeatureRank] = {}
    layers = list(_layers(model))

    def measure(name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        values = next(iter(tensors_of(output)), None)
        if name in found or values is None or not values.numel() or not values.is_floating_point():
            return
        if values.ndim < 2 or values.shape[0] != points:
            return  # not one output per input, such as the packed sequences of a recurrent layer
        kind = _kind(module)
        try:
            spectrum = kernel_spectrum(values, centered=centered)
        except UnusableWeightError:
            raise UnusableWeightError(f"{name} ({kind}): its outputs hold NaN or Inf.") from None
        distance = float(kernel_rank(values, "cosine_distance", centered=centered))
        figures = {**measures.summary_of(spectrum), "cosine_distance": distance}
        found[name] = FeatureRank(name, kind, values.shape[0], values[0].numel(), **figures)

    with ExitStack() as hooks, evaluating(model):
        for name, module in layers:
            hooks.enter_context(module.register_forward_hook(partial(measure, name)))
        arguments.call(model, arguments.copy(inputs))
    return [found[name] for name, _ in layers if name in found]


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights are reported, by path, without the factors inside them."""
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
    """(name, kind, weight (out, in/groups, *k), groups) of each weight, without the factors of a weight.

    Call it while ``evaluating``: in training mode reading a weight is a step of a power iteration (spectral
    norm), and an expansion with a BatchNorm has no single weight.

    Raises: UnusableWeightError: a lazy layer that has not run.
    """
    for path, module in _layers(model):
        kind = _kind(module)
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            weights: Iterable[tuple[str, Tensor]] = _attention_weights(module)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            layers = module._all_weights if isinstance(module, nn.RNNBase) else [CELL]
            names = (name for names in layers for name in names if name.startswith("weight"))
            weights = ((name, getattr(module, name)) for name in names)
        else:
            weight, groups = module.weight, getattr(module, "groups", 1)
            assert isinstance(weight, Tensor)
            if is_lazy(weight):
                place = f"{prefix}weight ({kind})"
                raise UnusableWeightError(
                    f"{place}: is not initialised yet (lazy). Run the model once first."
                )
            weight = weight.detach()  # a weight that is computed from factors is computed once here
            groups = groups if isinstance(groups, int) else 1
            weight = exchanged(weight, groups) if isinstance(module, _ConvTransposeNd) else weight
            yield f"{prefix}weight", kind, weight, groups
            continue
        for name, weight in weights:
            yield f"{prefix}{name}", kind, weight, 1


def _attention_weights(module: nn.MultiheadAttention) -> Iterator[tuple[str, Tensor]]:
    packed: Tensor | None = module.in_proj_weight
    if packed is None:
        for part in "qkv":
            yield f"{part}_proj_weight", getattr(module, f"{part}_proj_weight")
    else:
        for part, weight in zip("qkv", packed.chunk(3), strict=True):
            yield f"in_proj_weight[{part}]", weight


def _has_one_weight(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | _ConvNd | nn.Embedding | nn.EmbeddingBag):
        return True
    # A property computes the weight of a rewritten layer. It does so for a parametrized module too, which is
    # not reported unless its class is one of those above.
    if is_parametrized(module) or not isinstance(getattr(type(module), "weight", None), property):
        return False
    weight = module.weight
    return isinstance(weight, Tensor) and weight.ndim >= 2
