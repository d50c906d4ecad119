"""The selection of sites and of their recipes: the only reader of ``select``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from fxexpand.errors import SelectionError
from fxexpand.recipes.recipe import Recipe

Pattern: TypeAlias = "str | re.Pattern[str]"
Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Select: TypeAlias = "Predicate | Pattern | Iterable[Pattern] | Mapping[Pattern, Recipe | None] | None"


class Selection:
    """The recipe of each site by ``select``. Patterns that match no site are recorded, as they are errors.

    Args:
        select: None takes every site. A predicate is called with the name of the site and the module that
            has the weight. A pattern is a glob (``"layer4.*"``, ``"*.fc?"``), or a regular expression for the
            whole name: ``re.compile(...)`` or a string that begins with ``"re:"``. A pattern takes the sites
            that it matches, by any name of a tied weight, and all sites below a module that it matches. A
            list takes the sites of all its patterns. A mapping has a recipe per pattern (None: leave the site
            alone); the last pattern that matches counts.
        recipe: recipe of sites whose pattern has none.

    Raises: SelectionError: ``select`` has none of these forms, or a regular expression is invalid.
    """

    def __init__(self, select: Select, recipe: Recipe) -> None:
        if not isinstance(recipe, Recipe):
            raise SelectionError(f"recipe={recipe!r}: give a recipe, as in recipe=Chain(depth=3, width=2).")
        self._default = recipe
        self._predicate: Predicate | None = None
        self._patterns: list[tuple[Pattern, Recipe | None]] = []
        self._unused: dict[Pattern, None] = {}
        self._all = select is None
        if select is None:
            return
        if isinstance(select, str | re.Pattern):
            select = [select]
        if isinstance(select, Mapping):
            self._patterns = list(select.items())
        elif isinstance(select, Iterable):
            self._patterns = [(pattern, recipe) for pattern in select]
        elif callable(select):
            self._predicate = select
        else:
            raise SelectionError(
                f"select={select!r}: give a predicate (name, module) -> bool, a pattern, a list of patterns "
                "or a mapping from pattern to recipe."
            )
        for pattern, chosen in self._patterns:
            if not isinstance(pattern, str | re.Pattern):
                raise SelectionError(f"select: {pattern!r} is no pattern. Give a string or re.compile(...).")
            if chosen is not None and not isinstance(chosen, Recipe):
                raise SelectionError(
                    f"select[{_text(pattern)!r}]={chosen!r}: give a recipe, or None to leave."
                )
            _matches(pattern, "")
        self._unused = dict.fromkeys(pattern for pattern, _ in self._patterns)

    def recipe_for(self, name: str, module: nn.Module, aliases: Sequence[str] = ()) -> Recipe | None:
        """The recipe for a site; None leaves it alone.

        Args:
            aliases: other names of a tied weight, which patterns may match too.
        """
        if self._all:
            return self._default
        if self._predicate is not None:
            return self._default if self._predicate(name, module) else None
        result: Recipe | None = None
        parts = [part for each in (name, *aliases) for part in _with_ancestors(each)]
        for pattern, recipe in self._patterns:
            if any(_matches(pattern, part) for part in parts):
                self._unused.pop(pattern, None)
                result = recipe
        return result

    def require_used(self, names: Iterable[str]) -> None:
        """Check that every pattern matched a site, after ``recipe_for`` was called for all sites.

        Raises: SelectionError: a pattern matched none of ``names``.
        """
        if not self._unused:
            return
        some = list(names)
        shown = ", ".join(some[:8]) + (f", ... ({len(some)} in all)" if len(some) > 8 else "")
        patterns = ", ".join(repr(_text(pattern)) for pattern in self._unused)
        raise SelectionError(f"select: {patterns} matches no site. The sites are: {shown or 'none'}.")


def _matches(pattern: Pattern, name: str) -> bool:
    if isinstance(pattern, str) and not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return (
            re.fullmatch(pattern.removeprefix("re:") if isinstance(pattern, str) else pattern, name)
            is not None
        )
    except re.error as error:
        raise SelectionError(f"select: {_text(pattern)!r} is no regular expression: {error}.") from None


def _text(pattern: Pattern) -> str:
    return pattern if isinstance(pattern, str) else pattern.pattern


def _with_ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
