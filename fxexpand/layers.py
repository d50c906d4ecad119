"""Expanded layers: a Linear or convolution whose weight is the product of trainable factors.

The module object stays what it was, hooks, training flag and owners included; only its class becomes the
subclass here of its old class, as torch.nn.utils.parametrize does it. Its ``weight`` is then computed, and
the factors live in ``expansion``, a plain nn.Sequential of stock layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxexpand.errors import InexactError
from fxexpand.kernel import macs, native_weight
from fxexpand.lower import laid_out_as
from fxexpand.ops import kernel_of
from fxexpand.recipes import Recipe, fold, has_norm
from fxexpand.recipes.structure import fold_cost, leaves

Form: TypeAlias = Literal["auto", "chain", "collapsed"]
FORMS: tuple[Form, ...] = get_args(Form)


class Expanded(nn.Module):
    """What the expanded layers have in common; mixed in before the class of the layer.

    Attributes:
        expansion: the training-time block, without the layer's bias.
        recipe: what built it; used again when an original checkpoint is loaded.
        form: ``"chain"`` runs the factors on activations; ``"collapsed"`` multiplies them first and runs one
            kernel; ``"auto"`` takes what costs fewer FLOPs for the shape of the input.

    ``weight`` and ``bias`` are the effective ones, differentiable in the factors. Assigning a tensor to
    ``weight`` factors it; writing into it in place does nothing, as with torch.nn.utils.parametrize. With a
    BatchNorm inside, reading them in training mode is an InexactError: no single weight exists.
    """

    expansion: nn.Sequential
    recipe: Recipe
    form: Form
    normed: bool  # a BatchNorm is inside
    collapse_from: float  # positions of the output from which one product pays off

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Effective weight, laid out as in the original layer, and bias."""
        with exact_products(next(self.expansion.parameters())):
            try:
                kernel = fold(self.expansion)
            except InexactError as error:
                raise InexactError(
                    f"{type(self).__name__}: no single weight stands for this layer: {error}"
                ) from None
        bias, own = kernel.bias, self._parameters["bias"]
        if bias is None:
            bias = own
        elif own is not None:
            bias = bias + own
        first: Any = next(leaves(self.expansion)).weight
        return laid_out_as(native_weight(kernel), first), bias

    def _effective_weight(self) -> Tensor:
        return self.effective()[0]

    def _effective_bias(self) -> Tensor | None:
        return self.effective()[1] if self.normed else self._parameters["bias"]

    # Any: they take the place of what are attributes in the layers below.
    weight: Any = property(_effective_weight, doc="The effective weight, laid out as in the original layer.")
    bias: Any = property(_effective_bias, doc="The layer's own bias, plus what a BatchNorm inside adds.")

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """As the original layer; extra arguments are those of a transposed convolution (``output_size``)."""
        if self._collapses(x):
            collapsed: Tensor = super().forward(x, *args)
            return collapsed
        first, *others = self.expansion
        output: Tensor = first(x, *args)
        for part in others:
            output = part(output)
        own = self._parameters["bias"]
        if own is None:
            return output
        return output + (own.view(-1, *(1,) * len(self.kernel_size)) if isinstance(self, _ConvNd) else own)

    def _collapses(self, x: Tensor) -> bool:
        if self.form != "auto":
            return self.form == "collapsed"
        if self.normed and self.training:
            return False
        return _positions(self, x) >= self.collapse_from

    def factor(self, weight: Tensor) -> list[Tensor]:
        """Values of the block's parameters and buffers, in order, with which it computes ``weight``."""
        block = self.recipe.build(kernel_of(bare(self, weight.detach())))
        return [*block.parameters(), *block.buffers()]

    def reset_parameters(self) -> None:
        """Random factors as in the recipe's paper, and a bias as the original layer draws it."""
        like = next(self.expansion.parameters())
        empty = torch.empty(effective_shape(self), dtype=like.dtype, device=like.device)
        block = self.recipe.build(kernel_of(bare(self, empty)), init="kaiming")
        own = self._parameters["bias"]
        with torch.no_grad():
            _copy(self.expansion, [*block.parameters(), *block.buffers()])
            if own is not None:
                bound = 1.0 / math.sqrt(math.prod(effective_shape(self)[1:]))
                own.uniform_(-bound, bound)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" or not isinstance(value, Tensor):
            super().__setattr__(name, value)
            return
        if value.shape != effective_shape(self):
            expected = tuple(effective_shape(self))
            raise ValueError(f"weight: shape {tuple(value.shape)} instead of {expected}.")
        with torch.no_grad():
            _copy(self.expansion, self.factor(value))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads an original checkpoint too: ``weight`` is factored, so the function is the original's."""
        inside = f"{prefix}expansion."
        given = state_dict.get(f"{prefix}weight")
        if isinstance(given, Tensor) and not any(key.startswith(inside) for key in state_dict):
            del state_dict[f"{prefix}weight"]
            expected = effective_shape(self)
            if given.shape != expected:
                error_msgs.append(size_mismatch(f"{prefix}weight", given.shape, expected))
                state_dict.update({inside + key: value for key, value in self.expansion.state_dict().items()})
            else:
                assigned = local_metadata.get("assign_to_params_buffers", False)
                like = given if assigned else next(self.expansion.parameters())
                block = self.recipe.build(kernel_of(bare(self, given.detach().to(like.device, like.dtype))))
                state_dict.update({inside + key: value for key, value in block.state_dict().items()})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """The original's, and the recipe."""
        original = super().extra_repr() if not self.normed else ""
        return f"{original}, recipe={self.recipe}, form={self.form}".removeprefix(", ")


