"""The operator table: one row an operator, under all its spellings, and every reader of operators asks a row.

``x + y``, ``x += y``, ``torch.add``, ``x.add_(y)``, ``aten.add.Tensor`` and the module of a function are one
operator, with the arguments of that name. A row says what the operator does to shapes, its affine step, how
it orders dimensions, which of its arguments are weights of a linear map, whether its result is still the
parameter that went in, and whether the result has memory of its own. A call with arguments that its row has
not (``rounding_mode`` of a division, ``beta``, ``out``) is of no operator: its value is a new source.
"""

from __future__ import annotations

import operator as python_operators
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxexpand.passes.affine.steps import Step
from fxexpand.passes.operators.sizes import Shape, Size
from fxexpand.tracing.tracer import LEAF_FUNCTIONS, LEAF_TYPES

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
]


class Weight(NamedTuple):
    """An argument of a linear map that can be its weight.

    Attributes:
        argument: its name.
        transposed: the operator takes it as ``(in, out)``.
        always: it is the weight whatever it was computed from; otherwise only if no input goes into it.
    """

    argument: str
    transposed: bool = False
    always: bool = False


class Constants(Protocol):
    """The values of a graph that do not depend on its inputs: its parameters, buffers, and what is made of
    them.
    """

    def __contains__(self, value: object, /) -> bool: ...
    def shape(self, node: fx.Node) -> torch.Size: ...
    def dtype(self, node: fx.Node) -> torch.dtype: ...
    def value(self, node: fx.Node) -> torch.Tensor: ...
    def wide(self, node: fx.Node) -> bool: ...


class Values(Protocol):
    """The questions that the rules of a row may ask about the values of a graph."""

    @property
    def constants(self) -> Constants:
        """The values that do not depend on the inputs."""

    def varies(self, value: object) -> bool:
        """Whether it is a value of the graph that depends on the inputs."""

    def call(self, value: object) -> Call | None:
        """The operator that computes a value."""

    def shape(self, value: object) -> Shape | None:
        """The shape of a tensor, () of a number; None where the number of dimensions is not known."""

    def size(self, value: object) -> Size | None:
        """An integer, or a value that was read from a shape, as a size."""

    def fresh(self, call: Call, ndim: int) -> Shape:
        """A shape of unknown sizes for the result of a call."""

    def recorded(self, value: fx.Node) -> tuple[int, ...] | None:
        """The shape of a value in the example; None without one."""


