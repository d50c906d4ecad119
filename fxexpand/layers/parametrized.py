"""Expansion in weight space: a parameter that is computed from factors, whichever module reads it.

Weights that no expanded layer can replace are expanded so: embeddings, packed attention projections,
recurrent weights, layers with their own forward, weights shared by several modules, plain parameters used in
F.linear or matmul. ``torch.nn.utils.parametrize`` replaces the parameter by a property, so every reader sees
the product. A GraphModule takes no property: its graph calls the ParametrizationList instead.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.lower import laid_out_as
from fxexpand.layers.effective import (
    effective_weight,
    fuse_first,
    is_computed,
    read_in_forward,
    replaced_by_tool,
    require_unpacked,
)
from fxexpand.layers.products import ProductCache, exact_products, matrix_chain, unhooked, version
from fxexpand.layers.rewritten import replace_original
from fxexpand.layers.sharding import is_sharded, placed_as
from fxexpand.recipes import Recipe, fold
from fxexpand.running.finite import require_finite

LISTS = "parametrizations"  # the child that holds a module's ParametrizationLists, as torch names it
STATUS = "is computed from the factors in ``parametrizations``"
_ORDER = "_fxexpand_order"  # attribute with the order of a module's parameters before any was expanded


@dataclass(frozen=True)
class View:
    """How a parameter is read as a kernel, and back.

    Attributes:
        shape: of the parameter.
        kind: ``"matrix"``: ``(*batch, out, in)``, every matrix of the batch a block of its own; ``"conv"``:
            ``(out, in/groups, *k)``; ``"conv_transpose"``: ``(in, out/groups, *k)``; ``"flat"``:
            ``(out, ...)`` with all other dimensions as inputs.
        transposed: a matrix stored as ``(*batch, in, out)``.
        blocks: number of maps whose matrices are stacked (query, key and value; the gates of an LSTM).
        groups: of a convolution.
    """

    shape: torch.Size
    kind: Literal["matrix", "flat", "conv", "conv_transpose"] = "matrix"
    transposed: bool = False
    blocks: int = 1
    groups: int = 1

    def kernel(self, parameter: Tensor) -> Kernel:
        """The parameter as a kernel, one group per block."""
        if self.kind == "conv":
            return Kernel(parameter, groups=self.groups)
        if self.kind == "conv_transpose":
            grouped = parameter.reshape(self.groups, -1, *self.shape[1:])
            return Kernel(grouped.transpose(1, 2).flatten(0, 1), groups=self.groups)
        if self.kind == "flat":
            return Kernel(parameter.reshape(self.shape[0], -1, 1))
        matrices = parameter.mT if self.transposed else parameter
        rows, columns = matrices.shape[-2:]
        batch = math.prod(self.shape[:-2]) * self.blocks
        return Kernel(matrices.reshape(batch * rows // self.blocks, columns, 1), groups=batch)

    def parameter(self, weight: Tensor) -> Tensor:
        """The inverse: a parameter of ``shape`` from the weight of a kernel."""
        if self.kind in ("conv", "flat"):
            return weight.reshape(self.shape)
        if self.kind == "conv_transpose":
            blocks = weight.reshape(self.groups, self.shape[1], -1, *self.shape[2:])
            return blocks.transpose(1, 2).reshape(self.shape)
        *batch, rows, columns = self.shape
        if self.transposed:
            return weight.reshape(*batch, columns, rows).mT
        return weight.reshape(self.shape)


class WeightExpansion(nn.Module):
    """A parametrization: parameter = product of factors. ``right_inverse`` is the factorisation.

    Args:
        view: how the parameter is read as a kernel.
        recipe: builds the factors.
        block: built for the parameter; its weights become the originals of the parametrization.
    """

    def __init__(self, view: View, recipe: Recipe, block: nn.Sequential) -> None:
        super().__init__()
        self.view = view
        self.recipe = recipe
        self.product_cache: ProductCache | None = None  # set by ``accumulate``
        self._chain = matrix_chain(block)
        self._planned: tuple[Tensor, ...] | None = tuple(p.detach() for p in block.parameters())
        # In a list, so that torch does not register it as a submodule: it has a structure, but no values.
        self._structure = [block.to("meta")]

    def forward(self, *factors: Tensor) -> Tensor:
        """The parameter, in its own shape; the same tensor at every read within ``kept_product``."""
        if self.product_cache is not None:
            return self.product_cache.leaf("weight", partial(self._product, *factors))
        if torch.compiler.is_compiling() or self not in _KEPT.products:
            return self._product(*factors)
        versions = [(id(factor), *version(factor)) for factor in factors]
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *versions
        kept = _KEPT.products[self]
        if kept is None or kept[0] != key:
            _KEPT.products[self] = kept = key, factors, self._product(*factors)
        return kept[2]

    def _product(self, *factors: Tensor) -> Tensor:
        with exact_products(factors[0]), unhooked():
            if self._chain is not None:
                product = self._chain.product(factors, self._chain.whole)
            else:
                product = fold(self._structure[0], factors).weight
            weight = self.view.parameter(product)
        return laid_out_as(weight, factors[0])

    @contextmanager
    def kept_product(self) -> Iterator[None]:
        """Compute the product at the first read only. (A compiler finds equal products by itself.)"""
        if self in _KEPT.products:  # a forward within a forward of the same module
            yield
            return
        _KEPT.products[self] = None
        try:
            yield
        finally:
            del _KEPT.products[self]

    @property
    def structure(self) -> nn.Sequential:
        """The block, on the meta device; its parameters are the factors, in their order."""
        return self._structure[0]

    def right_inverse(self, value: Tensor) -> tuple[Tensor, ...]:
        """Factors whose product is ``value``."""
        if self._planned is not None:
            planned, self._planned = self._planned, None
            return planned
        if value.shape != self.view.shape:
            raise ValueError(f"weight: shape {tuple(value.shape)} instead of {tuple(self.view.shape)}.")
        require_unpacked(value, STATUS)
        require_finite(value, "weight", "x".join(map(str, self.view.shape)))
        return self.factor(value)

    def factor(self, value: Tensor) -> tuple[Tensor, ...]:
        """Factors for ``value``, from the recipe."""
        with exact_products(value):
            block = self.recipe.build(self.view.kernel(value.detach()))
        return tuple(factor.detach() for factor in block.parameters())

    def folded(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The parameter, multiplied in ``dtype``."""
        wide = [factor.detach().to(dtype) for factor in factors]
        return laid_out_as(self.view.parameter(fold(self._structure[0], wide).weight), factors[0])

    def block(self, factors: Sequence[Tensor]) -> nn.Module:
        """The block with these factors, to run on activations."""
        block = copy.deepcopy(self._structure[0]).to_empty(device=factors[0].device)
        for target, factor in zip(block.parameters(), factors, strict=True):
            target.data = factor.detach()
        return block

    def extra_repr(self) -> str:
        """The recipe and the shape."""
        return f"{tuple(self.view.shape)}, recipe={self.recipe}"


