"""What the documents show is run: Python blocks, commands, make targets, and links."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import fxexpand
from fxexpand.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# So many Python blocks at least.
EXAMPLES = {
    "README.md": 1,
    "docs/index.md": 1,
    "docs/comparison.md": 3,
    "docs/compression.md": 3,
    "docs/concepts.md": 6,
    "docs/deployment.md": 4,
    "docs/exactness.md": 3,
    "docs/extending.md": 3,
    "docs/fusing.md": 2,
    "docs/limits.md": 3,
    "docs/rank.md": 3,
    "docs/recipes.md": 2,
    "docs/training.md": 1,
}
# Commands that take minutes, or large models: their options are checked, the work is not done.
LONG = {"demo", "train", "timm:repvgg_a0", "timm:mobileone_s0"}


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


def require_known(line: str) -> None:
    """That the make target, module, extra or command of a line exists, with the options that it gives."""
    program, *arguments = shlex.split(line)
    options = [argument for argument in arguments if argument.startswith("--")]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert arguments, line
        for target in arguments:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{line}: no such target"
    elif program == "python" and arguments[0].startswith("docs/"):
        assert "__main__" in (ROOT / arguments[0]).read_text(encoding="utf-8"), f"{line}: does nothing"
    elif program == "python":
        assert arguments[0] == "-m", f"{line}: run it as a module, from the folder that holds benchmarks"
        spec = importlib.util.find_spec(arguments[1])
        assert spec is not None and spec.origin is not None, f"{line}: no such module"
        inside = spec.submodule_search_locations
        files = [*Path(inside[0]).glob("*.py")] if inside else [Path(spec.origin)]
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        assert "__main__" in source, f"{line}: does nothing"
        for option in options:
            assert f'add_argument("{option}"' in source, f"{line}: no option {option}"
    elif program == "pip":
        assert arguments[0] == "install", line
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        known = extras["project"]["optional-dependencies"]
        for extra in re.findall(r"\w+", "".join(re.findall(r"\[(.*?)\]", line))):
            assert extra in known, f"{line}: no extra {extra}"
    else:
        assert program == "fxexpand", f"{line}: this test does not know how to check it"
        group: Any = typer.main.get_command(app)
        command = group if arguments[0].startswith("-") else group.get_command(None, arguments[0])
        assert command is not None, f"{line}: no such command"
        allowed = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert set(options) <= allowed, f"{line}: no option {set(options) - allowed}"


def require_parameters(code: str) -> None:
    """That ``fxexpand.f(a, b=1, *, c)`` names parameters of ``f``, and the defaults where it gives some."""
    function, _, rest = code.partition("(")
    module, _, attribute = function.rpartition(".")
    arguments = ast.parse(f"def f({rest}: ...").body[0]
    assert isinstance(arguments, ast.FunctionDef)
    found = inspect.signature(pkgutil.resolve_name(f"{module}:{attribute}")).parameters
    given = [*arguments.args.args, *arguments.args.kwonlyargs]
    assert {each.arg for each in given} <= set(found), f"{code}: it has {list(found)}"
    last = len(arguments.args.args) - len(arguments.args.defaults)
    defaults = zip(
        [*arguments.args.args[last:], *arguments.args.kwonlyargs],
        [*arguments.args.defaults, *arguments.args.kw_defaults],
        strict=True,
    )
    for each, default in defaults:
        if default is not None and ast.unparse(default) != "...":
            value = eval(ast.unparse(default), {key: getattr(fxexpand, key) for key in fxexpand.__all__})
            assert found[each.arg].default == value, f"{code}: {each.arg} is {found[each.arg].default}"


CASES = [(path, line) for path in DOCUMENTS if path.exists() for line in commands(path)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_blocks(path) >= EXAMPLES.get(name(path), 0)


@pytest.mark.parametrize(("path", "line"), CASES, ids=[f"{name(path)}: {line}" for path, line in CASES])
def test_commands_work(path: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_known(line)
    program, *arguments = shlex.split(line)
    if program == "fxexpand":
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(app, [*arguments, "--help"] if LONG & {*arguments} else arguments)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_what_the_text_names_exists(path: Path) -> None:
    for code in INLINE.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        words = code.split()
        if len(words) > 1 and words[0] in ("make", "python", "pip", "fxexpand"):
            require_known(code)
        elif re.fullmatch(r"fxexpand(\.\w+)+", code):
            pkgutil.resolve_name(code)
        elif re.fullmatch(r"fxexpand(\.\w+)+\(.*\)", code):
            require_parameters(code)


def test_the_api_table_has_the_parameters_of_the_functions() -> None:
    section = README.read_text(encoding="utf-8").split("## API at a glance")[1].split("\n## ")[0]
    calls = re.findall(r"^\| `(\w+)(\(.*?\))`(?=[ ,])", section, re.MULTILINE)
    assert {"expand", "fuse", "fused_state_dict", "report", "export_onnx"} <= {call for call, _ in calls}
    for call, parameters in calls:
        require_parameters(f"fxexpand.{call}{parameters}")


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
    assert commands(README)[:2] == ["make demo", "make test"]


def test_the_readers_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One two\n```python\n\nassert 1 == 2\n```\n[a](gone.md) [b](#one-two) [c](#three)\n")
    assert broken_links(page) == ["gone.md", "#three"]
    with pytest.raises(AssertionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno == 3  # counted from 0: the fourth line of the page
    assert CliRunner().invoke(app, ["demo", "--seed", "3", "--help"]).exit_code == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make dem", "no such target"),
        ("python -m benchmarks.roundtrip --quickly", "no option --quickly"),
        ('pip install -e ".[visions]"', "no extra visions"),
        ("fxexpand trian timm:resnet10t", "no such command"),
        ("fxexpand demo --seed 3", "no option"),
        ("curl example", "does not know"),
    ],
)
def test_a_stale_command_is_noticed(line: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        require_known(line)


@pytest.mark.parametrize("code", ["expand(model, recipes)", 'fuse(model, *, scope="some")'])
def test_a_stale_signature_is_noticed(code: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(code)):
        require_parameters(f"fxexpand.{code}")
