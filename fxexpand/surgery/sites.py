"""Find the weights of linear maps in a model, and say of each whether and where it can be expanded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.module import Module
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fxexpand.kernel.algebra import FLOATING
from fxexpand.kernel.modules import describe
from fxexpand.layers.expanded import EXPANDED
from fxexpand.layers.parametrized import View, expanded_weights
from fxexpand.layers.rewritten import Rewritten
from fxexpand.running.inputs import ExampleInputs
from fxexpand.surgery.uses import UnknownUse, Use, observed_uses, parameter_uses

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "LSTMCell": 4, "GRUCell": 3, "RNNCell": 1}


class Owner(NamedTuple):
    """A module that holds a parameter, and under which name."""

    path: str
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        """The parameter's dotted name."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute


@dataclass(frozen=True)
class Site:
    """One weight and what can be done with it.

    Attributes:
        name: the module's path where ``space`` is ``"layer"``, else the parameter's.
        kind: what it is, for people.
        owners: every module that holds the parameter.
        weight: the parameter itself; None where the weight is no parameter.
        space: ``"layer"``: the module becomes an expanded layer; ``"weight"``: the parameter is computed.
        view: how the parameter is read as a kernel; None in layer space and where ``reason`` is given.
        action: ``"expand"``; ``"refuse"`` and ``"leave"`` come with a reason. What is left is no weight of a
            linear map, or expanded already.
    """

    name: str
    kind: str
    owners: tuple[Owner, ...]
    weight: Tensor | None = None
    space: Literal["layer", "weight"] = "weight"
    view: View | None = None
    action: Literal["expand", "refuse", "leave"] = "expand"
    reason: str = ""

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight; the first of several."""
        return self.owners[0].module

    @property
    def aliases(self) -> tuple[str, ...]:
        """What a tied weight is called at its other owners."""
        return tuple(owner.path if self.space == "layer" else owner.name for owner in self.owners[1:])


class _Verdict(NamedTuple):
    action: Literal["expand", "refuse", "leave"]
    reason: str = ""
    view: View | None = None
    space: Literal["layer", "weight"] = "weight"


def find_sites(model: nn.Module, example_inputs: ExampleInputs | None = None) -> list[Site]:
    """All sites of ``model``, in its own order; nothing is changed.

    Args:
        example_inputs: run once, if a module with parameters of its own cannot be traced, to see how it uses
            them.
    """
    owners: dict[int, list[Owner]] = {}
    for path, module in own_modules(model):
        scripted = isinstance(module, torch.jit.ScriptModule)
        for attribute, parameter in () if scripted else module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(Owner(path, module, attribute))
    held = _held_elsewhere(model)
    uses = _Uses(model, example_inputs)
    sites: list[Site] = []
    seen: set[int] = set()
    for path, module in own_modules(model):
        sites.extend(_without_parameter(path, module))
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or not _is_matrix(attribute, parameter):
                continue
            seen.add(id(parameter))
            group = tuple(owners[id(parameter)])
            verdict = _shared_verdict(parameter, group, held.get(id(parameter)), uses)
            in_layer = attribute == "weight" and isinstance(module, nn.Linear | _ConvNd)
            named = in_layer and len(group) == 1
            sites.append(
                Site(
                    name=(path or type(module).__name__) if named else group[0].name,
                    kind=describe(module) if in_layer else _describe_parameter(module, parameter),
                    owners=group,
                    weight=parameter,
                    space=verdict.space,
                    view=verdict.view,
                    action=verdict.action,
                    reason=verdict.reason,
                )
            )
    return sites


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model`` once each, without the factors that an expansion put in."""
    hidden: set[int] = set()
    for _, module in model.named_modules():
        if isinstance(module, Rewritten) and not module.traced_inside:
            hidden.update(id(inner) for part in module.factors() for inner in part.modules())
        if parametrize.is_parametrized(module):
            lists = module.parametrizations
            assert isinstance(lists, nn.ModuleDict)
            hidden.update(map(id, lists.modules()))
    for path, module in model.named_modules():
        if id(module) not in hidden:
            yield path, module


