"""Rewritten layers: layers whose class and parameters were replaced in place by factors of their weight.

The module object stays, with its name, hooks, training flag and owners; only its class becomes a subclass of
its old class, as in torch.nn.utils.parametrize. Its ``weight`` is then computed from factors, which are child
modules. Code that meets such a layer asks the attributes of ``Rewritten``, not for the kind of the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.modules import LAYERS, kernel_of, stock_layer
from fxexpand.layers.effective import (
    effective_weight,
    fuse_first,
    is_computed,
    read_in_forward,
    replaced_by_tool,
)
from fxexpand.running.finite import require_finite

Kind = TypeVar("Kind", bound="type[Rewritten]")


class Rewritten(nn.Module):
    """Base class of the rewritten layers, before the class of the layer among the bases.

    Attributes:
        factor_names: the child modules that hold the factors.
        computed: the parameters of the original layer that the factors replace.
        attributes: the plain attributes that ``rewrite_layer`` sets and ``restore_layer`` deletes.
        moved: other keys of an original state dict, with the keys of the same tensors among the factors.
        traced_inside: whether the factors are layers of their own: a graph of the model calls them in place
            of the layer, and passes change them one by one.
        status: the reason in a report for leaving such a layer alone.

    ``weight`` and ``bias`` are the effective ones, differentiable in the factors.
    """

    factor_names: ClassVar[tuple[str, ...]]
    computed: ClassVar[tuple[str, ...]]
    attributes: ClassVar[tuple[str, ...]]
    moved: ClassVar[Mapping[str, str]] = {}
    traced_inside: ClassVar[bool] = False
    status: ClassVar[str]

    # Any: the properties replace attributes of the classes after this one.
    @property
    def weight(self) -> Any:
        """The effective weight, in the original shape and layout."""
        return self._writable("weight", self._effective_weight(), read_in_forward())

    @property
    def bias(self) -> Any:
        """The effective bias, with the share of the factors."""
        return self._writable("bias", self._effective_bias(), read_in_forward())

    def _writable(self, name: str, value: Tensor | None, plain: bool) -> Any:
        """``value`` as a tensor into which one can write, if factors compute it."""
        if plain or value is None or not is_computed(value):
            return value
        return effective_weight(value, partial(self._assign, name), partial(self._train_factors, name))

    def _assign(self, name: str, value: Tensor) -> None:
        """Let the factors compute ``value``. Raises: AttributeError: they cannot."""
        raise AttributeError(self._reason(name))

    def _train_factors(self, name: str, requires_grad: bool) -> None:
        if name == "bias":  # has a share of a norm, whose scale is that of the weight
            raise fuse_first(name, self._status(), not self.traced_inside)
        for part in self.factors():
            part.requires_grad_(requires_grad)

    def _status(self) -> str:
        return f"is computed from the factors ({' and '.join(self.factor_names)})"

    def _reason(self, name: str) -> str:
        return (
            f"{type(self).__name__}.{name} is that of the factors, which a new one would not change. "
            "Load a state dict with the original names, or assign to the factors "
            f"({' and '.join(self.factor_names)})."
        )

    def _effective_weight(self) -> Tensor:
        raise NotImplementedError

    def _effective_bias(self) -> Tensor | None:
        raise NotImplementedError

    def _original_shape(self) -> torch.Size:
        return effective_shape(self)

    def factor(self, weight: Tensor) -> dict[str, Tensor]:
        """Values of the factors for ``weight``, by their keys in the state dict of the layer."""
        raise NotImplementedError

    def factors(self) -> list[nn.Module]:
        """The child modules that hold the factors."""
        return [self.get_submodule(name) for name in self.factor_names]

    def remaining_layer(self) -> nn.Module | None:
        """The first factor if all others have become identities: it computes the whole layer."""
        first, *others = self.factors()
        return first if others and all(type(other) is nn.Identity for other in others) else None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """See ``nn.Module``; called for assignments too.

        Raises: AttributeError: a parameter that the factors compute, so that nothing would read this one.
        """
        replaced = replaced_by_tool(name, self.computed)
        if replaced is not None:
            self._parameters.setdefault(replaced, None)  # weight_norm has deleted it
            raise fuse_first(replaced, self._status(), not self.traced_inside)
        if name in self.computed:
            raise AttributeError(self._reason(name))
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in ("weight", "bias"):  # torch.nn.utils.parametrize deletes a parameter before replacing it
            raise fuse_first(name, self._status(), not self.traced_inside)
        super().__delattr__(name)

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
        key = f"{prefix}weight"
        if key in state_dict:
            current = {
                f"{prefix}{name}.{inner}": value
                for name, part in zip(self.factor_names, self.factors(), strict=True)
                for inner, value in part.state_dict().items()
            }
            error_msgs += replace_original(
                state_dict,
                key,
                current,
                shape=self._original_shape(),
                kind=original_class(self).__name__,
                factor=lambda value: {f"{prefix}{k}": each for k, each in self.factor(value).items()},
                assigned=local_metadata.get("assign_to_params_buffers", False),
            )
            for old, new in self.moved.items() if key not in state_dict else ():
                if f"{prefix}{old}" in state_dict:
                    state_dict[f"{prefix}{new}"] = state_dict.pop(f"{prefix}{old}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def subclasses(base: Kind, originals: Iterable[type[nn.Module]]) -> dict[type[nn.Module], Kind]:
    """A subclass of ``base`` and of each stock class, by the stock class: ``ExpandedLinear`` for ``Linear``.

    They become attributes of the module of ``base``, where pickles look for them.
    """
    made: dict[type[nn.Module], Kind] = {}
    for original in originals:
        name = f"{base.__name__}{original.__name__}"
        members = {"__module__": base.__module__, "__doc__": f"See ``{base.__name__}``."}
        made[original] = type(name, (base, original), members)  # type: ignore[assignment]
        setattr(sys.modules[base.__module__], name, made[original])
    return made


def rewrite_layer(
    module: nn.Module, kind: type[Rewritten], factors: Mapping[str, nn.Module], **attributes: Any
) -> None:
    """Turn a layer into ``kind``, a subclass of its class, in place; nothing can fail.

    Args:
        factors: by the ``factor_names`` of ``kind``.
        attributes: values for the ``attributes`` of ``kind``.
    """
    module.__class__ = kind
    for name in module._parameters.keys() & set(kind.computed):
        module._parameters[name] = None  # keeps its place, so that restoring keeps the order of the keys
    module._modules.update(factors)
    module.__dict__.update(attributes)


def restore_layer(module: Rewritten, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Undo ``rewrite_layer`` with the given weight and bias, in place; nothing can fail."""
    for name in module.factor_names:
        del module._modules[name]
    for name in module.attributes:
        module.__dict__.pop(name, None)
    module.__class__ = original_class(module)
    module._parameters.update(weight=weight, bias=bias)


