"""Factored layers: a Linear, convolution or Embedding that runs two smaller ones, one after the other.

The layer is rewritten in place (see ``layers.rewritten``). Its parameters are those of the two factors, under
``0`` and ``1``: ``fc.weight`` and ``fc.bias`` become ``fc.0.weight``, ``fc.1.weight`` and ``fc.1.bias``. A
state dict with the original names loads too: the weight is factored at the rank that the layer has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxexpand.kernel.algebra import Kernel, cast, compose
from fxexpand.kernel.lower import laid_out_as, to_module
from fxexpand.kernel.modules import kernel_of
from fxexpand.layers.rewritten import Rewritten, kernel_like, rewrite_layer, subclasses
from fxexpand.lowrank.cuts import Cut, factors_of, matrix_of
from fxexpand.lowrank.projection import spectrum


class Rows(nn.Module):
    """``x @ weight`` for a weight ``(in, out)``: a Linear stored transposed.

    It is the second factor of an Embedding whose table is also the weight of a Linear: with ``table = A B``,
    ``A (tokens, r)`` and ``B (r, d)``, the Embedding has the factors A and Rows(B), and the Linear B and A.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """``(*, in)`` to ``(*, out)``."""
        return x @ self.weight

    def extra_repr(self) -> str:
        """The sizes, in the words of a Linear."""
        return f"in_features={self.weight.shape[0]}, out_features={self.weight.shape[1]}"


class Product(Tensor):
    """An effective weight whose product is computed by each operator that reads its values.

    Its dtype, device and shape, which transformers' T5 and CLIP read in each forward, cost no product. As it
    is a subclass, torch's TransformerEncoderLayer does not take its fast path, which would read the values.
    """

    _value: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: Tensor, grad: bool, value: Callable[[], Tensor]) -> Product:
        made: Product = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=like.dtype, device=like.device, requires_grad=grad
        )
        made._value = value
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Metadata comes from this tensor; any other function runs on the product."""
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For operators that ``__torch_function__`` does not see, as those of a compiled function."""
        args, kwargs = tree_map_only(Product, lambda product: product._value(), (args, kwargs or {}))
        return func(*args, **kwargs)


METADATA: set[Any] = {  # functions that read no values
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "is_cuda")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex}


class Factorized(Rewritten):
    """Base class of the factored layers; comes before the class of the layer.

    Attributes:
        cut: where the kernel was cut, and the rank.

    ``weight`` and ``bias`` are the effective ones: computed at every read, so they are for reading. Writing
    into ``weight``, or assigning to it, is an error, as another weight may have another rank.
    """

    factor_names = ("0", "1")
    computed = ("weight", "bias")
    attributes = ("cut",)
    moved: ClassVar[Mapping[str, str]] = {"bias": "1.bias"}
    traced_inside = True
    status = "factorized already; its factors are layers of their own"

    cut: Cut

    def forward(self, input: Tensor) -> Tensor:
        """Runs the first factor, then the second."""
        output: Tensor = self.get_submodule("1")(self.get_submodule("0")(input))
        return output

    def _effective_weight(self) -> Tensor:
        one, two = (self.get_submodule(name)._parameters.get("weight") for name in "01")
        if torch.compiler.is_compiling() or type(one) is not nn.Parameter or type(two) is not nn.Parameter:
            return self._multiplied()  # under a compiler, for shards, and for factors that compute a weight
        out = two.shape[1 if isinstance(self._modules["1"], Rows) else 0]
        shape = (out, one.shape[1], *getattr(self, "kernel_size", ()))
        if isinstance(self, nn.Embedding):
            shape = (one.shape[0], out)
        grad = torch.is_grad_enabled() and (one.requires_grad or two.requires_grad)
        return Product(shape, one, grad, lambda: self._writable("weight", self._multiplied(), False))

    def _multiplied(self) -> Tensor:
        first, second = self._modules["0"], self._modules["1"]
        assert first is not None and second is not None
        if isinstance(first, nn.Embedding):
            assert isinstance(second, Rows | nn.Linear)
            return first.weight @ (second.weight if isinstance(second, Rows) else second.weight.mT)
        return compose(_kernel_of(second), _kernel_of(first)).weight

    def _effective_bias(self) -> Tensor | None:
        return self.get_submodule("1")._parameters.get("bias")

    def _original_shape(self) -> torch.Size:
        return self._effective_weight().shape

    def factor(self, weight: Tensor) -> dict[str, Tensor]:
        """The weights of both factors of ``weight``, at the rank that the layer has."""
        kernel = kernel_like(self, weight)
        left, right = spectrum(matrix_of(kernel, self.cut.scheme)).factors(self.cut.rank)
        first, second = factor_kernels(kernel, self.cut, left, right)
        one, two = first.weight, second.weight
        if isinstance(self, nn.Embedding):
            one, two = table_factors(self, first, second)
        return {"0.weight": one, "1.weight": two.mT if isinstance(self._modules["1"], Rows) else two}

    def reset_parameters(self) -> None:
        """Draw the factors as torch does for layers of their sizes."""
        for part in self._modules.values():
            if isinstance(part, Rows):
                nn.init.kaiming_uniform_(part.weight.mT, a=5**0.5)
            elif part is not None:
                part.reset_parameters()  # type: ignore[operator]

    def extra_repr(self) -> str:
        """The sizes that the original layer shows, and the cut."""
        return f"{super().extra_repr()}, cut={self.cut.scheme}:{self.cut.rank}".removeprefix(", ")


