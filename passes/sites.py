"""The weights of linear maps in a model, each with whether and where it can be expanded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import Module
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.modules import describe, kernel_of
from fxexpand.layers.expanded import EXPANDED
from fxexpand.layers.parametrized import LISTS, View, expanded_weights
from fxexpand.layers.rewritten import Rewritten
from fxexpand.passes.forward_code import misuses
from fxexpand.passes.readings import layer_view, unfit, used_view, view_by_class
from fxexpand.passes.uses import UnknownUse, Use, observed_uses, parameter_uses
from fxexpand.reporting.rows import LEFT, REFUSED, Action, Row
from fxexpand.running.inputs import ExampleInputs
from fxexpand.tracing.edit import Read, parameter_reads, site_of

NO_WEIGHT = "no weight of a linear map"
Space: TypeAlias = Literal["layer", "weight"]


class Owner(NamedTuple):
    """A module that holds a parameter, and under which name.

    Attributes:
        generated: only generated code reads it there, as the owner is a GraphModule or a plain nn.Module in
            one.
    """

    path: str
    module: nn.Module
    attribute: str
    generated: bool = False

    @property
    def name(self) -> str:
        """The parameter's dotted name."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute


@dataclass(frozen=True)
class Site:
    """One weight, and whether it can be expanded.

    Attributes:
        name: the module's path where ``space`` is ``"layer"``, else the parameter's.
        kind: the module with its sizes, for reports.
        owners: every module that holds the parameter.
        weight: the parameter itself; None where the weight is no parameter.
        space: ``"layer"``: the module becomes an expanded layer; ``"weight"``: the parameter is computed.
        view: how the parameter is read as a kernel; None in layer space and where ``reason`` is given.
        action: ``"expand"``; ``"refused"`` and ``"left"`` come with a reason. A site that is left is no
            weight of a linear map, or expanded already.
        reads: the nodes of graph modules that read the parameter.
    """

    name: str
    kind: str
    owners: tuple[Owner, ...]
    weight: Tensor | None = None
    space: Space = "weight"
    view: View | None = None
    action: Action = "expand"
    reason: str = ""
    reads: tuple[Read, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight; the first of several."""
        return self.owners[0].module

    @property
    def aliases(self) -> tuple[str, ...]:
        """The names of a tied weight at its other owners."""
        return tuple(owner.path if self.space == "layer" else owner.name for owner in self.owners[1:])

    def kernel(self) -> Kernel:
        """The kernel of the layer, or the weight alone as a kernel."""
        if self.space == "layer":
            return kernel_of(self.module)
        assert self.weight is not None and self.view is not None
        return self.view.kernel(self.weight.detach())

    def row(self, action: Action, reason: str, kind: type[Row] = Row) -> Row:
        """A row of a report, for a site that keeps its parameters."""
        count = 0 if self.weight is None or is_lazy(self.weight) else self.weight.numel()
        return kind(self.name, self.kind, action, reason, params_before=count, params_after=count)


class _Verdict(NamedTuple):
    action: Action
    reason: str = ""
    view: View | None = None
    space: Space = "weight"


def find_sites(model: nn.Module, example_inputs: ExampleInputs | None = None) -> list[Site]:
    """All sites of ``model``, in its own order; nothing is changed.

    Args:
        example_inputs: run once, if a module with parameters of its own cannot be traced, to see how it uses
            them.
    """
    known = _Known(model, example_inputs)
    sites: list[Site] = []
    seen: set[int] = set()
    for path, module in own_modules(model):
        sites.extend(_without_parameter(path, module))
        for attribute, parameter in _parameters(module):
            if id(parameter) not in seen and _is_matrix(attribute, parameter):
                seen.add(id(parameter))
                sites.append(known.site(parameter))
    return sites


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a module holds itself; those of TorchScript cannot be exchanged."""
    if not isinstance(module, torch.jit.ScriptModule):
        yield from ((name, each) for name, each in module._parameters.items() if each is not None)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model`` once each, without the factors that an expansion put in."""
    hidden: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, Rewritten) and not module.traced_inside:
            hidden.update(inner for part in module.factors() for inner in part.modules())
        if isinstance(module, parametrize.ParametrizationList):
            hidden.update(module.modules())
    for path, module in model.named_modules():
        if module not in hidden:
            yield path, module


class _Known:
    """The owners and readers of the parameters of a model, from which a verdict on each follows."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None) -> None:
        self._uses = _Uses(model, example_inputs)
        self._attributes = _held_in_attributes(model)
        self._misuses = misuses(model)
        self._reads = parameter_reads(model)
        self._owners: dict[int, list[Owner]] = {}
        for path, module in own_modules(model):
            generated = _is_generated(model, path)
            for attribute, parameter in _parameters(module):
                self._owners.setdefault(id(parameter), []).append(Owner(path, module, attribute, generated))

    def site(self, parameter: nn.Parameter) -> Site:
        """The site of a parameter, with the verdict that all its owners agree on."""
        owners, reads = tuple(self._owners[id(parameter)]), tuple(self._reads.get(id(parameter), ()))
        path, module, attribute, _ = owners[0]
        layer = attribute == "weight" and isinstance(module, nn.Linear | _ConvNd)
        verdict = self._verdict(parameter, owners, bool(reads))
        return Site(
            name=(path or type(module).__name__) if layer and len(owners) == 1 else owners[0].name,
            kind=describe(module) if layer else _describe_parameter(module, parameter),
            owners=owners,
            weight=parameter,
            space=verdict.space,
            view=verdict.view,
            action=verdict.action,
            reason=verdict.reason,
            reads=reads,
        )

    def _verdict(self, parameter: nn.Parameter, owners: tuple[Owner, ...], read: bool) -> _Verdict:
        reason = unfit(parameter)
        if reason is not None:
            return _Verdict(REFUSED, reason)
        if any(site_of(owner.path, owner.module) is not None for owner in owners):
            return _Verdict(LEFT, "a factor of a layer that was rewritten")
        verdicts = [_verdict(parameter, owner, self._uses) for owner in owners]
        first = {verdict.action: verdict for verdict in reversed(verdicts)}
        if REFUSED in first or "expand" not in first:
            return first.get(REFUSED, verdicts[0])
        reason = self._read_elsewhere(parameter, owners)
        if reason is not None:
            return _Verdict(REFUSED, reason)
        if len(owners) == 1 and not read:
            return verdicts[0]
        view = next((verdict.view for verdict in verdicts if verdict.view is not None), None)
        return _Verdict("expand", view=view or layer_view(owners[0].module, "weight", parameter))

    def _read_elsewhere(self, parameter: nn.Parameter, owners: tuple[Owner, ...]) -> str | None:
        """Why something would read the old tensor, or find none, if this one were computed."""
        for owner in owners:
            parts = owner.name.split(".")
            around = (".".join(parts[:count]) for count in range(len(parts) + 1))
            misuse = next((self._misuses[name] for name in around if name in self._misuses), None)
            if misuse is not None:
                return misuse
        attribute = self._attributes.get(id(parameter))
        if attribute is not None:
            return (
                f"the same tensor is also held in the plain attribute {attribute}, which would keep the old "
                "one. Read it through its module instead"
            )
        readers = (self._uses.reader_around(owner) for owner in owners if owner.generated)
        reader = next((reader for reader in readers if reader is not None), None)
        if reader is None:
            return None
        return f"the forward of {reader} reads it too, around the graph that holds it. Expand before tracing"


def _is_generated(model: nn.Module, path: str) -> bool:
    """Whether a module is a GraphModule, or holds tensors for the code of one."""
    module = model.get_submodule(path)
    while type(module) is nn.Module and path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
    return isinstance(module, fx.GraphModule)


class _Uses:
    """How modules use their own parameters: by tracing them, else by watching the whole model run."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None) -> None:
        self._model = model
        self._example_inputs = example_inputs
        self._traced: dict[int, dict[str, Use] | UnknownUse] = {}
        self._observed: dict[str, Use] | None = None

    def _of_forward(self, module: nn.Module) -> dict[str, Use] | UnknownUse:
        if id(module) not in self._traced:
            try:
                self._traced[id(module)] = parameter_uses(module)
            except UnknownUse as error:
                self._traced[id(module)] = error
        return self._traced[id(module)]

    def reader_around(self, owner: Owner) -> str | None:
        """The class of a module around the owner whose own forward reads the parameter, if it has a graph."""
        path = owner.path
        while path:
            path = path.rpartition(".")[0]
            module, name = self._model.get_submodule(path), owner.name.removeprefix(f"{path}.")
            if not isinstance(module, fx.GraphModule) and not _only_holds(module):
                found = self._of_forward(module)
                if isinstance(found, dict) and name in found and found[name].kind != "unused":
                    return type(module).__name__
        return None

    def of(self, owner: Owner) -> Use | str:
        """How the owner uses the parameter, or why that is not known."""
        while _only_holds(owner.module) and owner.path:
            path, _, key = owner.path.rpartition(".")
            parent = self._model.get_submodule(path)
            owner = Owner(path, parent, f"{key}.{owner.attribute}")
        found = self._of_forward(owner.module)
        if isinstance(found, dict) and owner.attribute in found:
            use = found[owner.attribute]
            if use.kind != "unused":
                return use
        if self._example_inputs is not None:
            if self._observed is None:
                self._observed = observed_uses(self._model, self._example_inputs)
            if owner.name in self._observed:
                return self._observed[owner.name]
        if isinstance(found, UnknownUse):
            kind = type(owner.module).__name__
            return f"how {kind} uses it is not known: cannot trace its forward ({found}). Give example_inputs"
        return f"{type(owner.module).__name__} does not use it in its forward"


def _verdict(parameter: Tensor, owner: Owner, uses: _Uses) -> _Verdict:
    """The verdict on a parameter by one of its owners: by the owner's class, else by the use of it."""
    module, attribute = owner.module, owner.attribute
    if type(module) in EXPANDED and attribute == "weight" and "forward" not in module.__dict__:
        return _Verdict("expand", space="layer")
    found = view_by_class(module, attribute, parameter)
    if found is not None:
        return _Verdict(REFUSED, found) if isinstance(found, str) else _Verdict("expand", view=found)
    if type(module).__module__.startswith("torch.nn.modules.") and not _only_holds(module):
        return _Verdict(LEFT, f"{NO_WEIGHT}: {type(module).__name__}.{attribute}")
    if sum(length > 1 for length in parameter.shape) < 2:
        return _Verdict(LEFT, f"{NO_WEIGHT}: it has a single row or column")
    return _verdict_by_use(parameter, uses.of(owner))


def _verdict_by_use(parameter: Tensor, use: Use | str) -> _Verdict:
    if isinstance(use, str):
        return _Verdict(REFUSED, use)
    if use.kind in ("other", "unused"):
        return _Verdict(LEFT, f"{NO_WEIGHT}: used by {use.operator}")
    return _Verdict("expand", view=used_view(parameter.shape, use))


def _without_parameter(path: str, module: nn.Module) -> Iterator[Site]:
    """Sites whose weight is no parameter: expanded already, computed by somebody else, or packed."""
    name = path or type(module).__name__
    for attribute, kind, action, reason in _computed(module):
        inner = name if attribute == "weight" else f"{name}.{attribute}"
        yield Site(inner, kind, (Owner(path, module, attribute),), action=action, reason=reason)


def _computed(module: nn.Module) -> Iterator[tuple[str, str, Action, str]]:
    """(attribute, kind of the module, action, reason) of each weight that is no parameter."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        if any(True for _ in module.parameters(recurse=False)):
            yield "weight", module.original_name, REFUSED, "TorchScript is compiled. Expand before scripting"
        return
    if isinstance(module, Rewritten):
        yield "weight", describe(module), LEFT, module.status
        return
    yield from _parametrized(module)
    if parametrize.is_parametrized(module):
        return
    if isinstance(module, nn.Linear | _ConvNd) and module._parameters.get("weight") is None:
        hooks = ", ".join(type(hook).__name__ for hook in module._forward_pre_hooks.values())
        by = f"computed by the hook {hooks}" if hooks else "no parameter"
        advice = "Use torch.nn.utils.parametrizations and remove it first"
        yield "weight", describe(module), REFUSED, f"the weight is {by}. {advice}"
    elif "quantized" in type(module).__module__ and callable(getattr(module, "weight", None)):
        yield "weight", kind, REFUSED, "packed quantised weights. Expand before quantising"


def _parametrized(module: nn.Module) -> Iterator[tuple[str, str, Action, str]]:
    kind, expanded = type(module).__name__, sorted(name for name, _, _ in expanded_weights(module))
    yield from ((name, kind, LEFT, "expanded already") for name in expanded)
    lists = getattr(module, LISTS) if parametrize.is_parametrized(module) else nn.Module()
    for name, held in lists.named_children():
        if name not in expanded and "0" in held._modules:
            by = f"{type(held._modules['0']).__name__} (torch.nn.utils.parametrize)"
            yield name, kind, REFUSED, f"computed by {by}. Remove that parametrization first"


def _held_in_attributes(model: nn.Module) -> dict[int, str]:
    """Parameters that modules also hold in plain attributes (lists, dicts), by id: where."""
    found: dict[int, str] = {}

    def visit(value: Any, where: str, depth: int) -> None:
        if isinstance(value, nn.Parameter):
            found.setdefault(id(value), where)
        elif depth and isinstance(value, list | tuple):
            for item in value:
                visit(item, where, depth - 1)
        elif depth and isinstance(value, dict):
            for item in value.values():
                visit(item, where, depth - 1)

    own = set(vars(Module()))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in own and name != "_flat_weights":
                visit(value, f"{path}.{name}" if path else name, 3)
    return found


def _only_holds(module: nn.Module) -> bool:
    """Whether it has no forward, and what it holds is used by a module around it."""
    return type(module) is nn.Module or isinstance(module, nn.ParameterList | nn.ParameterDict)


def _is_matrix(attribute: str, parameter: Tensor) -> bool:
    return attribute != "bias" if is_lazy(parameter) else parameter.ndim >= 2


def _describe_parameter(module: nn.Module, parameter: Tensor) -> str:
    shape = "?" if is_lazy(parameter) else "x".join(map(str, parameter.shape))
    return f"{type(module).__name__} {shape}"
