"""What the documents show is run: Python blocks, commands, make targets, and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxexpand.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EXAMPLES = {"README.md": 4, "docs/concepts.md": 3, "docs/exactness.md": 2}  # so many Python blocks at least
LONG = {"demo"}  # commands that take minutes: their options are checked, the work is not done


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(first line, content) of each fenced block of a language."""
    found = []
    for match in FENCE.finditer(text):
        if match[1] == language:
            found.append((text[: match.start(2)].count("\n") + 1, match[2]))
    return found


def commands(path: Path) -> list[str]:
    """The lines of the shell blocks, without comments."""
    lines = [
        line for _, block in blocks(path.read_text(encoding="utf-8"), "sh") for line in block.splitlines()
    ]
    return [line for line in (line.partition(" #")[0].strip() for line in lines) if line]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def run_blocks(path: Path) -> int:
    """Run the Python blocks of one file in order and in one namespace; the number of blocks."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    found = blocks(path.read_text(encoding="utf-8"), "python")
    for line, block in found:
        # Padded, so that a traceback points at the line of the document.
        exec(compile("\n" * (line - 1) + block, str(path), "exec"), namespace)
    return len(found)


CASES = [(path, line) for path in DOCUMENTS if path.exists() for line in commands(path)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_blocks(path) >= EXAMPLES.get(name(path), 0)


@pytest.mark.parametrize(("path", "line"), CASES, ids=[f"{name(path)}: {line}" for path, line in CASES])
def test_commands_work(path: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(line)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments)
    elif program == "python":
        assert arguments[0] == "-m", f"{line}: run it as a module, from the folder that holds benchmarks"
        assert (ROOT / Path(*arguments[1].split("."))).with_suffix(".py").exists()
    else:
        assert program == "fxexpand", f"{line}: this test does not know how to check it"
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(app, [*arguments, "--help"] if arguments[0] in LONG else arguments)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_resolve(path: Path) -> None:
    assert not broken_links(path)


def test_the_documents_name_no_machine() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|tmp|Users)/|localhost|pypi\.org|https?://\d", text), name(
            path
        )


def test_the_two_commands_of_a_newcomer_come_first() -> None:
    assert commands(ROOT / "README.md")[:2] == ["make demo", "make test"]


def test_the_readers_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One two\n```python\n\nassert 1 == 2\n```\n[a](gone.md) [b](#one-two) [c](#three)\n")
    assert broken_links(page) == ["gone.md", "#three"]
    with pytest.raises(AssertionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno == 3  # counted from 0: the fourth line of the page
    assert CliRunner().invoke(app, ["demo", "--seed", "3", "--help"]).exit_code == 2
