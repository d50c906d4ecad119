"""The shape of the repository: the passes symlink, the packaging list, and file names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layering import ORDER

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("fxexpand", "passes", "tests", "benchmarks")
SHIPPED = ("fxexpand", "passes")
VAGUE_NAMES = {"utils", "util", "misc", "common", "base", "helpers"}


def python_files() -> Iterator[Path]:
    """Every Python file once; the symlink is not followed."""
    for folder in SOURCE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (ROOT / "fxexpand" / "passes") not in path.parents:
                yield path


def test_the_symlink_is_relative_and_resolves() -> None:
    link = ROOT / "fxexpand" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")
    assert link.resolve() == ROOT / "passes"


def test_passes_is_loaded_once_under_its_full_name() -> None:
    program = (
        "import sys, fxexpand.passes\n"
        "assert 'passes' not in sys.modules\n"
        "assert fxexpand.passes.__name__ == 'fxexpand.passes'"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_nothing_imports_passes_under_its_bare_name() -> None:
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name.split(".")[0] != "passes", f"{path}:{node.lineno}: import fxexpand.passes instead"


def test_every_package_is_shipped() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    found = {"fxexpand", "fxexpand.passes"}
    for start in (ROOT / "fxexpand").rglob("__init__.py"):
        found.add(".".join(start.parent.relative_to(ROOT).parts))
    for start in (ROOT / "passes").rglob("__init__.py"):
        found.add(".".join(("fxexpand", *start.parent.relative_to(ROOT).parts)))
    assert set(settings["packages"]) == found
    assert settings["package-dir"]["fxexpand.passes"] == "passes"


def test_files_are_named_after_what_they_hold() -> None:
    assert not [str(path) for path in python_files() if path.stem in VAGUE_NAMES]


def rooms() -> dict[str, Path]:
    """The packages of the library by their paths in the repository."""
    starts = [path for path in python_files() if path.name == "__init__.py"]
    found = {f"{path.parent.relative_to(ROOT)}/": path for path in starts}
    return {
        name: path for name, path in found.items() if name.split("/")[0] in SHIPPED and name != "fxexpand/"
    }


def test_the_map_is_the_country() -> None:
    """CONTRIBUTING's map has a row for each room, in the order in which imports point."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Layout")[1].split("\n## ")[0]
    found = re.findall(r"^\| `([^`]+/)` \|", text, re.MULTILINE)
    assert set(found) == {name for name in rooms() if name.count("/") == (1 if "passes" in name else 2)}
    names = [path.rstrip("/").rpartition("/")[2] for path in found]
    assert names == [name for name in ORDER if name in names]


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_says_what_is_in_it(room: str) -> None:
    """The docstring of a package names its files."""
    text = ast.get_docstring(ast.parse(rooms()[room].read_text(encoding="utf-8"))) or ""
    for path in sorted((ROOT / room).glob("*.py")):
        if path.name != "__init__.py":
            assert f"``{path.stem}``" in text, f"{room}__init__.py does not name {path.name}"


def test_the_root_stays_small() -> None:
    entries = [path for path in (ROOT / "fxexpand").iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len([path for path in entries if path.stem not in ("__init__", "__main__")]) <= 15


@pytest.mark.parametrize("target", ["help", "demo", "test", "lint", "check", "bench", "clean"])
def test_the_makefile_has_its_targets(target: str) -> None:
    assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_ci_runs_what_people_run() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make check" in script
    assert "make test" in script
    assert {"make lint", "make test"} <= set(script.splitlines())
    assert "\ncheck: lint test " in (ROOT / "Makefile").read_text(encoding="utf-8")
