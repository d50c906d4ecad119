"""The contract that every pass keeps, checked by running the pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.parameter import is_lazy

from fxexpand.errors import ContractError, VerificationError
from fxexpand.layers.parametrized import LISTS
from fxexpand.reporting.rows import LEFT, REFUSED, UNCHANGED, Report, Row
from fxexpand.running.copying import copied
from fxexpand.running.outputs import outputs_of
from fxexpand.running.verify import require_same_outputs

Pass = Callable[[fx.GraphModule], PassResult]


def check(pass_: Pass, graph_module: fx.GraphModule, *inputs: Any) -> PassResult:
    """Run a pass and hold its result to the contract of passes; returns the result.

    1. Pure: unless the pass has ``inplace=True``, the graph, tensors, flags and hooks of ``graph_module``
       stay as they are, and a new module shares no tensor with it. Where nothing is changed, the result is
       ``graph_module`` itself, and with ``inplace=True`` it always is.
    2. Idempotent: on its own result the pass changes nothing.
    3. Rows: ``modified`` is true exactly if a row says so. Each parameter that is gone or has other values
       is in a changed row, by its name, by that of its module, or by a node that reads it. Where a
       module of some class is changed, each module of that class which the graph calls is in a row.
    4. Reasons: each refusal has one, and so has each site that is left; no site has two rows of one action.
    5. Outputs: with ``inputs``, one call's arguments, the outputs are equal, in evaluation mode, within the
       tolerance of the dtype: a relative 1e-10 in float64. Leave them out for a pass that approximates.
    6. The new graph lints and is compiled.

    Args:
        pass_: called with a GraphModule, returns a ``Result``: a PassResult with a ``report``.
        graph_module: left as it is; an ``inplace`` pass is given a copy.
        inputs: positional arguments of ``graph_module``.

    Raises: ContractError: it breaks a clause; the message lists all that are broken.
    """
    inplace = bool(getattr(pass_, "inplace", False))
    given = copied(graph_module) if inplace else graph_module
    before = _Snapshot.of(given)
    outputs = outputs_of(given, inputs) if inputs else []
    result = pass_(given)
    report = getattr(result, "report", None)
    title = type(pass_).__name__
    if not (isinstance(result, PassResult) and isinstance(result.graph_module, fx.GraphModule)):
        raise ContractError(f"{title}: returns a {type(result).__name__}. Return a fxexpand.passes.Result.")
    if not isinstance(report, Report):
        raise ContractError(f"{title}: its result has no report. Return a fxexpand.passes.Result with one.")
    broken = [
        *_impure(before, given, result, inplace),
        *_rows(before, result, report),
        *_reasons(report),
        *(_graph(result.graph_module) or _outputs(outputs, result, inputs, report)),
    ]
    if not any(clause.startswith("graph") for clause in broken):
        broken += _repeats(pass_, result.graph_module)
    if broken:
        raise ContractError(f"{title} breaks the contract of passes:\n- " + "\n- ".join(broken))
    return result


@dataclass(frozen=True)
class _Snapshot:
    """A graph module at one time.

    Attributes:
        facts: the code, and of every module its class, mode, hooks and parameter flags, by name.
        values: copies of all parameters and buffers, by name.
        readers: the names that stand for each parameter in a report: its own, those of its modules, of the
            nodes that read it, and of their other arguments.
        called: the class of each module with parameters that the graph calls, by name.
    """

    facts: dict[str, object]
    values: dict[str, Tensor]
    readers: dict[str, set[str]]
    called: dict[str, type[nn.Module]]

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> _Snapshot:
        facts: dict[str, object] = {"the graph": graph_module.graph.python_code("self").src}
        for path, module in graph_module.named_modules(remove_duplicate=False):
            hooks = {key: tuple(value) for key, value in vars(module).items() if key.endswith("_hooks")}
            facts[f"the module {path}".rstrip()] = (id(module), type(module), module.training, hooks)
        flags = {f"the flag of {name}": (id(t), t.requires_grad) for name, t in _tensors(graph_module)}
        targets = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
        called = {target: graph_module.get_submodule(target) for target in sorted(targets)}
        return cls(
            facts=facts | flags,
            values={name: tensor.clone() for name, tensor in _dense(graph_module).items()},
            readers={name: _readers(graph_module, name) for name, _ in graph_module.named_parameters()},
            called={name: type(module) for name, module in called.items() if list(module.parameters())},
        )

    def differences(self, now: _Snapshot) -> list[str]:
        """The facts and the values that are others now."""
        facts = self.facts | now.facts
        found = [name for name in facts if self.facts.get(name) != now.facts.get(name)]
        kept = [name for name in self.values if name in now.values]
        return found + [name for name in kept if not _same(self.values[name], now.values[name])]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _dense(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that have values to compare."""
    named = _tensors(model)
    return {name: t.detach() for name, t in named if t.layout == torch.strided and not is_lazy(t)}


