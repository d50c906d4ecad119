"""Submodules of a model: the arguments that it calls them with, in one watched run, and their graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxexpand.running.evaluation import evaluating, undisturbed
from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.tracing.graphs import attempt_symbolic, check_with_shapes, fixes_arguments, in_both_modes
from fxexpand.tracing.guards import fixed_arguments, signature_of
from fxexpand.tracing.paths import OpaqueLeaves, alternatives, other_paths
from fxexpand.tracing.recording import Failed, Traced
from fxexpand.tracing.tracer import FAILURES, Leaf, TraceOptions

PLAIN = (Tensor, bool, int, float, complex, str)


def observed_calls(model: nn.Module, example_inputs: ExampleInputs) -> dict[nn.Module, dict[str, Any]]:
    """The arguments of each submodule that the model calls, by name, as at its first call.

    Left out are submodules that are called again with another flag, string or None, and those that get
    ``*args`` or objects (a cache) that the call may have changed. The run is in evaluation mode, the model is
    as before afterwards; tensors are those of the run, so operators in place may have changed them since.
    """
    first_calls: dict[nn.Module, dict[str, Any]] = {}
    excluded: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = _named_arguments(module, args, kwargs)
        if named is None or _switches(first_calls.setdefault(module, named)) != _switches(named):
            excluded.add(module)

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if module is not model and not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with undisturbed(model), evaluating(model):
            call(model, copy_inputs(example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {module: named for module, named in first_calls.items() if module not in excluded}


def _named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a call by name; None where one has no name or is an object."""
    try:
        given = signature_of(module).bind(*args, **kwargs)
    except TypeError:  # a forward of its own, on the object
        return None
    named = given.arguments
    for parameter in given.signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL and named.get(parameter.name):
            return None
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    plain = all(leaf is None or isinstance(leaf, PLAIN) for leaf in tree_leaves(named))
    return named if plain else None


def _switches(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a trace fixes, and the names of the others."""
    return {
        name: value if value is None or isinstance(value, bool | str) else Tensor
        for name, value in arguments.items()
    }


@dataclass(frozen=True, eq=False)
class Reading:
    """The graph of a submodule.

    Attributes:
        traced: the graph.
        leaf: the modules kept whole because their code has no graph. None: the graph is that of all paths.
        failure: why there is none of all paths.
        others: the graphs of the other paths.
    """

    traced: Traced
    leaf: Leaf | None = None
    failure: Failed | None = None
    others: Sequence[Traced] = ()


@dataclass
class _Attempt:
    """The failure of a submodule that holds these modules; ``everywhere``: on the path of its inputs too."""

    inside: tuple[nn.Module, ...]
    failure: Failed
    everywhere: bool = False


class Parts:
    """The example inputs of a model, those that it gives to its submodules, and the graphs of these.

    Args:
        one_path: where a submodule has no graph of all paths, take that of its inputs and of the others.
    """

    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs | None, one_path: bool = False
    ) -> None:
        self._model = model
        self._one_path = one_path
        self._example_inputs = example_inputs
        self._attempts: dict[nn.Module, _Attempt] = {}
        self._inside: dict[nn.Module, set[int]] = {}
        self._holders: dict[nn.Module, set[int]] = {}  # by their children: a copy without hooks has the same
        for module in model.modules():
            for child in module._modules.values():
                if child is not None:
                    self._holders.setdefault(child, set()).add(id(module._modules))

    def after(self, model: nn.Module, one_path: bool) -> Parts:
        """Those of the changed model; a submodule that holds the same modules is not traced in vain again."""
        parts = Parts(model, self._example_inputs, one_path)
        parts._attempts = self._attempts
        return parts

    def shared(self, root: nn.Module, owner: str, paths: Iterable[str]) -> bool:
        """Whether something else than ``owner`` holds one of the modules at ``paths``, which are inside it.

        Code elsewhere may then call that module, so that it must go on computing what it does.
        """
        top = root.get_submodule(owner)
        if top not in self._inside:  # computed once: many layers have the same owner
            self._inside[top] = {id(module._modules) for module in top.modules()}
        inside = self._inside[top]
        for path in paths:
            while path and path != owner:
                if not self._holders.get(root.get_submodule(path), inside) <= inside:
                    return True
                path = path.rpartition(".")[0]
        return False

    def traced(self, module: nn.Module) -> Reading | Failed:
        """The graph of a submodule, compared with it on its inputs where they are known.

        With ``one_path``, control flow may go by sizes, and modules whose code has no graph are kept whole.
        """
        given, inside = self.given(module), tuple(module.modules())
        attempt = self._attempts.get(module)
        if attempt is None or attempt.inside != inside:
            outcome = self._symbolic(module, given)
            if isinstance(outcome, Traced):
                return Reading(outcome)
            failure = replace(outcome, cause=None)  # whose frames hold what was traced
            attempt = self._attempts[module] = _Attempt(inside, failure)
        if self._one_path and given is not None and not attempt.everywhere:
            reading = self._on_one_path(module, given, attempt.failure)
            if reading is not None:
                return reading
            attempt.everywhere = True
        return attempt.failure

    def _symbolic(self, module: nn.Module, given: ExampleInputs | None) -> Traced | Failed:
        """The symbolic graph, with the inputs where that is possible."""
        if module is not self._model and given is not None:
            try:
                outcome = attempt_symbolic(module, TraceOptions(example_inputs=given, stores="read"))
                if isinstance(outcome, Traced) or outcome.differs:
                    return outcome
                if fixed_arguments(module, given) == fixed_arguments(module, None):
                    return outcome
            except FAILURES:  # a second call with the same arguments may fail, or one by name
                pass
            given = None
        return attempt_symbolic(module, TraceOptions(example_inputs=given, stores="read"))

    def _on_one_path(self, module: nn.Module, given: ExampleInputs, failure: Failed) -> Reading | None:
        """The graph of the path of the inputs, around the modules that fail there too."""
        leaf = OpaqueLeaves()
        options = TraceOptions(leaf, given, branch_prefix=(), stores="read")
        traced = leaf.around(lambda: in_both_modes(module, options))
        if isinstance(traced, Failed):
            return None
        others = other_paths(module, options, traced)
        try:
            if isinstance(others, Failed) or check_with_shapes(traced.graph_module, module, given):
                return None
        except FAILURES:  # of a second call; its submodules are read by themselves then
            return None
        return Reading(traced, leaf, failure, others)

    def others(self, module: nn.Module, reading: Reading) -> Iterator[tuple[str, Traced | None]]:
        """Other graphs of a submodule, with the reason why a fold may not hold there; None: no graph."""
        graph_module = reading.traced.graph_module
        if fixes_arguments(graph_module):
            options = TraceOptions(reading.leaf, self.given(module), stores="read")
            for names, traced in alternatives(module, options, graph_module.graph):
                yield f"it holds for some values of the argument {names} only", traced
        for traced in reading.others:
            yield "it holds for some paths through the code only, which goes by sizes", traced

    def given(self, module: nn.Module) -> ExampleInputs | None:
        """The example inputs of a submodule, where they are known."""
        return self._example_inputs if module is self._model else self._calls.get(module)

    @cached_property
    def _calls(self) -> dict[nn.Module, dict[str, Any]]:
        return {} if self._example_inputs is None else observed_calls(self._model, self._example_inputs)