ShapeRule: TypeAlias = "Callable[[Call, Any, Values], Shape | None]"
SizeRule: TypeAlias = "Callable[[Call, Values], Size | None]"
StepRule: TypeAlias = "Callable[[Call, Values], Step | None]"
OrderRule: TypeAlias = "Callable[[Call, int], Sequence[int] | None]"
ModuleRule: TypeAlias = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Operator:
    """A row of the table.

    Attributes:
        name: of the operator, for messages.
        arguments: the names of its arguments in order; it works on ``input``, or on the first if there is
        none.
        keywords: further keywords of the arguments, beside those in ``KEYWORDS``.
        variadic: the second argument may be given as several integers.
        open: it has further arguments, which no rule reads.
        becomes: the operator that a call really is, by its arguments.
        shape: the shape of the result, or of each part where there are several, for the shape of the first
        argument.
        shape_without_first: it is also asked where the shape of the first argument is not known (None).
        size: the integer that it gives, where it reads or computes sizes.
        order: the dimensions of the result as dimensions of the argument, for the number of these; None
            where it is not known. A row with an order needs neither shape nor step.
        step: the affine step; None of a call that is none. It is asked where the first argument depends on
            the inputs, or where others of its arguments may (``keeps`` is ``"larger"`` or ``"parts"``).

            Raises: InexactError: it is an affine operator that cannot be folded, and why.
        kind, weights: the linear map, and the arguments that can be its weight.
        keeps: what the result is a reshaped, scaled or cast version of: the first argument, all parts of
            it, or the larger one of two; ``"nothing"`` for reads of sizes and the like, which do not use
            the values.
        fresh: the result has memory of its own, which no other value of the graph shares.
    """

    name: str
    arguments: tuple[str, ...]
    keywords: Mapping[str, str] = field(default_factory=dict)
    variadic: bool = False
    open: bool = False
    becomes: Callable[[Mapping[str, Any]], str] | None = None
    shape: ShapeRule | None = None
    shape_without_first: bool = False
    size: SizeRule | None = None
    order: OrderRule | None = None
    step: StepRule | None = None
    kind: Kind | None = None
    weights: tuple[Weight, ...] = ()
    keeps: Literal["first", "parts", "larger", "nothing"] | None = None
    fresh: bool = False

    @property
    def first(self) -> str:
        """The name of the argument that it works on."""
        return "input" if "input" in self.arguments else self.arguments[0]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of an operator of the table.

    Attributes:
        arguments: by the names of the row.
        node: the node that makes it; None of a call outside a graph.
        known: the row has all arguments that were given.
        inplace: it is spelled as one that writes into its argument.
    """

    operator: Operator
    arguments: dict[str, Any]
    node: fx.Node | None = None
    known: bool = True
    inplace: bool = False

    @property
    def name(self) -> str:
        """The operator's."""
        return self.operator.name

    @property
    def first(self) -> Any:
        """The argument that the operator works on."""
        return self.arguments.get(self.operator.first)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or the default where it is not given."""
        return self.arguments.get(name, default)

    def given(self, *names: str) -> bool:
        """Whether nothing else was given."""
        return self.arguments.keys() <= set(names)


# Keywords by which functions, methods and ATen call the same argument.
KEYWORDS = {
    "self": "input",
    "x": "input",
    "axis": "dim",
    "mat2": "other",
    "split_size": "split_size_or_sections",
}
# The homes of functions and methods; the name alone would also be that of functions which do something else.
HOMES = (torch, F, python_operators, torch.Tensor, torch._C._nn, torch._VF, torch.linalg, torch.special)

_ROWS: dict[object, Operator] = {}  # by spelling: a name, or a function of another library
_MODULES: dict[type[nn.Module] | str, tuple[Operator, ModuleRule | None, bool]] = {}


def row(
    spellings: str | Callable[..., Any],
    arguments: str = "input",
    modules: Mapping[Any, ModuleRule | None] | Sequence[type[nn.Module] | str] = (),
    subclasses: bool = False,
    **fields: Any,
) -> Callable[[StepRule], StepRule]:
    """Put a row into the table; as a decorator, the function is its affine step.

    A trace keeps functions and modules of other libraries whole, as nodes that the row is for.

    Args:
        spellings: names of functions, methods and ATen operators, with spaces between them, the first being
            that of the operator; or the function of another library itself.
        arguments: their names in order, with spaces between them.
        modules: the modules that call it in their forward, by type, or by the name of the type for
            libraries that may not be installed. Their attributes have the names of the arguments, unless a
            function gives the arguments of a module.
        subclasses: every subclass of the modules does the same to a shape, whatever its forward.
        fields: of ``Operator``.
    """
    named: list[Any] = spellings.split() if isinstance(spellings, str) else [spellings]
    name = named[0].removeprefix("aten.") if isinstance(spellings, str) else spellings.__name__
    made = Operator(name, tuple(arguments.split()), **fields)

    def enter(entry: Operator) -> None:
        _ROWS.update(dict.fromkeys(named, entry))
        rules = modules if isinstance(modules, Mapping) else dict.fromkeys(modules)
        own = [kind for kind in rules if isinstance(kind, type) and not kind.__module__.startswith("torch.")]
        LEAF_TYPES.update(own)
        LEAF_FUNCTIONS.update(spelling for spelling in named if callable(spelling))
        _MODULES.update({kind: (entry, rule, subclasses) for kind, rule in rules.items()})
        spelling_of.cache_clear()

    def decorated(step: StepRule) -> StepRule:
        enter(replace(made, step=step))
        return step

    enter(made)
    return decorated


def rows(names: str, **fields: Any) -> None:
    """Put in a row for each of several operators, which no rule tells from one another but by the name."""
    for name in names.split():
        row(name, open=True, **fields)


class Synonyms(MutableMapping[str, str]):
    """Every spelling with the name of its operator; a new one joins the row of the operator that it names."""

    def __getitem__(self, spelling: str) -> str:
        return _ROWS[spelling].name

    def __setitem__(self, spelling: str, name: str) -> None:
        _ROWS[spelling] = _ROWS[name]
        spelling_of.cache_clear()

    def __delitem__(self, spelling: str) -> None:
        del _ROWS[spelling]
        spelling_of.cache_clear()

    def __iter__(self) -> Iterator[str]:
        return (spelling for spelling in _ROWS if isinstance(spelling, str))

    def __len__(self) -> int:
        return len(list(iter(self)))


SYNONYMS = Synonyms()


class Spelling(NamedTuple):
    """How a call is written: by which name, in place or not, with its two operands exchanged or not."""

    name: object
    inplace: bool = False
    reflected: bool = False


@lru_cache(maxsize=4096)
def spelling_of(target: Any) -> Spelling:
    """The spelling of a function, a method (a string) or an ATen overload; the full name of unknown ones."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _of_overload(target)
    if target in _ROWS and not isinstance(target, str):
        return Spelling(target)
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    if name == "__get__":  # a property of tensors: T, shape
        return Spelling(target.__self__.__name__)
    package = getattr(target, "__module__", None) or "torch"
    if not isinstance(target, str) and not any(getattr(home, name, None) == target for home in HOMES):
        return Spelling(f"{package.partition('.')[0]}.{name}")
    dunder = name.startswith("__") and name.endswith("__")
    if dunder or package == "_operator":
        return _of_python(name.strip("_"))
    bare = name.removesuffix("_")
    if getattr(torch, name, None) == target and getattr(F, name, None) != target:
        bare = _as_aten(bare)  # torch.batch_norm has ATen's order of arguments, F.batch_norm another
    return Spelling(bare, name.endswith("_"))


