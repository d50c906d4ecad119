"""The tracer of fx, with the leaves, arguments and conditions on sizes that real networks need."""

from __future__ import annotations

import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from dis import opname
from itertools import chain
from types import ModuleType
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.nn.utils import parametrize

from fxexpand.kernel.library_layers import is_layer_norm
from fxexpand.running.inputs import ExampleInputs
from fxexpand.tracing.classes import ATTRIBUTES, asking_code, asks_for_class, deduced_class
from fxexpand.tracing.example_values import Sizes, UnknownValue
from fxexpand.tracing.guards import require_argument, require_class

Leaf: TypeAlias = Callable[[str, nn.Module], bool]

# Exceptions of forward code that gets proxies instead of tensors.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)

CONDITIONS = 64  # in one trace: a loop on a size may have no end on a path that no input takes
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclass(frozen=True)
class TraceOptions:
    """How to trace a model.

    Attributes:
        leaf: ``(name, module) -> bool``: further modules to keep whole.
        example_inputs: the source of ``fixed`` and, with ``branch_prefix``, of the sizes.
        training: the mode to trace in. None: each module in the mode that it is in.
        faithful: fail for anything that a graph cannot do again. False: the graph is for reading only.
        fixed: values of arguments, by the names of their placeholders. None: those of ``fixed_arguments``.
        branch_prefix: results of the first conditions on sizes; later conditions have the results of the
            example inputs. The length of a shape is known then, too. None: a condition on sizes fails.
        assume_false: take every other condition as false. A failure then holds the partial graph.
        untyped: the placeholders whose values are of no class that the code asks for.
        stores: for a value that the code keeps on a module, add a reader to the graph, fail, or do nothing.
    """

    leaf: Leaf | None = None
    example_inputs: ExampleInputs | None = None
    training: bool | None = None
    faithful: bool = True
    fixed: Mapping[str, Any] | None = None
    branch_prefix: tuple[bool, ...] | None = None
    assume_false: bool = False
    untyped: frozenset[str] = frozenset()
    stores: Literal["read", "fail", "drop"] = "drop"


# The attributes of a module that hold the hooks around a call of it.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def first_line(error: BaseException) -> str:
    """The first sentence of an error message; torch's advice follows it."""
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    return message.split(". ")[0].rstrip(".")


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class' forward: hooks, or a forward of its own."""
    held = vars(module)
    return "forward" in held or any(held.get(name) for name in HOOKS)


def calls_more(module: nn.Module) -> bool:
    """Whether its class has a ``__call__`` of its own, which a graph of its forward would drop.

    The ``__call__`` of transformers only adds checkpointing in training, and that of graph modules messages.
    """
    call: Any = type(module).__call__
    harmless = isinstance(module, fx.GraphModule) or str(call.__module__).startswith("transformers.")
    return call is not nn.Module.__call__ and not harmless


# Layers and functions of users that every trace keeps whole: the operator table says how they fold.
LEAF_TYPES: set[type[nn.Module]] = set()
LEAF_FUNCTIONS: set[Callable[..., Any]] = set()


