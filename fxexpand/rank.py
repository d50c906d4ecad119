"""Effective rank: how many directions a matrix really uses.

With singular values ``s_i`` and ``p_i = s_i / sum(s)``, the spectral entropy is ``-sum(p_i ln p_i)`` (nats)
and the effective rank its exponential: ``r`` equal singular values have effective rank ``r``.

Source: O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
M. Huh et al., "The Low-Rank Simplicity Bias in Deep Networks", TMLR 2023, plot the entropy itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxexpand.errors import SelectionError, UnusableWeightError
from fxexpand.table import table

Kind = Literal["roy", "entropy", "stable"]


def effective_rank(matrix: Tensor, kind: Kind = "roy", *, groups: int = 1, batched: bool = False) -> Tensor:
    """The effective rank of a matrix or kernel, as a float64 scalar that gradients flow through.

    Args:
        matrix: ``(out, in)``, or a kernel ``(out, in/groups, *k)``, read as ``(out, in/groups * prod(k))``.
        kind: ``"roy"`` (exponential of the spectral entropy), ``"entropy"`` (in nats) or ``"stable"``
            (``||W||_F^2 / ||W||_2^2``).
        groups: of a grouped kernel. Its map is block-diagonal: its singular values are those of all blocks.
        batched: take ``matrix`` as a batch ``(*batch, out, in)``; the result has shape ``(*batch,)``.

    A zero matrix has rank 0 of either kind and entropy 0.

    Raises:
        UnusableWeightError: for NaN, Inf, or a tensor without values (meta device).
        SelectionError: for an unknown kind, fewer than two dimensions or groups that do not divide ``out``.
    """
    spectrum = _spectrum(matrix, groups, batched)
    if kind == "stable":
        return _stable_rank(spectrum)
    entropy = _entropy(spectrum)
    if kind == "entropy":
        return entropy
    if kind == "roy":
        return _roy(spectrum, entropy)
    raise SelectionError(f"kind={kind!r}: choose 'roy', 'entropy' or 'stable'.")


def spectral_entropy(matrix: Tensor, *, groups: int = 1, batched: bool = False) -> Tensor:
    """The entropy in nats of the normalised singular values; see ``effective_rank``."""
    return effective_rank(matrix, "entropy", groups=groups, batched=batched)


def stable_rank(matrix: Tensor, *, groups: int = 1, batched: bool = False) -> Tensor:
    """``||W||_F^2 / ||W||_2^2``, blind to small singular values; see ``effective_rank``."""
    return effective_rank(matrix, "stable", groups=groups, batched=batched)


@dataclass(frozen=True)
class WeightRank:
    """The ranks of one weight; ``shape`` is in the order ``(out, in/groups, *k)``."""

    name: str
    kind: str
    shape: tuple[int, ...]
    full_rank: int
    effective_rank: float
    entropy: float
    stable_rank: float


@dataclass(frozen=True)
class RankReport:
    """The ranks of every weight of a model, in the model's order."""

    rows: tuple[WeightRank, ...]

    def __str__(self) -> str:
        head = ("weight", "kind", "shape", "full", "effective", "share", "entropy", "stable")
        return table(
            head,
            [
                (
                    row.name,
                    row.kind,
                    "x".join(map(str, row.shape)),
                    str(row.full_rank),
                    f"{row.effective_rank:.2f}",
                    f"{row.effective_rank / row.full_rank:.1%}",
                    f"{row.entropy:.3f}",
                    f"{row.stable_rank:.2f}",
                )
                for row in self.rows
            ],
            left=(0, 1),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"weights": [{**asdict(row), "shape": list(row.shape)} for row in self.rows]}


def rank_report(model: nn.Module) -> RankReport:
    """The effective rank of every Linear, convolution, embedding, attention and recurrent weight.

    Weights are read through ``module.weight``: on an expanded layer or a parametrized one that is the
    effective weight, one row under the layer's own name. A packed attention projection is three rows.

    Raises: UnusableWeightError: for a weight with NaN or Inf; the message names it.
    """
    rows = []
    with torch.no_grad():
        for name, kind, weight, groups in _weights(model):
            try:
                spectrum = _spectrum(weight, groups, batched=False)
            except UnusableWeightError as error:
                raise UnusableWeightError(f"{name} ({kind}): {error}") from None
            entropy = _entropy(spectrum)
            rows.append(
                WeightRank(
                    name=name,
                    kind=kind,
                    shape=tuple(weight.shape),
                    full_rank=spectrum.shape[-1],
                    effective_rank=float(_roy(spectrum, entropy)),
                    entropy=float(entropy),
                    stable_rank=float(_stable_rank(spectrum)),
                )
            )
    return RankReport(tuple(rows))


