"""How a module uses the parameters it holds: which of them are weights of linear maps.

One rule serves two readers. The forward is traced with all children kept whole or, where it has no graph, the
model runs once and every torch function is watched. Either way operations come in order, and of each value it
is known which parameters it holds (reshaped, transposed, scaled, cast) and whether it depends on the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxexpand.errors import FxExpandError
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.tracing import Failed, TraceOptions, record

Kind: TypeAlias = Literal[
    "linear",
    "conv",
    "conv_transpose",
    "matmul",
    "einsum",
    "tensordot",
    "bilinear",
    "embedding",
    "attention",
    "recurrent",
    "other",
    "unused",
]


class UnknownUse(FxExpandError):
    """A forward has no graph, so how it uses its parameters is not known; the message is the reason."""


@dataclass(frozen=True)
class Use:
    """What a parameter is for.

    Attributes:
        kind: the linear map it is the weight of; ``"other"``: of none; ``"unused"``: nothing reads it.
        operator: the function it reaches: the linear one, else the first that is more than a change of shape.
        transposed: stored as ``(in, out)``, as in ``x @ W``.
    """

    kind: Kind
    operator: str
    transposed: bool = False


def parameter_uses(module: nn.Module) -> dict[str, Use]:
    """How the forward of ``module`` uses its own parameters of two dimensions or more.

    Names are as in ``module.named_parameters()``: ``"weight"``, or ``"weights.0"`` of a ParameterList. A
    child's parameter appears (``"qkv.weight"``) where this forward reads it itself, as in
    ``F.linear(x, self.qkv.weight)``.

    Raises: UnknownUse: the forward has no graph.
    """
    outcome = record(module, TraceOptions(leaf=lambda name, child: True, faithful=False))
    if isinstance(outcome, Failed):
        raise UnknownUse(outcome.reason) from outcome.cause
    flow = _Flow()
    values: dict[fx.Node, _Value | None] = {}
    parameters = _matrices(module)
    read: set[int] = set()

    def lookup(argument: Any) -> _Value | None:
        return values[argument] if isinstance(argument, fx.Node) else None

    for node in outcome.graph_module.graph.nodes:
        if node.op == "get_attr":
            parameter = parameters.get(node.target)
            values[node] = NEITHER if parameter is None else flow.hold(parameter)
            read.add(id(parameter))
        elif node.op == "placeholder":
            values[node] = DATA
        elif node.op in ("output", "call_module"):
            name = "output" if node.op == "output" else type(module.get_submodule(node.target)).__name__
            flow.stop(name, map(lookup, tree_leaves((node.args, node.kwargs))))
            values[node] = DATA
        else:
            name = _function_name(node.target) if node.op == "call_function" else node.target
            values[node] = flow.step(name, node.args, node.kwargs, lookup)
    own = _own_names(module)
    return {
        name: flow.use(parameter)
        for name, parameter in parameters.items()
        if name in own or id(parameter) in read
    }


def observed_uses(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Use]:
    """How a run of ``model`` uses its parameters of two dimensions or more, under all their dotted names.

    The run is in evaluation mode and leaves no trace. It sees what Python calls, nothing inside scripted or
    compiled modules.
    """
    parameters = _matrices(model)
    watch = _Watch(parameters.values(), model.buffers())
    with evaluating(model), watch:
        call(model, copy_inputs(example_inputs))
    return {name: watch.flow.use(parameter) for name, parameter in parameters.items()}


class _Value(NamedTuple):
    """What is known of a value.

    Attributes:
        held: the parameters it holds, by id, each with whether its last two dimensions are swapped.
        data: whether it depends on the inputs.
    """

    held: Mapping[int, bool]
    data: bool


DATA = _Value({}, True)
NEITHER = _Value({}, False)  # buffers, constants, statistics of parameters


class _Slot(NamedTuple):
    """An argument of a linear operator that can be its weight.

    Attributes:
        position, keyword: of the argument.
        transposed: the operator takes it as ``(in, out)``.
        sure: it is the weight whatever it was computed from; else only if it does not depend on the inputs.
    """

    position: int
    keyword: str
    transposed: bool = False
    sure: bool = False


def _linear_operators() -> dict[str, tuple[Kind, tuple[_Slot, ...]]]:
    weight = (_Slot(1, "weight", sure=True),)
    table: dict[str, tuple[Kind, tuple[_Slot, ...]]] = {"linear": ("linear", weight)}
    for rank in (1, 2, 3):
        table[f"conv{rank}d"] = ("conv", weight)
        table[f"conv_transpose{rank}d"] = ("conv_transpose", weight)
    for name, keyword in (("matmul", "other"), ("mm", "mat2"), ("bmm", "mat2"), ("imatmul", "other")):
        table[name] = ("matmul", (_Slot(0, "input"), _Slot(1, keyword, True)))
    table["rmatmul"] = ("matmul", (_Slot(0, "input", True), _Slot(1, "other")))
    table["convolution"] = ("conv", weight)
    for name in ("grouped_mm", "grouped_mm_fallback"):  # experts; the second is a fallback of transformers
        table[name] = ("matmul", (_Slot(0, "mat_a"), _Slot(1, "mat_b", True)))
    table["mv"] = ("matmul", (_Slot(0, "input"),))
    table["inner"] = ("matmul", (_Slot(0, "input"), _Slot(1, "other")))
    for name, factors in (("addmm", "mat"), ("baddbmm", "batch"), ("addbmm", "batch")):
        table[name] = ("matmul", (_Slot(1, f"{factors}1"), _Slot(2, f"{factors}2", True)))
    table["addmv"] = ("matmul", (_Slot(1, "mat"),))
    table["tensordot"] = ("tensordot", (_Slot(0, "a"), _Slot(1, "b", True)))
    table["bilinear"] = ("bilinear", (_Slot(2, "weight", sure=True),))
    for name in ("embedding", "embedding_bag"):
        table[name] = ("embedding", (_Slot(1, "weight", True, sure=True),))
        table[f"aten.{name}"] = ("embedding", (_Slot(0, "weight", True, sure=True),))
    projections = [_Slot(-1, f"{name}_proj_weight", sure=True) for name in "qkv"]
    packed = (_Slot(5, "in_proj_weight", sure=True), _Slot(11, "out_proj_weight", sure=True))
    table["multi_head_attention_forward"] = ("attention", (*packed, *projections))
    for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        table[f"{kind}_cell"] = ("recurrent", (_Slot(2, "w_ih", sure=True), _Slot(3, "w_hh", sure=True)))
    return table


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


LINEAR = _linear_operators()
ATEN_FIRST = (
    "embedding",
    "embedding_bag",
)  # operators that take the weight first, where the functions do not
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# What changes the shape, type or scale of its first argument, or normalises it.
SHAPE = _words(
    "reshape view reshape_as view_as flatten unflatten unsqueeze squeeze expand expand_as contiguous clone",
    "t T mT H mH adjoint transpose swapaxes swapdims permute movedim moveaxis einops.rearrange",
    "chunk split split_with_sizes tensor_split unbind narrow select getitem pad",
    "flip roll repeat repeat_interleave tile einops.repeat",
    "to type type_as float double half bfloat16 detach data real neg",
    "normalize batch_norm layer_norm group_norm instance_norm rms_norm",
)
FLIPS = _words("t T mT H mH adjoint")
BINARY = _words(
    "add radd iadd sub rsub isub subtract mul rmul imul multiply",
    "div rdiv truediv rtruediv itruediv divide true_divide",
)
JOIN = _words("cat concat concatenate stack hstack vstack dstack column_stack row_stack")
# Reads of sizes and the like: no use of the values.
SIZES = _words(
    "shape size dim ndim ndimension numel nelement stride len dtype device layout",
    "is_contiguous is_floating_point is_cuda is_meta requires_grad grad",
)


class _Flow:
    """Follows parameters from operation to operation."""

    def __init__(self) -> None:
        self._parameters: dict[int, Tensor] = {}
        self._uses: dict[int, Use] = {}
        self._stops: dict[int, str] = {}

    def hold(self, parameter: Tensor) -> _Value:
        """The value of a parameter itself."""
        self._parameters[id(parameter)] = parameter
        return _Value({id(parameter): False}, False)

    def use(self, parameter: Tensor) -> Use:
        """The verdict on a parameter: its first linear use, else the first thing done with it."""
        stopped = self._stops.get(id(parameter))
        other = Use("unused", "nothing") if stopped is None else Use("other", stopped)
        return self._uses.get(id(parameter), other)

    def stop(self, operator: str, values: Iterable[_Value | None]) -> None:
        """Note that what these values hold goes no further than ``operator``."""
        for value in values:
            for key in value.held if value is not None else ():
                self._stops.setdefault(key, operator)

    def step(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        lookup: Callable[[Any], _Value | None],
    ) -> _Value | None:
        """What the result of an operation holds; None for a number, or where no tensor goes in.

        Args:
            name: of the function or method; dunders and in-place variants count as what they do.
            lookup: what an argument holds, None for what is no tensor.
        """
        if name == "getattr":
            name, args = args[1], args[:1]
        name = name.strip("_") if "." not in name else name
        if name in SIZES:
            return None
        values = [lookup(leaf) for leaf in tree_leaves((args, kwargs))]
        operands = [value for value in values if value is not None]
        if not operands:
            return None
        result = DATA if any(value.data for value in operands) else NEITHER
        if not any(value.held for value in operands):
            return result
        if name in ("einsum", "einops.einsum"):
            self._einsum(args, lookup)
        elif name in RECURRENT:
            weights = args[2] if isinstance(args[3], bool) else args[3]
            self._linear("recurrent", name, [(lookup(weight), False) for weight in tree_leaves(weights)])
        elif name in LINEAR:
            kind, slots = LINEAR[name]
            if name == "convolution" and args[6]:
                kind = "conv_transpose"
            given = [(lookup(_argument(args, kwargs, slot)), slot) for slot in slots]
            weights = [(v, s.transposed) for v, s in given if v is not None and (s.sure or not v.data)]
            self._linear(kind, name, weights)
        else:
            through = self._through(name, args, kwargs, lookup, result)
            if through is not None:
                return through
        self.stop(name, operands)
        return result

    def _linear(self, kind: Kind, name: str, weights: Sequence[tuple[_Value | None, bool]]) -> None:
        for value, transposed in weights:
            for key, flipped in value.held.items() if value is not None else ():
                self._uses.setdefault(key, Use(kind, name, transposed != flipped))

    def _through(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        lookup: Callable[[Any], _Value | None],
        result: _Value,
    ) -> _Value | None:
        """What the result holds of what went in; None where it holds no parameter."""
        first, *rest = [*args, *kwargs.values()]
        if name in SHAPE:
            value = lookup(first)
            others = [lookup(leaf) for leaf in tree_leaves(rest)]
            if value is None or not value.held:
                return None
            if name == "getitem" and any(other is not None for other in others):
                # Looked up by a tensor: picks rows of a table, which ends it, or whole matrices (experts).
                stacked = all(self._parameters[key].ndim > 2 for key in value.held)
                if not (stacked and isinstance(rest[0], Tensor | fx.Node)):
                    return None
            self.stop(name, others)
            flipped = {key: flip != self._swaps(name, rest, key) for key, flip in value.held.items()}
            return value._replace(held=flipped)
        if name in JOIN:
            parts = [value for value in map(lookup, tree_leaves(first)) if value is not None]
            held = {key: flip for value in parts for key, flip in value.held.items()}
        elif name in BINARY:
            pair = [value for value in (lookup(first), lookup(rest[0])) if value is not None and value.held]
            # Of two parameters the larger is the weight, the other scales or shifts it.
            largest = max((self._size(value) for value in pair), default=0)
            self.stop(name, [value for value in pair if self._size(value) < largest])
            kept = [value for value in pair if self._size(value) == largest]
            held = {key: flip for value in kept for key, flip in value.held.items()}
        else:
            return None
        if result.data:
            for key in held:
                self._stops.setdefault(key, name)
        return _Value(held, result.data) if held else None

    def _size(self, value: _Value) -> int:
        return max(self._parameters[key].numel() for key in value.held)

    def _swaps(self, name: str, rest: Sequence[Any], key: int) -> bool:
        """Whether the operation swaps the last two dimensions of the parameter."""
        if name in FLIPS:
            return True
        ndim = self._parameters[key].ndim
        dims = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
        if not all(isinstance(dim, int) for dim in dims):
            return False
        ordered = [dim % ndim for dim in dims]
        if name in ("transpose", "swapaxes", "swapdims"):
            return set(ordered) == {ndim - 1, ndim - 2}
        return (
            name == "permute" and len(ordered) == ndim and ordered.index(ndim - 1) < ordered.index(ndim - 2)
        )

    def _einsum(self, args: Sequence[Any], lookup: Callable[[Any], _Value | None]) -> None:
        pattern = next((arg for arg in args if isinstance(arg, str)), "")
        operands = [lookup(leaf) for leaf in tree_leaves(args) if lookup(leaf) is not None]
        inputs, arrow, output = pattern.replace("...", " ").partition("->")
        spaced = args and not isinstance(args[0], str)  # einops: the names of axes are words
        terms = [term.split() if spaced else term.replace(" ", "") for term in inputs.split(",")]
        if len(terms) != len(operands):
            return
        names = [name for term in terms for name in term]
        kept = (
            set(output.split() if spaced else output) if arrow else {n for n in names if names.count(n) == 1}
        )
        for value, term in zip(operands, terms, strict=True):
            summed = [i for i, name in enumerate(term) if name not in kept and names.count(name) > 1]
            outputs = [i for i, name in enumerate(term) if name in kept]
            if value is not None and not value.data and summed:
                self._linear("einsum", "einsum", [(value, bool(outputs) and max(summed) < max(outputs))])


class _Watch(TorchFunctionMode):
    """Follows parameters through a run; a tensor that nothing is known of depends on the inputs."""

    def __init__(self, parameters: Iterable[Tensor], buffers: Iterator[Tensor]) -> None:
        super().__init__()
        self.flow = _Flow()
        # Tensors are kept alive, so that no other takes their id.
        self._known: dict[int, tuple[Tensor, _Value]] = {id(b): (b, NEITHER) for b in buffers}
        self._storages: dict[int, _Value] = {}
        for parameter in parameters:
            value = self.flow.hold(parameter)
            self._known[id(parameter)] = (parameter, value)
            if parameter.layout == torch.strided:
                self._storages[parameter.untyped_storage()._cdata] = value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, and note what its result holds."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if tensors:
            value = self.flow.step(_function_name(func), args, kwargs, self._lookup) or NEITHER
            for tensor in tensors:
                if value != DATA and id(tensor) not in self._known:
                    self._known[id(tensor)] = (tensor, value)
        return result

    def _lookup(self, argument: Any) -> _Value | None:
        if not isinstance(argument, Tensor):
            return None
        if id(argument) in self._known:
            return self._known[id(argument)][1]
        if argument.layout == torch.strided:  # a view made where nobody watched
            return self._storages.get(argument.untyped_storage()._cdata, DATA)
        return DATA


def _function_name(function: Any) -> str:
    """The bare name of a function of torch or Python; any other with its package, as ``einops.rearrange``."""
    if isinstance(function, torch._ops.OpOverload):  # in exported graphs
        function = function.overloadpacket
        if function.__name__ in ATEN_FIRST:
            return f"aten.{function.__name__}"
    name: str = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        return str(function.__self__.__name__)  # a property of tensors: T, shape
    package = (getattr(function, "__module__", None) or "torch").partition(".")[0]
    if package in ("torch", "_operator", "operator", "builtins"):
        return name
    return f"{package}.{name}"


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], slot: _Slot) -> Any:
    return args[slot.position] if 0 <= slot.position < len(args) else kwargs.get(slot.keyword)


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of two dimensions or more, under all their names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if not is_lazy(parameter) and parameter.ndim >= 2}


def _own_names(module: nn.Module, prefix: str = "") -> set[str]:
    """Names of the parameters that a module holds itself or in its lists and dictionaries of parameters."""
    names = {prefix + name for name in module._parameters}
    for name, child in module._modules.items():
        if isinstance(child, nn.ParameterList | nn.ParameterDict):
            names |= _own_names(child, f"{prefix}{name}.")
    return names
