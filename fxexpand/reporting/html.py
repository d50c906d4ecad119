"""HTML pages in one file, without scripts, addresses or fonts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; color: #1f2937;
       background: #fff; max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
p, ul { max-width: 46rem; }
.subtitle, figcaption, .note { color: #4b5563; }
.note, figcaption { font-size: .9rem; }
.verdict { background: #f3f4f6; border-left: 4px solid #4c6a92; padding: .8rem 1.1rem; max-width: none;
           list-style: none; margin: 1.2rem 0; }
.verdict li + li { margin-top: .35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; margin: .6rem 0; }
th, td { padding: .32rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e7eb; }
th { color: #4b5563; font-weight: 600; border-bottom: 2px solid #9ca3af; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.failed { color: #b91c1c; font-weight: 700; }
figure { margin: .6rem 0 0; }
svg { width: 100%; height: auto; display: block; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .9em; }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A complete page; ``parts`` are markup."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; a cell NO has a class of its own, ``failed``."""

    def line(row: Sequence[str], tag: str) -> str:
        cells = (
            f'<{tag} class="failed">{escape(cell)}</{tag}>'
            if cell == "NO"
            else f"<{tag}>{escape(cell)}</{tag}>"
            for cell in row
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>\n{line(head, "th")}\n{body}\n</table></div>'


def bullets(lines: Sequence[str], kind: str = "") -> str:
    """A list of plain text; ``kind`` is its HTML class."""
    opening = f'<ul class="{kind}">' if kind else "<ul>"
    return opening + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