def _memory(model: nn.Module) -> set[int]:
    """Where the values lie."""
    return {tensor.untyped_storage()._cdata for tensor in _dense(model).values() if tensor.numel()}


def _readers(graph_module: fx.GraphModule, name: str) -> set[str]:
    """The names that stand for a parameter in a report."""
    parts, found = name.split("."), set[str]()
    for path in (parts, [part for part in parts if part != LISTS]):  # a factor stands for its weight
        found.update(".".join(path[:i]) for i in range(1, len(path) + 1))
    nodes = [node for node in graph_module.graph.find_nodes(op="get_attr") if node.target == name]
    while nodes:  # through the values that are computed of parameters alone
        node = nodes.pop()
        found.update(each.name for each in (node, *node.all_input_nodes))
        if node.op == "get_attr" or all(each.op == "get_attr" for each in node.all_input_nodes):
            nodes.extend(node.users)
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return one.is_meta and other.is_meta and one.shape == other.shape
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _impure(before: _Snapshot, given: fx.GraphModule, result: PassResult, inplace: bool) -> Iterator[str]:
    if inplace or not result.modified:
        if result.graph_module is not given:
            yield "pure: " + ("inplace=True" if inplace else "nothing is changed") + ", but the module is new"
    elif result.graph_module is given:
        yield "pure: it changes the module that it is given"
    if inplace and result.modified:
        return
    changed = before.differences(_Snapshot.of(given))
    if changed:
        yield f"pure: in the module that it is given it changes {', '.join(changed)}"
    if result.graph_module is not given and _memory(given) & _memory(result.graph_module):
        yield "pure: the new module shares tensors with the one that it is given"


def _rows(before: _Snapshot, result: PassResult, report: Report) -> Iterator[str]:
    if result.modified != bool(report.changed):
        yield f"rows: modified is {result.modified}, and the report has {len(report.changed)} rows of changes"
    changed = _named(report.changed)
    now = _dense(result.graph_module)
    for name, value in before.values.items():
        gone = name not in now or not _same(value, now[name])
        if gone and not changed & before.readers.get(name, changed):
            yield f"rows: no row says that {name} was changed"
    sites = {row.site for row in report.changed}
    classes = {kind for name, kind in before.called.items() if name in sites}
    named = _named(report.rows)
    for name, kind in before.called.items():
        if kind in classes and not any(word == name or word.startswith(f"{name}.") for word in named):
            yield f"rows: {name} ({kind.__name__}) has no row, and others of its class have"


def _named(rows: Iterable[Row]) -> set[str]:
    """The sites, and the words of the reasons, which name the parts of a new layer."""
    return {word for row in rows for word in (row.site, *re.findall(r"[\w.]+", row.reason))}


def _reasons(report: Report) -> Iterator[str]:
    for row in report.rows:
        if row.action in UNCHANGED and not row.reason.strip():
            verb = {REFUSED: "refused", LEFT: "left"}[row.action]
            yield f"reasons: {row.site} is {verb} without one"
    counts = Counter((row.site, row.action) for row in report.rows)
    for (site, action), count in counts.items():
        if count > 1:
            yield f"reasons: {site} has {count} rows of {action}"


def _graph(graph_module: fx.GraphModule) -> list[str]:
    try:
        graph_module.graph.lint()
        compiled = graph_module.code == graph_module.graph.python_code("self").src
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return [f"graph: does not lint: {error}"]
    return [] if compiled else ["graph: is not recompiled"]


def _outputs(before: list[Tensor], result: PassResult, inputs: tuple[Any, ...], report: Report) -> list[str]:
    if not before:
        return []
    try:
        require_same_outputs(before, result.graph_module, inputs, max(1, len(report.changed)), "outputs")
    except VerificationError as error:
        return [str(error).split(". ")[0]]
    return []


def _repeats(pass_: Pass, graph_module: fx.GraphModule) -> Iterator[str]:
    again = pass_(graph_module)
    if again.modified or again.graph_module is not graph_module:
        rows = ", ".join(row.site for row in again.report.changed)  # type: ignore[attr-defined]
        yield f"idempotent: on its own result it changes {rows or 'something'} again"