class RegionTracer(fx.Tracer):
    """The tracer of fx with the leaves of ``trace``; reads of buffers are nodes.

    Args:
        values: the values for the example inputs. None: an argument without a default is taken to be a
            tensor by code that asks for its class.

    Attributes:
        decisions: the results of all conditions, in order.
        failed: the innermost module of the model whose call raised.
        stopped: the error that ends the trace, even where the model catches it.
        multi_argument_calls: the paths of modules called with several arguments, or with one by its name.
    """

    def __init__(self, options: TraceOptions = TraceOptions(), values: Sizes | None = None) -> None:
        types, functions, modules = _library_leaves()
        super().__init__(autowrap_modules=modules, autowrap_functions=functions)  # type: ignore[arg-type]
        self._types = types
        self._options, self._values = options, values
        self._sizes = values if options.branch_prefix is not None else None
        self._classes: dict[fx.Node, type | None] = {}
        self._fixed, self._faithful = options.fixed or {}, options.faithful
        self._names: dict[int, str] = {}
        self._gradients, self._autocasts = True, 0
        self.decisions: list[bool] = []
        self.failed: nn.Module | None = None
        self.stopped: Exception | None = None
        self.multi_argument_calls: set[str] = set()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """See ``fx.Tracer.trace``."""
        tensors = chain(root.named_buffers(), root.named_parameters())
        self._names = {id(tensor): name for name, tensor in tensors}
        self._gradients, self._autocasts = torch.is_grad_enabled(), _open_autocasts()
        graph = super().trace(root, concrete_args)
        if self.stopped is not None:  # and the model caught it
            raise self.stopped
        for node, kind in self._classes.items():
            if node.op == "placeholder" and kind is not object:
                with graph.inserting_before(next(each for each in graph.nodes if each.op != "placeholder")):
                    graph.call_function(require_class, (node, (kind or Tensor).__name__, str(node.target)))
        for node in graph.nodes:
            if isinstance(node.type, str):  # torch 2.9 writes it into the code, and cannot pickle that
                node.type = None
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one node of the graph."""
        if super().is_leaf_module(m, module_qualified_name) or isinstance(m, self._types):
            return True
        inside = isinstance(m, nn.Sequential) or getattr(type(m), "traced_inside", False)
        ours = type(m).__module__.startswith("fxexpand.") and not inside
        opaque = parametrize.is_parametrized(m) or isinstance(m, torch.jit.ScriptModule) or hooked(m)
        # torchvision.ops also holds a permutation and blocks of layers, which are traced inside.
        in_ops = type(m).__module__.startswith("torchvision.ops.") and type(m).__name__ != "Permute"
        operator = in_ops and not m._modules
        asked = self._options.leaf is not None and self._options.leaf(module_qualified_name, m)
        return ours or opaque or operator or asked or is_layer_norm(m) or _reads_only_its_mode(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """The node of a parameter or buffer that the forward reads; one for each."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """See ``fx.Tracer.create_arg``."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and id(a) in self._names:
            return self.create_node("get_attr", self._names[id(a)], (), {})
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            return self._mapping(a)
        return super().create_arg(a)

    def _mapping(self, given: dict[str, Any]) -> Any:
        """The node of a dict of another class, which fx itself would make a plain dict."""
        kind: type = type(given)
        plain = super().create_arg(dict(given))
        if kind is OrderedDict:
            node = self.create_node("call_function", kind, (plain,), {})
        elif is_dataclass(kind):
            node = self.create_node("call_function", kind, (), plain)
        elif self._faithful:
            raise RuntimeError(f"it makes a {kind.__name__}, which a graph would make a plain dict")
        else:
            return plain
        # A pickled graph then has the node again. torch lists such calls for good and patches all in a trace.
        node.meta["is_wrapped"] = self._faithful
        return node

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """See ``fx.Tracer.call_module``; a module that a forward makes (``nn.Softmax(1)(x)``) is its code."""
        if m not in (self.submodule_paths or ()):
            return forward(*args, **kwargs)
        if len(args) != 1 or kwargs:
            self.multi_argument_calls.add(self.path_of_module(m))
        try:
            if self._faithful and calls_more(m) and not self.is_leaf_module(m, self.path_of_module(m)):
                raise RuntimeError(f"it calls a {type(m).__name__}, whose class has a __call__ of its own")
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever a model raises
            if self.failed is None:
                self.failed = m
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """See ``fx.Tracer.proxy``."""
        return _Sized(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The items of a proxy, where their number is known."""
        length = self.length(obj)
        return super().iter(obj) if length is None else iter([obj[i] for i in range(length)])  # type: ignore[index]

    def length(self, obj: fx.Proxy) -> int | None:
        """The number of dimensions in a shape, or of items in a tuple of sizes; None where unknown."""
        known = self._known(obj)
        return len(known) if isinstance(known, tuple | list) else None

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The result of a condition."""
        known = self._known(obj)
        if isinstance(known, bool | int | float | tuple | list):
            return self._decided(bool(known))
        if self._options.assume_false:
            return self._decided(False)
        try:
            return super().to_bool(obj)
        except fx.proxy.TraceError as error:
            self.stopped = error
            raise

    def stop(self, reason: str) -> NoReturn:
        """End the trace, even where the code of the model catches the error."""
        self.stopped = RuntimeError(reason)
        raise self.stopped

    def class_of(self, obj: fx.Proxy) -> type:
        """The class of the value of a proxy; that of an argument is checked by the graph.

        Raises: RuntimeError: it is unknown.
        """
        if type(obj) is _SizedAttribute and obj._node is None:
            kind = ATTRIBUTES.get(obj.attr) if self.class_of(obj.root) is Tensor else None
        else:
            kind = self._class_of(obj.node)
        return (
            kind if kind is not None else self.stop("its code goes by the type of a value that is not known")
        )

    def _class_of(self, node: fx.Node) -> type | None:
        if node not in self._classes:
            self._classes[node] = self._found_class(node)
        return self._classes[node]

    def _found_class(self, node: fx.Node) -> type | None:
        if node.op == "placeholder" and str(node.target) in self._options.untyped:
            return object
        try:
            if self._values is not None:
                return type(self._values.of(node))
        except UnknownValue:
            pass
        if node.op == "placeholder":
            return type(node.args[0]) if node.args and node.args[0] is not None else Tensor
        return Tensor if node.op == "get_attr" else deduced_class(node, self._class_of, self.root)

    def _decided(self, default: bool) -> bool:
        """The result of a condition: as in ``branch_prefix`` or, after that, ``default``."""
        place, prefix = len(self.decisions), self._options.branch_prefix or ()
        if place == CONDITIONS:
            raise RuntimeError("its code goes by sizes, in too many branches to look at")
        self.decisions.append(prefix[place] if place < len(prefix) else default)
        return self.decisions[-1]

    def _known(self, obj: fx.Proxy) -> Any:
        """The value of a proxy for the example inputs; None where it is unknown."""
        try:
            return None if self._sizes is None else self._sizes.of(obj.node)
        except UnknownValue:
            return None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """See ``fx.Tracer.create_node``."""
        if self._faithful and torch.is_grad_enabled() != self._gradients:
            raise RuntimeError("it switches gradients on or off, which a graph does not record")
        if self._faithful and _open_autocasts() != self._autocasts:
            raise RuntimeError("it switches autocast on or off, which a graph does not record")
        return super().create_node(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The arguments of the traced forward: a proxy for each that is not fixed.

        fx itself changes the code of a forward that takes ``*args`` or ``**kwargs``, and fails where a
        decorator wraps that code.
        """
        forward = inspect.unwrap(root_fn)
        signature = inspect.signature(forward)
        _, *parameters = signature.parameters.values()
        stars = [STARS[p.kind] + p.name for p in parameters if p.kind in STARS]
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        by_place = [p.name for p in parameters if p.kind not in (p.KEYWORD_ONLY, *STARS)]
        if not self._fixed.keys() >= {*stars}:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        # fx writes placeholders in their order, and Python wants *args and **kwargs last.
        names = [*by_place, *by_name, *stars]
        values: dict[str, Any] = {n: self._proxy_placeholder(n, None, signature, forward) for n in names}
        # ``*args`` are empty, except in a graph for reading only: see ``paths.alternatives``.
        rest = [values[name][0] for name in stars if self._fixed.get(name)]
        for name in [name for name in names if name in self._fixed]:
            expected = self._fixed[name]
            self.create_proxy("call_function", require_argument, (values[name], expected, name), {})
            values[name] = expected

        def traced(root: nn.Module) -> Any:
            named = {name: values[name] for name in by_name}
            return root_fn(root, *(values[name] for name in by_place), *rest, **named)

        return traced, [self.root]


class _Sized(fx.Proxy):
    """A proxy that has the class of its value, a length where that is a shape, and a hash only inside fx."""

    tracer: RegionTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.tracer.class_of(self) if asks_for_class() else type(self)

    def __int__(self) -> int:
        self.tracer.stop("its code makes a number of a value, which a graph would freeze")

    __index__ = __float__ = __int__

    def __len__(self) -> int:
        length = self.tracer.length(self)
        return int(super().__len__()) if length is None else length  # fx raises

    def __hash__(self) -> int:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.", "fxexpand.")):
            return super().__hash__()
        # A set or a dict of sizes would not find the proxy, whose hash is not the hash of its value.
        raise TypeError("its code looks for a value in a set or a dict, or keeps what it computed for it")

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        frame = None if hasattr(Tensor, name) else asking_code()
        if frame is not None:  # an attribute that is read is there; getattr and hasattr ask for it
            by_function = not opname[frame.f_code.co_code[frame.f_lasti]].startswith(
                ("LOAD_ATTR", "LOAD_METHOD")
            )
            if by_function and not hasattr(self.tracer.class_of(self), name):
                raise AttributeError(name)
        return _SizedAttribute(self, name)


class _SizedAttribute(_Sized, fx.proxy.Attribute):
    """An attribute of such a proxy."""


def _open_autocasts() -> int:
    """The number of open autocast contexts, including those that switch it off."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _library_leaves() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...], tuple[ModuleType, ...]]:
    """(module types, functions, modules of functions) to keep whole: users' and imported libraries'."""
    timm, ops = sys.modules.get("timm.models._features_fx"), sys.modules.get("torchvision.ops")
    types = () if timm is None else tuple(timm.get_notrace_modules())
    functions = () if timm is None else tuple(filter(callable, timm.get_notrace_functions()))
    return (*types, *LEAF_TYPES), (*functions, *LEAF_FUNCTIONS), (math,) if ops is None else (math, ops)


def _reads_only_its_mode(module: nn.Module) -> bool:
    """Whether a module, such as stochastic depth, holds no tensor and reads its training flag.

    As a leaf it works in both modes, and nothing that could be rewritten is inside.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    reads = code is not None and "training" in code.co_names
    return reads and next(chain(module.parameters(), module.buffers()), None) is None
