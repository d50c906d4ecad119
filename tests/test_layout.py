"""The shape of the repository: the passes symlink, the packaging list, file names and file lengths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("fxexpand", "passes", "tests", "benchmarks")
SHIPPED = ("fxexpand", "passes")
LONGEST = 450
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


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert lengths
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n >= LONGEST}
    assert not long, f"split these by concept: {long}"


def test_files_are_named_after_what_they_hold() -> None:
    assert not [str(path) for path in python_files() if path.stem in VAGUE_NAMES]


def mapped(text: str) -> list[str]:
    """The paths in the left cells of CONTRIBUTING's map; a bare name is in the folder of that before."""
    found: list[str] = []
    for row in text.split("## Layout")[1].split("\n## ")[0].splitlines():
        folder = ""
        for path in re.findall("`([^`]+)`", row.split("|")[1] if row.startswith("| `") else ""):
            folder = path.rpartition("/")[0] or folder
            found.append(path if "/" in path else f"{folder}/{path}")
    return found


def test_the_map_is_the_country() -> None:
    """What CONTRIBUTING's map has exists; every module and every package of the library is in it, once."""
    found = mapped((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(found) == len(set(found))
    for path in found:
        there = (ROOT / path).is_dir() if path.endswith("/") else (ROOT / f"{path}.py").is_file()
        assert there, f"CONTRIBUTING.md: there is no {path}"
    paths = [path.relative_to(ROOT) for path in python_files() if path.relative_to(ROOT).parts[0] in SHIPPED]
    wanted = {f"{path.parent}/" if path.stem == "__init__" else str(path.with_suffix("")) for path in paths}
    missing = wanted - {*found, "fxexpand/__main__"}
    assert not missing, f"CONTRIBUTING.md: give a place in the map to {sorted(missing)}"


@pytest.mark.parametrize("target", ["help", "demo", "test", "lint", "check", "bench", "clean"])
def test_the_makefile_has_its_targets(target: str) -> None:
    assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_ci_runs_what_people_run() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make check" in script
    assert "make test" in script
    assert {"make lint", "make test"} <= set(script.splitlines())
    assert "\ncheck: lint test " in (ROOT / "Makefile").read_text(encoding="utf-8")