def _weights(model: nn.Module) -> Iterator[tuple[str, str, Tensor, int]]:
    """(name, kind, weight (out, in/groups, *k), groups) of each weight; factors of a weight are left out."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside) and inside:
            continue
        kind = type(module).__name__.removeprefix("Parametrized")
        prefix = f"{path}." if path else ""
        if _has_one_weight(module):
            weight: Tensor = module.weight
            groups = getattr(module, "groups", 1)
            groups = groups if isinstance(groups, int) else 1
            if isinstance(module, _ConvTransposeNd):
                blocks = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, in/groups, out/groups, *k)
                weight = blocks.transpose(1, 2).flatten(0, 1)
            yield f"{prefix}weight", kind, weight, groups
            inside = (*inside, f"{path}.")
        elif isinstance(module, nn.MultiheadAttention):
            packed: Tensor | None = module.in_proj_weight
            if packed is not None:
                for part, weight in zip("qkv", packed.chunk(3), strict=True):
                    yield f"{prefix}in_proj_weight[{part}]", kind, weight, 1
            else:
                for part in "qkv":
                    yield f"{prefix}{part}_proj_weight", kind, getattr(module, f"{part}_proj_weight"), 1
        elif isinstance(module, nn.RNNBase):
            for name in (n for names in module._all_weights for n in names if n.startswith("weight")):
                yield f"{prefix}{name}", kind, getattr(module, name), 1


def _has_one_weight(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | _ConvNd | nn.Embedding | nn.EmbeddingBag):
        return True
    # An expanded layer need not be a subclass of the layer it replaces: its weight is computed by a property.
    if not isinstance(getattr(type(module), "weight", None), property):
        return False
    weight = module.weight
    return isinstance(weight, Tensor) and weight.ndim >= 2


def _spectrum(matrix: Tensor, groups: int, batched: bool) -> Tensor:
    """Singular values in float64, ``(*batch, n)``; for a grouped kernel those of all its blocks."""
    if matrix.ndim < 2:
        raise SelectionError(f"effective rank of shape {tuple(matrix.shape)}: give at least two dimensions.")
    if 0 in matrix.shape:
        raise SelectionError(f"effective rank of an empty tensor of shape {tuple(matrix.shape)}.")
    if batched and groups != 1:
        raise SelectionError("effective rank: groups are for a single kernel, batched is for plain matrices.")
    if groups < 1 or (not batched and matrix.shape[0] % groups):
        raise SelectionError(f"effective rank: groups={groups} does not divide out={matrix.shape[0]}.")
    if matrix.is_meta:
        raise UnusableWeightError("is on the meta device and has no values. Materialise the model first.")
    if not bool(torch.isfinite(matrix).all()):
        raise UnusableWeightError("holds NaN or Inf. Load a sound checkpoint, or exclude it.")
    wide = matrix if matrix.device.type != "mps" else matrix.cpu()  # MPS has no float64
    wide = wide.to(torch.complex128 if matrix.is_complex() else torch.float64)
    if batched:
        return _singular_values(wide)
    blocks = wide.reshape(groups, matrix.shape[0] // groups, prod(matrix.shape[1:]))
    return _singular_values(blocks).flatten()


def _singular_values(matrices: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(matrices)
    return values


def _entropy(spectrum: Tensor) -> Tensor:
    total = spectrum.sum(-1, keepdim=True)
    share = spectrum / torch.where(total > 0, total, torch.ones_like(total))
    # 0 ln 0 = 0, in the gradient too: a 1 in the place of the 0 has no entropy.
    return -(share * torch.where(share > 0, share, torch.ones_like(share)).log()).sum(-1)


def _roy(spectrum: Tensor, entropy: Tensor) -> Tensor:
    return torch.where(spectrum.sum(-1) > 0, entropy.exp(), torch.zeros_like(entropy))


def _stable_rank(spectrum: Tensor) -> Tensor:
    largest = spectrum.amax(-1, keepdim=True)
    return (spectrum / torch.where(largest > 0, largest, torch.ones_like(largest))).square().sum(-1)