class ExpandedLinear(Expanded, nn.Linear):
    """See ``Expanded``."""


class ExpandedConv1d(Expanded, nn.Conv1d):
    """See ``Expanded``."""


class ExpandedConv2d(Expanded, nn.Conv2d):
    """See ``Expanded``."""


class ExpandedConv3d(Expanded, nn.Conv3d):
    """See ``Expanded``."""


class ExpandedConvTranspose1d(Expanded, nn.ConvTranspose1d):
    """See ``Expanded``."""


class ExpandedConvTranspose2d(Expanded, nn.ConvTranspose2d):
    """See ``Expanded``."""


class ExpandedConvTranspose3d(Expanded, nn.ConvTranspose3d):
    """See ``Expanded``."""


EXPANDED: dict[type[nn.Module], type[Expanded]] = {
    cls.__bases__[1]: cls
    for cls in (
        ExpandedLinear,
        ExpandedConv1d,
        ExpandedConv2d,
        ExpandedConv3d,
        ExpandedConvTranspose1d,
        ExpandedConvTranspose2d,
        ExpandedConvTranspose3d,
    )
}


def expand_layer(module: nn.Module, expansion: nn.Sequential, recipe: Recipe, form: Form) -> None:
    """Turn a layer of an exact type in ``EXPANDED`` into its expanded subclass, in place; cannot fail."""
    original = macs(kernel_of(module))
    module.__class__ = EXPANDED[type(module)]
    module._parameters["weight"] = None  # keeps its place, so that folding restores the order of the keys
    module._modules["expansion"] = expansion.train(module.training)
    saved = sum(macs(kernel_of(part)) for part in leaves(expansion) if not _is_norm(part)) - original
    module.__dict__.update(
        recipe=recipe,
        form=form,
        normed=has_norm(expansion),
        collapse_from=fold_cost(expansion) / saved if saved > 0 else math.inf,
    )


def restore_layer(module: Expanded, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Undo ``expand_layer`` with the given weight and bias, in place; nothing can fail."""
    del module._modules["expansion"]
    for name in ("recipe", "form", "normed", "collapse_from"):
        del module.__dict__[name]
    module.__class__ = type(module).__mro__[2]
    module._parameters["weight"] = weight
    module._parameters["bias"] = bias


def bare(module: nn.Module, weight: Tensor) -> nn.Module:
    """A stock layer with the geometry of an expanded one, and ``weight`` in the original layout; no bias."""
    base: Any = type(module).__mro__[2]
    layer: nn.Module = base.__new__(base)
    layer.__dict__.update(module.__dict__)
    layer.__dict__.update(_parameters={"weight": nn.Parameter(weight), "bias": None}, _modules={})
    return layer


def effective_shape(module: Any) -> torch.Size:
    """The shape of the original weight."""
    if isinstance(module, nn.Linear):
        return torch.Size((module.out_features, module.in_features))
    rows, columns = module.out_channels, module.in_channels // module.groups
    if isinstance(module, _ConvTransposeNd):
        rows, columns = module.in_channels, module.out_channels // module.groups
    return torch.Size((rows, columns, *module.kernel_size))


def size_mismatch(key: str, given: torch.Size, expected: torch.Size) -> str:
    """torch's own words for a tensor of the wrong shape in a checkpoint."""
    return (
        f"size mismatch for {key}: copying a param with shape {given} from checkpoint, "
        f"the shape in current model is {expected}."
    )


def exact_products(like: Tensor) -> AbstractContextManager[Any]:
    """No autocast: a half-precision product would add its rounding once per factor."""
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _copy(block: nn.Module, values: list[Tensor]) -> None:
    for target, value in zip([*block.parameters(), *block.buffers()], values, strict=True):
        target.copy_(value)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _positions(module: Any, x: Tensor) -> float:
    """About how many output positions the layer has for ``x``, over the batch."""
    if isinstance(module, nn.Linear):
        return x.numel() / module.in_features
    steps = 1 if isinstance(module, _ConvTransposeNd) else math.prod(module.stride)
    return float(x.numel() / (module.in_channels * steps))
