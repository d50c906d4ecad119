"""Expanded layers: a Linear or convolution whose weight is the product of trainable factors.

The layer is rewritten in place (see ``layers.rewritten``): its weight is computed from ``expansion``, a plain
nn.Sequential of stock layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxexpand.errors import FxExpandError, InexactError
from fxexpand.kernel.algebra import native_weight
from fxexpand.kernel.lower import is_channels_last, laid_out_as
from fxexpand.kernel.modules import LAYERS
from fxexpand.layers.effective import require_unpacked
from fxexpand.layers.products import (
    MatrixChain,
    Plan,
    ProductCache,
    Run,
    exact_products,
    matrix_chain,
    surely_below,
)
from fxexpand.layers.rewritten import Rewritten, effective_shape, kernel_like, rewrite_layer, subclasses
from fxexpand.layers.sharding import placed_as, sharded_part
from fxexpand.recipes import Recipe, fold, has_norm
from fxexpand.recipes.structure import chain_macs, fold_cost, leaves, telling_weight
from fxexpand.running.finite import require_finite

Form: TypeAlias = Literal["auto", "chain", "collapsed"]
FORMS: tuple[Form, ...] = get_args(Form)
WHOLE: Run = (0, -1)  # all factors of a block that is not a chain of matrices
# A convolution rearranges its weight for the processor, forwards and backwards. Where the weight has this
# many times more rows than the activations, matrix products on the unfolded input are faster: twice as fast
# in the last stage of ResNet-18, 512 -> 2048 channels at 128 positions, on a CPU.
UNFOLD_BELOW = 8

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Expanded(Rewritten):
    """Base class of the expanded layers; comes before the class of the layer.

    Attributes:
        expansion: the training-time block, without the layer's bias.
        recipe: the recipe of the block; it factors the weight of an original checkpoint too.
        form: ``"chain"`` runs the factors on activations; ``"collapsed"`` multiplies them first and runs one
            kernel; ``"auto"`` takes the evaluation plan of fewest FLOPs for the shape of the input, which may
            multiply some of the factors only.

    ``weight`` and ``bias`` are the effective ones, differentiable in the factors. Assigning a tensor to
    ``weight``, or writing into it in place, factors the new value. With a BatchNorm inside, reading them in
    training mode is an InexactError: no single weight exists.

    A product is computed once per forward, in the dtype of the factors whatever autocast says. Backward needs
    the factors, the product and, from three factors on, the products in between, each smaller than a factor:
    memory for activations does not grow with the depth. Where ``"auto"`` leaves factors apart, the values
    between them are kept instead. That plan is the cheaper one for few positions only, so these values are
    fewer than the factors on both sides have elements on average (hidden widths not below the outer ones).
    """

    factor_names = ("expansion",)
    computed = ("weight",)
    attributes = ("recipe", "form", "normed", "collapse_from", "chain", "product_cache")
    status = "expanded already"

    expansion: nn.Sequential
    recipe: Recipe
    form: Form
    normed: bool  # the block contains a BatchNorm
    collapse_from: float  # number of output positions from which one product costs fewer FLOPs
    chain: MatrixChain | None  # the block as a chain of matrices, if it is one
    product_cache: ProductCache | None  # set by ``accumulate``

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "held" in self.__dict__:  # saved before the cache and the plans had their names
            del self.__dict__["held"]
            self.__dict__.update(chain=matrix_chain(self.expansion), product_cache=None)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """The weight, laid out as in the original layer, and the bias."""
        own, overridden = self._parameters["bias"], self._parameters["weight"]
        if overridden is not None:  # by torch.func.functional_call, under the original name
            return overridden, own
        if not self.normed:
            return self._product(WHOLE if self.chain is None else self.chain.whole), own
        weight, bias = self._folded()
        return weight, bias if own is None or bias is None else bias + own

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of any block, by the kernel laws."""
        with exact_products(next(self.expansion.parameters())):
            try:
                kernel = fold(self.expansion)
            except InexactError as error:
                raise InexactError(
                    f"{type(self).__name__}: no single weight stands for this layer: {error}"
                ) from None
        return laid_out_as(native_weight(kernel), telling_weight(self.expansion)), kernel.bias

    def _product(self, run: Run) -> Tensor:
        """The weight of consecutive factors."""
        if self.product_cache is None:
            return self._computed_product(run)
        return self.product_cache.leaf(run, partial(self._computed_product, run))

    def _computed_product(self, run: Run) -> Tensor:
        layers: Any = list(self.expansion)
        if self.chain is None or any(_is_changed(layer) for layer in layers):
            if sharded_part(self.expansion) is not None:
                raise FxExpandError(
                    f"{type(self).__name__}: its factors are sharded one by one, and nothing gathers them "
                    "for a product. Call fully_shard on the layer, or on the block around it."
                )
            return self._folded()[0]  # refuses a factor that is not a stock layer any more
        weights = [layer.weight for layer in layers]
        with exact_products(weights[0]):
            return self.chain.product(weights, run)

    def _effective_weight(self) -> Tensor:
        return self.effective()[0]

    def _effective_bias(self) -> Tensor | None:
        own = self._parameters["bias"]
        if not self.normed or hasattr(own, "device_mesh"):  # fully_shard looks for the sharded parameter
            return own
        try:
            return self.effective()[1]
        except InexactError:  # torch reads the attribute of each name in a state dict, in training mode too
            return own

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the original layer; extra arguments are those of a transposed convolution (``output_size``)."""
        plan = self._plan(input)
        if plan is None:
            return self._on_activations(input, *args, **kwargs)
        if len(plan) > 1:
            return self._in_runs(input, plan)
        output: Tensor = super().forward(input, *args, **kwargs)
        return output

    def _plan(self, x: Tensor) -> Plan | None:
        """The evaluation plan for an input; None runs the block on activations."""
        whole = (WHOLE if self.chain is None else self.chain.whole,)
        if self._parameters["weight"] is not None:  # overridden: see ``effective``
            return whole
        if self.form != "auto":
            return whole if self.form == "collapsed" else None
        factors = self.expansion if self.chain is not None else leaves(self.expansion)
        if (self.normed and self.training) or any(_is_hooked(layer) for layer in factors):
            return None
        positions = _positions(self, x) * (1 if self.product_cache is None else self.product_cache.batches)
        if self.chain is not None:
            return self.chain.plan(positions)
        return None if surely_below(positions, self.collapse_from) else whole

    def _on_activations(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A BatchNorm would take the channels of an unbatched image for a batch.
        unbatched = self.normed and isinstance(self, _ConvNd) and x.ndim == len(self.kernel_size) + 1
        first, *others = self.expansion
        output: Tensor = first(x.unsqueeze(0) if unbatched else x, *args, **kwargs)
        for part in others:
            output = part(output)
        output = output.squeeze(0) if unbatched else output
        own = self._parameters["bias"]
        if own is None:
            return output
        return output + (own.view(-1, *(1,) * len(self.kernel_size)) if isinstance(self, _ConvNd) else own)

    def _in_runs(self, x: Tensor, plan: Plan) -> Tensor:
        """Applies the product of each run of factors in turn; all but the first are pointwise."""
        layer: Any = self
        first, *others = [self._product(run) for run in plan]
        own = self._parameters["bias"]
        if isinstance(self, nn.Linear):
            rows = F.linear(x, first)
        elif _unfolds(self, x, first):
            return _on_rows(self, x, [first, *others], own)
        else:
            rows = layer._conv_forward(x, first, None)
        for weight in others:
            bias = own if weight is others[-1] else None
            if isinstance(self, nn.Linear):
                rows = F.linear(rows, weight, bias)
            else:
                rows = _CONV[weight.ndim - 2](rows, weight, bias, groups=layer.groups)
        return rows

    def factor(self, weight: Tensor) -> dict[str, Tensor]:
        """Values of the block's parameters and buffers for which its product is ``weight``."""
        with exact_products(weight):
            block = self.recipe.build(kernel_like(self, weight.detach()))
        return {f"expansion.{key}": value for key, value in block.state_dict().items()}

    def reset_parameters(self) -> None:
        """Draw the factors as the paper of the recipe does, and the bias as the original layer does."""
        like = next(self.expansion.parameters())
        empty = torch.empty(effective_shape(self), dtype=like.dtype, device=like.device)
        block = self.recipe.build(kernel_like(self, empty), init="kaiming")
        own = self._parameters["bias"]
        with torch.no_grad():
            self._set_factors({f"expansion.{key}": value for key, value in block.state_dict().items()})
            if own is not None:
                bound = 1.0 / math.sqrt(math.prod(empty.shape[1:]))
                own.uniform_(-bound, bound)

    def _set_factors(self, values: Mapping[str, Tensor]) -> None:
        targets = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with torch.no_grad():
            for key, value in values.items():
                targets[key].copy_(placed_as(value, targets[key]))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and (value is None or isinstance(value, nn.Parameter)):
            self._parameters["bias"] = value  # nn.Module would read the effective bias first
            return
        if name == "weight" and isinstance(value, Tensor):
            self._assign(name, value)
        else:
            super().__setattr__(name, value)

    def _assign(self, name: str, value: Tensor) -> None:
        if name == "bias":  # with a share of the factors, which stays
            self._shift_bias(value)
            return
        if value.shape != effective_shape(self):
            expected = tuple(effective_shape(self))
            raise ValueError(f"weight: shape {tuple(value.shape)} instead of {expected}.")
        require_unpacked(value, self._status())
        if not value.is_leaf:  # torch.nn.utils.weight_norm assigns one before each forward
            raise TypeError(
                "weight: is computed from other tensors, which would not train. Assign weight.detach(), or "
                "compute the weight from others before the layer is expanded."
            )
        require_finite(value, "weight", type(self).__name__.removeprefix("Expanded"))
        self._set_factors(self.factor(value))

    def _shift_bias(self, value: Tensor) -> None:
        own, now = self._parameters["bias"], self._effective_bias()
        if own is None or now is None:
            raise AttributeError(
                f"{type(self).__name__}.bias is that of the BatchNorm in the factors, and the layer has no "
                "bias of its own. Write into the BatchNorm, or fuse the layer first."
            )
        own.add_(value - now)

    def extra_repr(self) -> str:
        """The sizes that the original layer shows, and the recipe."""
        original = super().extra_repr() if not self.normed else ""
        return f"{original}, recipe={self.recipe}, form={self.form}".removeprefix(", ")


