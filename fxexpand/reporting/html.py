"""HTML pages in one file, without scripts, addresses or fonts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxexpand.reporting.table import short


def page(template: str, **values: Any) -> str:
    """The page that the template makes of the values, whose text is escaped.

    Args:
        template: a file below ``fxexpand`` that extends ``reporting/page.html``.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    pages.filters["short"] = short
    return pages.get_template(template).render(values)