FACTORIZED = subclasses(Factorized, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding))


def _kernel_of(factor: nn.Module) -> Kernel:
    """The kernel of a factor; an expansion or a parametrization may compute its weight."""
    weight = factor.weight if isinstance(getattr(type(factor), "weight", None), property) else None
    return kernel_like(factor, weight) if isinstance(weight, Tensor) else kernel_of(factor)


def factor_kernels(kernel: Kernel, cut: Cut, left: Tensor, right: Tensor) -> tuple[Kernel, Kernel]:
    """The kernels of both factors, in the dtype and layout of ``kernel``."""
    parts = (cast(part, kernel.weight.dtype) for part in factors_of(kernel, cut.scheme, left, right))
    first, second = (replace(part, weight=laid_out_as(part.weight, kernel.weight)) for part in parts)
    return first, second


def table_factors(module: nn.Embedding, first: Kernel, second: Kernel) -> tuple[Tensor, Tensor]:
    """The narrower table ``(tokens, r)`` and the weight ``(d, r)`` of the Linear after it."""
    table = second.weight
    if module.padding_idx is not None:
        table[module.padding_idx] = 0.0  # rounding must not leave values in a row that gets no gradient
    return table, first.weight.mT.contiguous()


def factors(module: nn.Module, cut: Cut, left: Tensor, right: Tensor) -> tuple[nn.Module, nn.Module]:
    """Two stock layers whose product ``left @ right`` replaces the weight of ``module``.

    The second one has the bias parameter of the layer itself.

    Args:
        module: a Linear, ConvNd or Embedding of an exact type.
        left: ``(g, m, r)``, in float64; see ``fxexpand.lowrank.cuts``.
        right: ``(g, r, n)``.
    """
    old = module._parameters["weight"]
    assert old is not None
    kernels = factor_kernels(kernel_like(module, old.detach()), cut, left, right)
    if isinstance(module, nn.Embedding):
        one, two = table_factors(module, *kernels)
        padding, grows = module.padding_idx, module.scale_grad_by_freq
        first: nn.Module = nn.Embedding(
            len(one), one.shape[1], padding, scale_grad_by_freq=grows, _weight=one
        )
        second: nn.Module = nn.Linear(two.shape[1], two.shape[0], bias=False, device="meta")
        second.weight = nn.Parameter(two)
    else:
        first, second = map(to_module, kernels)
    for part in (first, second):
        part.requires_grad_(old.requires_grad)
        part.train(module.training)
    if not isinstance(module, nn.Embedding):
        second._parameters["bias"] = module._parameters["bias"]
    return first, second


def tied_factors(
    module: nn.Module, cut: Cut, left: Tensor, right: Tensor, like: tuple[nn.Module, nn.Module]
) -> tuple[nn.Module, nn.Module]:
    """``factors`` for another owner of a shared weight, with the parameters of the first owner's factors."""
    first, second = factors(module, cut, left, right)
    table = isinstance(like[0], nn.Embedding)
    if isinstance(module, nn.Embedding) == table:
        first._parameters["weight"] = like[0]._parameters["weight"]
        second._parameters["weight"] = like[1]._parameters["weight"]
    elif table:
        raise AssertionError("the Linear of a tied group comes first")
    else:  # the Embedding of a table that is the weight of a Linear: see ``Rows``
        first._parameters["weight"] = like[1]._parameters["weight"]
        shared = like[0]._parameters["weight"]
        assert isinstance(shared, nn.Parameter)
        second = Rows(shared).train(module.training)
    return first, second


def factorize_layer(module: nn.Module, first: nn.Module, second: nn.Module, cut: Cut) -> None:
    """Turn a layer of an exact type in ``FACTORIZED`` into its factored subclass, in place; cannot fail."""
    rewrite_layer(module, FACTORIZED[type(module)], {"0": first, "1": second}, cut=cut)
