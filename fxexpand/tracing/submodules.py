"""With what arguments a model calls its parts: one run, watched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxexpand.running.evaluation import evaluating, undisturbed
from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.tracing.graphs import check_with_shapes, fixes_arguments, in_both_modes, symbolic
from fxexpand.tracing.guards import UntraceableError, fixed_arguments, signature_of
from fxexpand.tracing.paths import Whole, alternatives, other_paths
from fxexpand.tracing.tracer import FAILURES, Leaf

PLAIN = (Tensor, bool, int, float, complex, str)


def observed_calls(model: nn.Module, example_inputs: ExampleInputs) -> dict[nn.Module, dict[str, Any]]:
    """The arguments of each part that the model calls, by name, as at its first call.

    Left out are parts that are called again with another flag, string or None, and those that get ``*args``
    or objects (a cache) that the call may have changed. The run is in evaluation mode and leaves no trace;
    tensors are those of the run itself, so what writes in place may have changed them since.
    """
    found: dict[nn.Module, dict[str, Any]] = {}
    odd: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            given = signature_of(module).bind(*args, **kwargs)
        except TypeError:  # a forward of its own, on the object
            odd.add(module)
            return
        named = given.arguments
        for parameter in given.signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL and named.get(parameter.name):
                odd.add(module)
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(parameter.name, {})
        plain = all(leaf is None or isinstance(leaf, PLAIN) for leaf in tree_leaves(named))
        if not plain or _switches(found.setdefault(module, named)) != _switches(named):
            odd.add(module)

    parts = [part for part in model.modules() if part is not model]
    handles = [
        part.register_forward_pre_hook(note, with_kwargs=True)
        for part in parts
        if not isinstance(part, torch.jit.ScriptModule)
    ]
    try:
        with undisturbed(model), evaluating(model):
            call(model, copy_inputs(example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {module: named for module, named in found.items() if module not in odd}


def _switches(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a trace fixes, and which arguments there are."""
    return {
        name: value if value is None or isinstance(value, bool | str) else Tensor
        for name, value in arguments.items()
    }


class Reading(NamedTuple):
    """The graph of a part of a model.

    Attributes:
        graph_module: the graph.
        leaf: the modules kept whole because their code has no graph; None if it is that of all paths.
        error: why there is none of all paths.
        others: the graphs of the other paths.
    """

    graph_module: fx.GraphModule
    leaf: Leaf | None = None
    error: UntraceableError | None = None
    others: tuple[fx.GraphModule, ...] = ()


class _Failure:
    """Why a part that holds these modules has no graph; ``everywhere``: not even one along its inputs."""

    def __init__(self, inside: tuple[nn.Module, ...], error: UntraceableError) -> None:
        self.inside = inside
        # Without the frames, which hold what was traced.
        self.error = UntraceableError(str(error), error.reason)
        self.everywhere = False


class Parts:
    """The example inputs of a model, those that it gives to its parts, and the graphs of these.

    Args:
        one_path: where a part has no graph of all paths, take that of its inputs, and those of the others.
    """

    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs | None, one_path: bool = False
    ) -> None:
        self._model = model
        self._one_path = one_path
        self._example_inputs = example_inputs
        self._failures: dict[nn.Module, _Failure] = {}
        self._parts: dict[nn.Module, dict[str, Any]] | None = None
        self._inside: dict[nn.Module, set[int]] = {}
        self._holders: dict[nn.Module, set[int]] = {}  # by their children: a copy without hooks has the same
        for module in model.modules():
            for child in module._modules.values():
                if child is not None:
                    self._holders.setdefault(child, set()).add(id(module._modules))

    def after(self, model: nn.Module, one_path: bool) -> Parts:
        """Those of what has become of the model; what holds the same modules is not traced in vain again."""
        parts = Parts(model, self._example_inputs, one_path)
        parts._failures = self._failures
        return parts

    def shared(self, root: nn.Module, owner: str, paths: Iterable[str]) -> bool:
        """Whether something else than ``owner`` holds one of the modules at ``paths``, which are inside it.

        Code elsewhere may then call that module, so that it must go on computing what it does.
        """
        top = root.get_submodule(owner)
        if top not in self._inside:  # found once: many layers have the same owner
            self._inside[top] = {id(module._modules) for module in top.modules()}
        inside = self._inside[top]
        for path in paths:
            while path and path != owner:
                if not self._holders.get(root.get_submodule(path), inside) <= inside:
                    return True
                path = path.rpartition(".")[0]
        return False

    def traced(self, module: nn.Module) -> Reading:
        """The graph of a part, checked on its inputs where they are known.

        With ``one_path``, control flow may go by sizes, and modules whose code has no graph are kept whole.

        Raises: UntraceableError.
        """
        given, inside = self.given(module), tuple(module.modules())
        failure = self._failures.get(module)
        if failure is None or failure.inside != inside:
            try:
                return Reading(self._symbolic(module, given))
            except UntraceableError as error:
                failure = self._failures[module] = _Failure(inside, error)
        if self._one_path and given is not None and not failure.everywhere:
            found = self._along(module, given, failure.error)
            if found is not None:
                return found
            failure.everywhere = True
        raise failure.error

    def _symbolic(self, module: nn.Module, given: ExampleInputs | None) -> fx.GraphModule:
        if module is self._model or given is None:
            return symbolic(module, example_inputs=given)
        try:
            return symbolic(module, example_inputs=given)
        except UntraceableError as error:
            if error.differs or _fixes_the_same(module, given):
                raise
        except FAILURES:  # a second call with the same arguments may not be possible
            pass
        return symbolic(module)

    def _along(self, module: nn.Module, given: ExampleInputs, error: UntraceableError) -> Reading | None:
        """The graph of the path of the inputs, around what fails there too."""
        leaf = Whole()
        while True:
            try:
                graph_module = in_both_modes(module, leaf, given, along=())
                break
            except UntraceableError as failed:
                if not leaf.add(failed.within):
                    return None
        try:
            others = tuple(other_paths(module, leaf, given, graph_module))
            check_with_shapes(graph_module, module, given)
        except (UntraceableError, *FAILURES):  # what it calls is read by itself then
            return None
        return Reading(graph_module, leaf, error, others)

    def others(self, module: nn.Module, reading: Reading) -> Iterator[tuple[str, fx.GraphModule | None]]:
        """Other graphs of a part, each with why a fold may not hold in it; None for one that is not known."""
        if fixes_arguments(reading.graph_module):
            nodes = len(reading.graph_module.graph.nodes)
            for names, graph_module in alternatives(module, reading.leaf, self.given(module), nodes):
                yield f"it holds for some values of the argument {names} only", graph_module
        for graph_module in reading.others:
            yield "it holds for some paths through the code only, which goes by sizes", graph_module

    def given(self, module: nn.Module) -> ExampleInputs | None:
        """The example inputs of a part, where they are known."""
        if module is self._model or self._example_inputs is None:
            return self._example_inputs if module is self._model else None
        if self._parts is None:
            self._parts = observed_calls(self._model, self._example_inputs)
        return self._parts.get(module)


def _fixes_the_same(module: nn.Module, given: ExampleInputs) -> bool:
    """Whether a trace with these inputs is that without any."""
    try:
        return fixed_arguments(module, given) == fixed_arguments(module, None)
    except TypeError:  # they cannot be given by name
        return False