class _Uses:
    """How modules use their own parameters: by tracing them, else by watching the whole model run."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None) -> None:
        self._model = model
        self._example_inputs = example_inputs
        self._traced: dict[int, dict[str, Use] | UnknownUse] = {}
        self._observed: dict[str, Use] | None = None

    def of(self, owner: Owner) -> Use | str:
        """How the owner uses the parameter, or why that is not known."""
        while _only_holds(owner.module) and owner.path:
            path, _, key = owner.path.rpartition(".")
            parent = self._model.get_submodule(path)
            owner = Owner(path, parent, f"{key}.{owner.attribute}")
        if id(owner.module) not in self._traced:
            try:
                self._traced[id(owner.module)] = parameter_uses(owner.module)
            except UnknownUse as error:
                self._traced[id(owner.module)] = error
        found = self._traced[id(owner.module)]
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


def _shared_verdict(parameter: Tensor, owners: tuple[Owner, ...], held: str | None, uses: _Uses) -> _Verdict:
    """The verdict on a parameter, from all its owners."""
    reason = _unfit(parameter)
    if reason is not None:
        return _Verdict("refuse", reason)
    verdicts = [_verdict(parameter, owner, uses) for owner in owners]
    willing = [verdict for verdict in verdicts if verdict.action == "expand"]
    if not willing:
        return next((verdict for verdict in verdicts if verdict.action == "refuse"), verdicts[0])
    if any(verdict.action == "refuse" for verdict in verdicts):
        return next(verdict for verdict in verdicts if verdict.action == "refuse")
    if held is not None:
        return _Verdict(
            "refuse",
            f"the same tensor is also held in the plain attribute {held}, which would keep the old one. "
            "Read it through its module instead",
        )
    if len(owners) == 1:
        return willing[0]
    view = next((verdict.view for verdict in willing if verdict.view is not None), None)
    if view is None:
        view = _layer_view(owners[0].module, parameter)
    return _Verdict("expand", view=view)


def _verdict(parameter: Tensor, owner: Owner, uses: _Uses) -> _Verdict:
    module, attribute = owner.module, owner.attribute
    shape = parameter.shape
    if isinstance(module, torch.fx.GraphModule) and not _is_typed(module):
        return _Verdict(
            "refuse",
            "a GraphModule holds it, and generated code takes no parametrization. Expand before tracing",
        )
    if type(module) in EXPANDED and attribute == "weight" and "forward" not in module.__dict__:
        return _Verdict("expand", view=None, space="layer")
    if attribute == "weight" and isinstance(module, nn.Linear | _ConvNd):
        return _Verdict("expand", view=_layer_view(module, parameter))
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and attribute == "weight":
        return _embedding(module, parameter)
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        blocks = 3 if attribute == "in_proj_weight" else 1
        return _Verdict("expand", view=View(shape, blocks=blocks))
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and attribute.startswith("weight"):
        kind = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in GATES), "RNN")
        blocks = 1 if attribute.startswith("weight_hr") else GATES[kind]
        return _Verdict("expand", view=View(shape, blocks=blocks))
    if isinstance(module, nn.Bilinear) and attribute == "weight":
        return _Verdict("expand", view=View(shape, kind="flat"))
    if type(module).__module__.startswith("torch.nn.modules.") and not _only_holds(module):
        return _Verdict("leave", f"no weight of a linear map: {type(module).__name__}.{attribute}")
    if sum(length > 1 for length in shape) < 2:
        return _Verdict("leave", "no weight of a linear map: it has a single row or column")
    use = uses.of(owner)
    if isinstance(use, str):
        return _Verdict("refuse", use)
    if use.kind in ("other", "unused"):
        return _Verdict("leave", f"no weight of a linear map: used by {use.operator}")
    return _Verdict("expand", view=_used_view(shape, use))


def _used_view(shape: torch.Size, use: Use) -> View:
    if use.kind == "conv" and len(shape) >= 3:
        return View(shape, kind="conv")
    if use.kind == "conv_transpose" and len(shape) >= 3:
        return View(shape, kind="flat")
    return View(shape, transposed=use.transposed)


def _layer_view(module: nn.Module, parameter: Tensor) -> View:
    if isinstance(module, _ConvTransposeNd):
        return View(parameter.shape, kind="conv_transpose", groups=module.groups)
    if isinstance(module, _ConvNd):
        return View(parameter.shape, kind="conv", groups=module.groups)
    return View(parameter.shape)


def _embedding(module: nn.Embedding | nn.EmbeddingBag, weight: Tensor) -> _Verdict:
    if module.sparse:
        return _Verdict("refuse", "sparse gradients do not pass through a product. Use sparse=False")
    if module.max_norm is not None:
        return _Verdict("refuse", "max_norm rewrites the rows it reads, which a product does not allow")
    padding = module.padding_idx
    if padding is not None and not weight.is_meta and bool(weight[padding].any()):
        return _Verdict("refuse", "the row of padding_idx is not zero; training the factors would move it")
    # A token picks a row, so the table is the weight (out, in) = (dimension, tokens), stored transposed.
    return _Verdict("expand", view=View(weight.shape, transposed=True))


def _unfit(parameter: Tensor) -> str | None:
    """Why no parameter like this can be factored."""
    if is_lazy(parameter):
        return "not initialised yet (lazy). Run the model once first"
    if parameter.layout != torch.strided:
        return f"a sparse tensor ({parameter.layout}) has no dense factors. Call to_dense() first"
    if parameter.is_complex():
        return "complex weights are not supported"
    if parameter.dtype not in FLOATING:
        return f"{parameter.dtype} weights cannot be trained. Expand before quantising"
    if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
        return f"a {type(parameter).__name__} has its own arithmetic. Expand before wrapping or quantising"
    if 0 in parameter.shape:
        return "the weight is empty"
    return None


def _without_parameter(path: str, module: nn.Module) -> Iterator[Site]:
    """Sites whose weight is no parameter: expanded already, computed by somebody else, or packed."""
    name = path or type(module).__name__

    def site(kind: str, action: Literal["refuse", "leave"], reason: str, attribute: str = "weight") -> Site:
        inner = name if attribute == "weight" else f"{name}.{attribute}"
        return Site(inner, kind, (Owner(path, module, attribute),), action=action, reason=reason)

    if isinstance(module, torch.jit.ScriptModule):
        if any(True for _ in module.parameters(recurse=False)):
            yield site(module.original_name, "refuse", "TorchScript is compiled. Expand before scripting")
        return
    if isinstance(module, Rewritten):
        yield site(describe(module), "leave", module.status)
        return
    ours = {attribute for attribute, _, _ in expanded_weights(module)}
    for attribute in sorted(ours):
        yield site(type(module).__name__, "leave", "expanded already", attribute)
    if parametrize.is_parametrized(module):
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for attribute, held in lists.items():
            if attribute not in ours and getattr(held, "0", None) is not None:
                reason = (
                    f"computed by {type(held[0]).__name__} (torch.nn.utils.parametrize). "  # type: ignore[index]
                    "Remove that parametrization first"
                )
                yield site(type(module).__name__, "refuse", reason, attribute)
    elif isinstance(module, nn.Linear | _ConvNd) and module._parameters.get("weight") is None:
        hooks = ", ".join(type(hook).__name__ for hook in module._forward_pre_hooks.values())
        by = f"computed by the hook {hooks}" if hooks else "no parameter"
        yield site(
            describe(module),
            "refuse",
            f"the weight is {by}. Use torch.nn.utils.parametrizations and remove it first",
        )
    elif "quantized" in type(module).__module__ and callable(getattr(module, "weight", None)):
        yield site(type(module).__name__, "refuse", "packed quantised weights. Expand before quantising")


def _held_elsewhere(model: nn.Module) -> dict[int, str]:
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


def _is_typed(module: nn.Module) -> bool:
    return type(module) in EXPANDED


def _is_matrix(attribute: str, parameter: Tensor) -> bool:
    return attribute != "bias" if is_lazy(parameter) else parameter.ndim >= 2


def _describe_parameter(module: nn.Module, parameter: Tensor) -> str:
    shape = "?" if is_lazy(parameter) else "x".join(map(str, parameter.shape))
    return f"{type(module).__name__} {shape}"
