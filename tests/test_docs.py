"""The site: its pages are complete, made from the program and the results, and need no other server."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import fxexpand
from fxexpand.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation() -> list[str]:
    """The pages that mkdocs.yml names."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return re.findall(r"[\w-]+\.md", settings.partition("\nnav:\n")[2])


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(navigation()) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_page_of_the_command_line_is_what_the_program_says() -> None:
    found = script("commands").page()
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == found, "run python docs/commands.py"
    assert all(f"## {name}\n" in found for name in COMMANDS)


def test_the_headline_tables_are_those_of_the_results() -> None:
    headline = script("headline")
    for page in headline.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "<!-- fusing -->" in text
        assert text == headline.filled(text), "run python docs/headline.py"
    figures = headline.fusing_table()
    rows = [row for row in headline.read("fuse_zoo")["rows"] if row["name"].startswith("timm:")]
    ran = [row for row in rows if all("failed" not in each for each in row["methods"].values())]
    norms = sum(row["methods"]["fxexpand"]["norm"] for row in ran)
    assert f"on {len(ran)} networks" in figures and f"| {norms} |" in figures.splitlines()[-3]


def test_the_plot_is_small_and_stands_alone() -> None:
    text = (DOCS / "fusing.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml") and len(text) < 100_000
    assert "<script" not in text and 'href="http' not in text and "@import" not in text
    assert all(f">{row['name'].removeprefix('timm:')}<" in text for row in script("headline").networks())


def test_the_api_page_has_every_public_name() -> None:
    named = re.findall(
        r"^::: fxexpand\.([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    whole = {name for name in named if (ROOT / "fxexpand" / f"{name.replace('.', '/')}.py").exists()}
    for name, home in [(name, home) for home, names in fxexpand.CONTENTS.items() for name in names]:
        last = [path for path in named if path.rpartition(".")[2] == name]
        assert home in whole or last, f"docs/api.md lacks {name}"


def test_the_site_builds_and_asks_no_other_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for page in navigation():
        text = (tmp_path / page).with_suffix(".html").read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^" >]+)', text)
        fetched += re.findall(r'<link[^>]* rel="?stylesheet"?[^>]*>', text)
        assert fetched and not [link for link in fetched if "://" in link], page
    assert not list(tmp_path.rglob("*.py"))
