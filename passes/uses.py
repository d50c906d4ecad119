"""How a module uses the parameters it holds: which of them are weights of linear maps.

One rule serves two readers. The forward is traced with all children kept whole or, where it has no graph, the
model runs once and every torch function is watched. Either way operations come in order, and of each value it
is known which parameters it holds (reshaped, transposed, scaled, cast) and whether it depends on the inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxexpand.errors import FxExpandError
from fxexpand.passes.operators import Call, bind
from fxexpand.passes.operators.table import Kind, spelling_of
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.tracing import Failed, TraceOptions, record


class UnknownUse(FxExpandError):
    """A forward has no graph, so how it uses its parameters is not known; the message is the reason."""


@dataclass(frozen=True)
class Use:
    """The use of a parameter.

    Attributes:
        kind: the linear map it is the weight of; ``"other"``: of none; ``"unused"``: nothing reads it.
        operator: the function it reaches: the linear one, else the first that is more than a change of shape.
        transposed: stored as ``(in, out)``, as in ``x @ W``.
    """

    kind: Kind | Literal["other", "unused"]
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
            values[node] = flow.step(node.target, node.args, node.kwargs, lookup)
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
    """The parameters in a value, and its dependence on the inputs.

    Attributes:
        held: the parameters it holds, by id, each with whether its last two dimensions are swapped.
        data: whether it depends on the inputs.
    """

    held: Mapping[int, bool]
    data: bool


Lookup: TypeAlias = Callable[[Any], _Value | None]  # the value of an argument; None of no tensor
DATA = _Value({}, True)
NEITHER = _Value({}, False)  # buffers, constants, statistics of parameters


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
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        lookup: Lookup,
    ) -> _Value | None:
        """The value of the result of an operation; None for a number, or where no tensor goes in.

        Args:
            target: the function, or the name of the method.
            lookup: what an argument holds, None for what is no tensor.
        """
        call = bind(target, args, kwargs)
        if call is not None and call.operator.keeps == "nothing":
            return None
        operands = _values(lookup, (args, kwargs))
        if not operands:
            return None
        result = DATA if any(value.data for value in operands) else NEITHER
        if not any(value.held for value in operands):
            return result
        held: dict[int, bool] = {}
        if call is not None:
            self._note_weights(call, args, lookup)
            held = self._kept(call, [*args, *kwargs.values()], lookup)
        name = _shown(target) if call is None else call.name
        if held and call is not None and call.operator.keeps == "first":
            return _Value(held, operands[0].data)  # an index by inputs still gives numbers of the weight
        if held:
            for key in held if result.data else ():
                self._stops.setdefault(key, name)
            return _Value(held, result.data)
        self.stop(name, operands)
        return result

    def _use(self, kind: Kind, name: str, value: _Value, transposed: bool) -> None:
        for key, flipped in value.held.items():
            self._uses.setdefault(key, Use(kind, name, transposed != flipped))

    def _note_weights(self, call: Call, args: Sequence[Any], lookup: Lookup) -> None:
        """Note the parameters that a linear map takes as its weights."""
        if call.operator.kind == "einsum":
            return self._einsum(args, lookup)
        for weight in call.operator.weights:
            for value in _values(lookup, call.get(weight.argument)):
                if weight.always or not value.data:
                    self._use(call.operator.kind or "linear", call.name, value, weight.transposed)

    def _kept(self, call: Call, given: Sequence[Any], lookup: Lookup) -> dict[int, bool]:
        """The parameters that the result still holds of what went in, each with whether it is transposed."""
        keeps = call.operator.keeps
        if keeps == "first":
            return self._kept_first(call, given, lookup)
        parts = _values(lookup, given[:2] if keeps == "larger" else given[0]) if keeps is not None else []
        if keeps == "larger":
            # The larger one of two parameters is the weight, the other one scales or shifts it.
            pair = [value for value in parts if value.held]
            largest = max(map(self._numel, pair), default=0)
            parts = [value for value in pair if self._numel(value) == largest]
            self.stop(call.name, [value for value in pair if value not in parts])
        return {key: flip for value in parts for key, flip in value.held.items()}

    def _kept_first(self, call: Call, given: Sequence[Any], lookup: Lookup) -> dict[int, bool]:
        value, others = lookup(given[0]), _values(lookup, given[1:])
        if value is None or not value.held:
            return {}
        if call.name == "getitem" and others:
            # An index of tensors picks rows of a table, which ends it, or whole matrices (experts).
            stacked = all(self._parameters[key].ndim > 2 for key in value.held)
            if not (stacked and isinstance(given[1], Tensor | fx.Node)):
                return {}
        self.stop(call.name, others)
        return {key: flip != self._transposes(call, key) for key, flip in value.held.items()}

    def _numel(self, value: _Value) -> int:
        return max(self._parameters[key].numel() for key in value.held)

    def _transposes(self, call: Call, key: int) -> bool:
        """Whether a call exchanges the last two dimensions of a parameter."""
        ndim, order = self._parameters[key].ndim, call.operator.order
        dims = None if order is None else order(call, ndim)
        return dims is not None and list(dims).index(ndim - 1) < list(dims).index(ndim - 2)

    def _einsum(self, args: Sequence[Any], lookup: Lookup) -> None:
        """Note the weights of an einsum: operands without an input, with an axis that is summed over."""
        operands, (terms, kept) = _values(lookup, args), _axes_of(args)
        counts = Counter(chain(*terms))
        for value, term in zip(operands, terms, strict=False) if len(terms) == len(operands) else ():
            summed = [i for i, name in enumerate(term) if name not in kept and counts[name] > 1]
            outputs = [i for i, name in enumerate(term) if name in kept]
            if not value.data and summed:
                self._use("einsum", "einsum", value, bool(outputs) and max(summed) < max(outputs))


def _axes_of(args: Sequence[Any]) -> tuple[list[list[str]], list[str]]:
    """The axes of each operand of an einsum, and those of its result; the axes of einops are words."""
    pattern = next((arg for arg in args if isinstance(arg, str)), "").replace("...", " ")
    inputs, arrow, output = pattern.partition("->")
    spaced = bool(args) and not isinstance(args[0], str)
    terms = [term.split() if spaced else list(term.replace(" ", "")) for term in (*inputs.split(","), output)]
    counts = Counter(chain(*terms[:-1]))
    return terms[:-1], terms[-1] if arrow else [name for name, count in counts.items() if count == 1]


def _values(lookup: Lookup, arguments: Any) -> list[_Value]:
    """The values of the tensors among some arguments."""
    return [value for value in map(lookup, tree_leaves(arguments)) if value is not None]


def _shown(target: Any) -> str:
    """An unknown function in messages: by its bare name if it is torch's, else with its package."""
    return str(spelling_of(target).name).removeprefix("torch.")


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
            value = self.flow.step(func, args, kwargs, self._lookup) or NEITHER
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