EXPANDED = subclasses(Expanded, LAYERS)


def expand_layer(module: nn.Module, expansion: nn.Sequential, recipe: Recipe, form: Form) -> None:
    """Turn a layer of an exact type in ``EXPANDED`` into its expanded subclass, in place; cannot fail."""
    saved = chain_macs(expansion) - module.get_parameter("weight").numel()
    rewrite_layer(
        module,
        EXPANDED[type(module)],
        {"expansion": expansion.train(module.training)},
        recipe=recipe,
        form=form,
        normed=has_norm(expansion),
        collapse_from=fold_cost(expansion) / saved if saved > 0 else math.inf,
        chain=matrix_chain(expansion),
        product_cache=None,
    )


def _is_changed(layer: nn.Module) -> bool:
    """Whether a factor is not a stock layer any more, or a hook computes its weight."""
    return type(layer) not in LAYERS or _is_hooked(layer)


def _is_hooked(layer: nn.Module) -> bool:
    """Whether each call computes the weight of a factor, as weight_norm, prune and parametrize do."""
    layers = type(layer) in LAYERS or "parametrizations" in layer._modules
    return layers and layer._parameters.get("weight") is None


def _positions(module: Any, x: Tensor) -> float:
    """The number of output positions for ``x``, over the batch; of input positions if transposed."""
    if isinstance(module, nn.Linear):
        return x.numel() / module.in_features
    if isinstance(module, _ConvTransposeNd):
        return x.numel() / module.in_channels
    size = _output_size(module, x)
    return math.prod(size) * (x.shape[0] if x.ndim > len(size) + 1 else 1)


def _output_size(module: Any, x: Tensor) -> list[int]:
    """Output lengths of a plain convolution."""
    lengths = x.shape[-len(module.kernel_size) :]
    if module.padding == "same":
        return list(lengths)
    padding = (0,) * len(lengths) if module.padding == "valid" else module.padding
    geometry = zip(lengths, module.kernel_size, module.stride, padding, module.dilation, strict=True)
    return [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in geometry]


def _unfolds(module: Any, x: Tensor, first: Tensor) -> bool:
    """Whether the factors run as matrices on the unfolded input."""
    plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    if not plain or x.ndim != 4 or isinstance(module.padding, str):
        return False
    return surely_below(UNFOLD_BELOW * _positions(module, x), first.shape[0] + 1)


def _on_rows(module: Any, x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    """Applies ``weights`` in turn to the patches of ``x``, each patch a row of a matrix."""
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    for weight in weights[:-1]:
        rows = F.linear(rows, weight.reshape(weight.shape[0], -1))
    rows = F.linear(rows, weights[-1].flatten(1), bias)
    output = rows.view(x.shape[0], *_output_size(module, x), len(weights[-1])).permute(0, 3, 1, 2)
    return output if is_channels_last(x) else output.contiguous()