class FactorList(parametrize.ParametrizationList):
    """The factors of a parameter. Parametrizations of one tensor can follow, which ``fuse`` refuses."""

    def append(self, module: nn.Module) -> Self:
        """See ``nn.ModuleList``. Raises: AttributeError: one of several tensors, as weight_norm."""
        if len(inspect.signature(module.forward).parameters) > 1:
            raise fuse_first("weight", STATUS)
        return super().append(module)


class _KeptProducts(threading.local):
    """The expansions whose module this thread runs, each with (key of the factors, factors, product).

    Each thread has its own: two threads that train one model must not go backwards through the same graph.
    """

    def __init__(self) -> None:
        self.products: dict[WeightExpansion, tuple[Any, tuple[Tensor, ...], Tensor] | None] = {}


_KEPT = _KeptProducts()


def expand_weight(owners: Sequence[tuple[nn.Module, str, bool]], expansion: WeightExpansion) -> None:
    """Replace a parameter by ``expansion`` in every module that owns it, with one set of factors for all.

    Args:
        owners: each with the name of the parameter in it, and whether only generated code reads it there,
            which then has to call ``parametrizations.<name>``.
    """
    first, attribute, _ = owners[0]
    shared = FactorList([expansion], first.get_parameter(attribute), unsafe=True)
    for module, name, generated in owners:
        module.__dict__.setdefault(_ORDER, list(module._parameters))
        if generated:
            del module._parameters[name]
            module._modules.setdefault(LISTS, nn.Module())
        else:
            parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
            _extend_class(module, [name])
        module.get_submodule(LISTS)._modules[name] = shared.train(module.training)
        hooks = module._load_state_dict_pre_hooks.values()
        if load_original not in [getattr(hook, "hook", None) for hook in hooks]:
            module.register_load_state_dict_pre_hook(load_original)  # type: ignore[no-untyped-call]