def _as_aten(name: str) -> str:
    """The row of ATen's operator, where it has another order of arguments than the function of that name."""
    return f"aten.{name}" if f"aten.{name}" in _ROWS else name


def _of_overload(target: Any) -> Spelling:
    mutable = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    space, name = str(packet._qualified_op_name).split("::")
    bare = name.removesuffix("_") if mutable else name
    return Spelling(_as_aten(bare), mutable) if space == "aten" else Spelling(f"{space}.{name}")


def _of_python(name: str) -> Spelling:
    """Python's operators: ``iadd`` works in place, ``radd`` has its operands exchanged."""
    if name[:1] in ("i", "r") and name[1:] in _ROWS:
        return Spelling(name[1:], name[0] == "i", name[0] == "r")
    return Spelling(name)


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """The call of an operator of the table that a function or a method with these arguments is."""
    if target is getattr and len(args) > 1:
        target, args = args[1], args[:1]
    spelling = spelling_of(target)
    entry = _ROWS.get(spelling.name)
    if entry is None:
        return None
    given = [*args[1::-1], *args[2:]] if spelling.reflected else list(args)
    if entry.variadic and len(given) > 1 and not isinstance(given[1], list | tuple):
        given[1:] = [tuple(given[1:])]
    arguments = dict(zip(entry.arguments, given, strict=False))
    named = {entry.keywords.get(key, KEYWORDS.get(key, key)): value for key, value in kwargs.items()}
    more = {name for name, value in named.items() if name not in entry.arguments and value is not None}
    more |= named.keys() & arguments.keys()
    arguments = {**named, **arguments}
    known = entry.open or (len(given) <= len(entry.arguments) and not more)
    if entry.becomes is not None:
        entry = _ROWS[entry.becomes(arguments)]
    return Call(entry, arguments, known=known and entry.first in arguments, inplace=spelling.inplace)


def call_of(node: fx.Node, graph_module: nn.Module | None = None) -> Call | None:
    """The call that a node makes; None where it is of no operator of the table.

    Args:
        graph_module: turns a module into the call of its function; without it a module is none.
    """
    if node.op == "call_module":
        given = [*node.args, *node.kwargs.values()]
        if graph_module is None or len(given) != 1:
            return None
        call = call_of_module(graph_module.get_submodule(str(node.target)), given[0])
    elif node.op in ("call_function", "call_method"):
        call = bind(node.target, node.args, node.kwargs)
    else:
        return None
    return None if call is None or not call.known else replace(call, node=node)


def call_of_module(module: nn.Module, x: Any) -> Call | None:
    """The call that the forward of a module makes; weights are given by their shapes, as ``torch.Size``."""
    kinds: list[Any] = [*type(module).__mro__, type(module).__name__]
    for kind in kinds:
        found = _MODULES.get(kind)
        if found is None:
            continue
        entry, rule, subclasses = found
        own = isinstance(kind, str) or type(module).forward is kind.forward
        if not (own or subclasses or type(module).__module__.startswith("fxexpand.")):
            return None
        held: Any = module
        if rule is not None:
            return Call(entry, {entry.first: x, **rule(held)})
        named = {name: getattr(held, name) for name in entry.arguments if hasattr(held, name)}
        return Call(entry, {**named, entry.first: x})
    return None
