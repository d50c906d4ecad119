"""The planner of changes: every step is computed before the first edit, and undone on an error.

Functions on models and passes on graphs differ in where their sites come from, and in how a step is made.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fxexpand.errors import InexactError, RefusedError
from fxexpand.passes.sites import Site
from fxexpand.recipes import Recipe
from fxexpand.recipes.selection import Selection
from fxexpand.reporting.rows import LEFT, REFUSED, Report, Row


@dataclass(frozen=True)
class Step:
    """One site: its row in the report, and the edit, with all values computed.

    Attributes:
        edit: puts the values in; it cannot fail on its own account. None where the site stays as it is.
        modules: those that the edit touches, with each graph module whose graph it changes.
    """

    row: Row
    edit: Callable[[], None] | None = None
    modules: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The steps of one change of a model, in the order of its sites."""

    title: str
    all_steps: tuple[Step, ...]

    @property
    def report(self) -> Report:
        """A row for each site."""
        return Report(self.title, tuple(step.row for step in self.all_steps))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that change something."""
        return tuple(step for step in self.all_steps if step.edit is not None)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that the steps touch, once each."""
        return tuple(dict.fromkeys(module for step in self.steps for module in step.modules))


def planned(
    title: str,
    sites: Sequence[Site],
    selection: Selection,
    step: Callable[[Site, Recipe], Step],
    *,
    row: type[Row] = Row,
    strict: bool = False,
    progress: Callable[[Iterable[Site]], Iterable[Site]] = iter,
) -> Plan:
    """A step for each site; nothing is changed.

    Args:
        step: the step of a selected site, or an InexactError with the reason to refuse it.
        row: the class of the rows.

    Raises:
        RefusedError: ``strict`` and a selected site is refused.
        SelectionError: a pattern matches no site.
    """
    steps: list[Step] = []
    for site in progress(sites):
        recipe = selection.recipe_for(site.name, site.module, site.aliases)
        if recipe is None:
            steps.append(Step(site.row(LEFT, "not selected", row)))
        elif site.action != "expand":
            steps.append(Step(site.row(site.action, site.reason, row)))
        else:
            try:
                steps.append(step(site, recipe))
            except InexactError as error:
                steps.append(Step(site.row(REFUSED, str(error), row)))
        require_lenient([steps[-1].row], strict)
    selection.require_used(site.name for site in sites)
    return Plan(title, tuple(steps))


def require_lenient(rows: Iterable[Row], strict: bool) -> None:
    """Raises: RefusedError: ``strict`` and a row is a refusal."""
    refused = next((row for row in rows if row.action == REFUSED), None)
    if strict and refused is not None:
        raise RefusedError(refused.message)


def commit(plan: Plan) -> None:
    """Carry a plan out; should a step fail all the same, the model is put back as it was."""
    modules = plan.modules
    with restoring(modules):
        for step in plan.steps:
            assert step.edit is not None
            step.edit()
        for module in modules:
            if isinstance(module, fx.GraphModule):
                module.recompile()


def to_fixed_point(fold: Callable[[], Report], earlier: Sequence[Report] = ()) -> Report:
    """Call ``fold`` until it changes nothing: a fold takes readers away, so that more may be merged.

    Args:
        fold: plans and commits one round; its report has a row for each site.
        earlier: reports of what was done before, to be in the result too.
    """
    reports = [*earlier, fold()]
    while reports[-1].changed:
        reports.append(fold())
    refused = tuple(row for report in earlier for row in report.rows if row.action == REFUSED)
    reports[-1] = replace(reports[-1], rows=(*refused, *reports[-1].rows))
    return combined(reports)


def combined(reports: Sequence[Report]) -> Report:
    """One report of rounds one after the other: all that was changed, and what the last one left alone."""
    last = reports[-1]
    changed = [row for report in reports for row in report.changed]
    sites = {row.site for row in changed}
    rest = [row for row in last.rows if row.action == REFUSED or row.site not in sites]
    return Report(last.title, (*changed, *(row for row in rest if row not in changed)), last.traced)


@contextmanager
def restoring(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On any error, give the modules the class, the attributes and the graph that they have now."""
    before = [(module, type(module), _shallow(module.__dict__)) for module in modules]
    graphs = [(m, copy.deepcopy(m.graph)) for m, _, _ in before if isinstance(m, fx.GraphModule)]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for graph_module, graph in graphs:
            graph_module.graph = graph
        raise


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's attributes whose dictionaries (parameters, children, hooks) are copies too."""
    plain = (dict, OrderedDict)
    return {name: value.copy() if type(value) in plain else value for name, value in attributes.items()}