def restore_weight(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Undo ``expand_weight`` for one owner.

    ``parametrize.remove_parametrizations`` deletes the property from a class that deep copies of the module
    share, which would break them; here the module gets another class.
    """
    lists, cls = module.get_submodule(LISTS)._modules, type(module)
    del lists[name]
    if not lists:
        del module._modules[LISTS]
    if name in vars(cls) and lists:  # a class of parametrize, which has a property for each parameter
        members = {
            key: value for key, value in vars(cls).items() if key not in (name, "__dict__", "__weakref__")
        }
        module.__class__ = type(cls.__name__, cls.__bases__, members)
    elif name in vars(cls):
        module.__class__ = cls.__bases__[0]
    module.register_parameter(name, parameter)
    order: list[str] = module.__dict__.get(_ORDER, [])
    for key in sorted(module._parameters, key=lambda key: order.index(key) if key in order else len(order)):
        module._parameters[key] = module._parameters.pop(key)
    if not list(expanded_weights(module)):
        module.__dict__.pop(_ORDER, None)
        _drop_hooks(module)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def expanded_weights(
    module: nn.Module,
) -> Iterator[tuple[str, parametrize.ParametrizationList, WeightExpansion]]:
    """(name, its ParametrizationList, its expansion) of each parameter that is expanded in weight space."""
    lists = getattr(module, LISTS, None)
    for name, parametrization in lists._modules.items() if isinstance(lists, nn.Module) else ():
        if isinstance(parametrization, parametrize.ParametrizationList):
            expansion = parametrization[0]
            if isinstance(expansion, WeightExpansion):
                yield name, parametrization, expansion


def originals(parametrization: parametrize.ParametrizationList) -> list[Tensor]:
    """The factors of a parameter."""
    return [getattr(parametrization, f"original{i}") for i in range(parametrization.ntensors)]


def load_original(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """A hook before loading: the original parameter in a checkpoint is replaced by its factors."""
    error_msgs: list[str] = _[-1]
    for name, parametrization, expansion in expanded_weights(module):
        inside = f"{prefix}{LISTS}.{name}.original"
        error_msgs += replace_original(
            state_dict,
            prefix + name,
            _numbered(inside, originals(parametrization)),
            shape=expansion.view.shape,
            kind=type(module).__name__.removeprefix("Parametrized"),
            factor=partial(_factored, expansion, inside),
            assigned=local_metadata.get("assign_to_params_buffers", False),
        )


def _factored(expansion: WeightExpansion, inside: str, value: Tensor) -> dict[str, Tensor]:
    return _numbered(inside, expansion.factor(value))


def _numbered(inside: str, factors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{inside}{i}": factor for i, factor in enumerate(factors)}


def _extend_class(module: nn.Module, names: Iterable[str]) -> None:
    """Add to the class that parametrize made for ``module``: one product per forward, writes, and pickling.

    Some modules read a weight several times, as nn.MultiheadAttention does to choose its kernel. And torch
    refuses to pickle such a class, which has no address.
    """
    cls: Any = type(module)
    original = cls.__bases__[0].forward

    @wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        with ExitStack() as stack:
            for _, _, expansion in expanded_weights(self):
                stack.enter_context(expansion.kept_product())
            return original(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        base = cls.__bases__[0]
        state = base.__getstate__(self) if hasattr(base, "__getstate__") else self.__dict__
        return _new, (base,), state, None, None, _unpickled

    def register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
        expanded = [expanded for expanded, _, _ in expanded_weights(self)]
        replaced = replaced_by_tool(name, expanded)
        if replaced is not None:
            raise fuse_first(replaced, STATUS)
        if name in expanded and param is not None:  # an assignment; torch has no setter for parameters
            getattr(cls, name).fset(self, param.detach())
        else:
            cls.__bases__[0].register_parameter(self, name, param)

    cls.forward, cls.__reduce_ex__, cls.register_parameter = forward, reduce, register_parameter
    for name in names:
        setattr(cls, name, _writable(name, vars(cls)[name]))
    if isinstance(module, nn.RNNBase):
        _compute_flat_weights(module)


def _writable(name: str, given: Any) -> property:
    """The property ``given`` of parametrize, whose value, read outside a forward, one can write into."""

    def read(self: Any) -> Tensor:
        value: Tensor = given.fget(self)
        weights: Any = self.get_submodule(LISTS)._modules[name]
        if read_in_forward() or weights[0] in _KEPT.products or not is_computed(value):
            return value
        return effective_weight(value, partial(write, self), weights.requires_grad_)

    def write(self: Any, value: Tensor) -> None:
        weights: Any = self.get_submodule(LISTS)._modules[name]
        if not any(map(is_sharded, originals(weights))):
            given.fset(self, value)
            return
        with torch.no_grad():  # torch replaces the storage
            for factor, target in zip(weights[0].right_inverse(value), originals(weights), strict=True):
                target.copy_(placed_as(factor, target))

    return property(read, write)


def _new(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _unpickled(module: Any, state: dict[str, Any]) -> None:
    """Give a new module of the original class the class that computes the weights, and its attributes."""
    parametrize._inject_new_class(module)
    for name in state["_modules"][LISTS]._modules:
        parametrize._inject_property(module, name)
    _extend_class(module, state["_modules"][LISTS]._modules)
    module.__setstate__(state)


def _compute_flat_weights(module: nn.RNNBase) -> None:
    """Let a recurrent layer collect its weights at every use: a kept product would have an old graph."""

    def collect(self: nn.RNNBase) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def ignore(self: nn.RNNBase, weights: list[Tensor | None]) -> None:
        pass

    cls: Any = type(module)  # made for this module by parametrize
    cls._flat_weights = property(collect, ignore)
    cls._update_flat_weights = lambda self: None
    module.__dict__.pop("_flat_weights", None)


def _drop_hooks(module: nn.Module) -> None:
    loads: dict[int, Any] = module._load_state_dict_pre_hooks
    for key in [key for key, hook in loads.items() if hook.hook is load_original]:
        del loads[key]