def replace_original(
    state_dict: dict[str, Any],
    key: str,
    current: Mapping[str, Tensor],
    *,
    shape: torch.Size,
    kind: str,
    factor: Callable[[Tensor], Mapping[str, Tensor]],
    assigned: bool,
) -> list[str]:
    """Replace the original parameter ``key`` of a checkpoint by its factors; returns torch's error messages.

    Nothing is done where there is no such tensor, or the checkpoint has factors. A tensor of the wrong shape
    is replaced by the current factors, so that they are not missing too.

    Args:
        current: the factors as they are, by their keys in the checkpoint.
        shape: of the parameter.
        kind: class of the layer, for messages.
        factor: from a value to the factors, by the same keys.
        assigned: the loaded tensors become the parameters, with their own dtype and device.

    Raises: UnusableWeightError: the tensor holds NaN or Inf.
    """
    given = state_dict.get(key)
    if not isinstance(given, Tensor) or any(name in state_dict for name in current):
        return []
    del state_dict[key]
    if given.shape != shape:
        state_dict.update(current)
        return [
            f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, "
            f"the shape in current model is {shape}."
        ]
    require_finite(given, key, kind)
    value, like = given.detach(), next(each for each in current.values() if each.is_floating_point())
    if not assigned:
        value = value.to(value.device if like.is_meta else like.device, like.dtype)
    state_dict.update(factor(value))
    return []


def original_class(module: nn.Module) -> Any:
    """The stock class of a layer, rewritten or not; ``fully_shard`` puts one of its own before the others."""
    return next(cls for cls in type(module).__mro__ if cls in LAYERS or cls is nn.Embedding)


def bare(module: nn.Module, weight: Tensor) -> nn.Module:
    """A stock layer with the geometry of ``module``, and ``weight`` in the original layout; no bias."""
    return stock_layer(original_class(module), module, weight=weight, bias=None)


def kernel_like(module: nn.Module, weight: Tensor) -> Kernel:
    """The kernel of a layer, rewritten or not, with this weight and no bias; an Embedding's is its table."""
    return Kernel(weight) if isinstance(module, nn.Linear | nn.Embedding) else kernel_of(bare(module, weight))


def effective_shape(module: Any) -> torch.Size:
    """The shape of the weight of a Linear or convolution, from the sizes that the layer keeps."""
    if isinstance(module, nn.Linear):
        return torch.Size((module.out_features, module.in_features))
    rows, columns = module.out_channels, module.in_channels // module.groups
    if isinstance(module, _ConvTransposeNd):
        rows, columns = module.in_channels, module.out_channels // module.groups
    return torch.Size((rows, columns, *module.kernel_size))
