"""The size of files and functions: lines, cyclomatic complexity, parameters.

Divide a function that is beyond a limit along its cases, and a file by concept.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from radon.complexity import cc_visit

from fxexpand import CONTENTS
from tests.test_layering import name_of, source_files

ROOT = Path(__file__).resolve().parent.parent

FILE_LINES = 400
BODY_LINES = 45  # without the docstring
PARAMETERS = 8  # outside the public API
COMPLEXITY = 20  # the upper end of radon's C
HIGH_COMPLEXITY, MOST_HIGH = 15, 5  # at most five functions of the product are above 15


@dataclass(frozen=True)
class Function:
    """A function of the product: ``file:qualified.name``, and its sizes."""

    name: str
    public: bool
    complexity: int
    body: int
    parameters: int


def measured(path: Path) -> Iterator[Function]:
    """All functions and methods of a file, nested ones too."""
    source, module = path.read_text(encoding="utf-8"), name_of(path)
    complexity = dict(_complexities(cc_visit(source)))
    public = {
        name for home, names in CONTENTS.items() if f"{module}.".startswith(f"{home}.") for name in names
    }
    for qualified, node in _functions(ast.parse(source), ""):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        yield Function(
            f"{path.relative_to(ROOT)}:{qualified}",
            qualified in public,
            complexity.get(node.lineno, complexity.get(first, 0)),
            (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0,
            _parameters(node.args),
        )


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{child.name}."
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child
        yield from _functions(child, inner)


def _complexities(blocks: list[Any]) -> Iterator[tuple[int, int]]:
    """(line, complexity) of functions; a class of radon has methods, a function has closures."""
    for block in blocks:
        if hasattr(block, "methods"):
            yield from _complexities([*block.methods, *block.inner_classes])
        else:
            yield block.lineno, block.complexity
            yield from _complexities(block.closures)


def _parameters(arguments: ast.arguments) -> int:
    """The number of parameters without self and cls; ``*args`` and ``**kwargs`` count one each."""
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    bound = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - bound + (arguments.vararg is not None) + (arguments.kwarg is not None)


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    return [function for path in source_files() for function in measured(path)]


def test_no_function_is_too_complex(functions: list[Function]) -> None:
    assert not {f.name: f.complexity for f in functions if f.complexity > COMPLEXITY}


def test_few_functions_are_of_high_complexity(functions: list[Function]) -> None:
    assert len([f.name for f in functions if f.complexity > HIGH_COMPLEXITY]) <= MOST_HIGH


def test_bodies_are_short(functions: list[Function]) -> None:
    assert not {f.name: f.body for f in functions if f.body > BODY_LINES}


def test_parameters_are_few(functions: list[Function]) -> None:
    """The public API may have more: its options are documented one by one."""
    assert not {f.name: f.parameters for f in functions if f.parameters > PARAMETERS and not f.public}


def test_files_are_short() -> None:
    files = [*source_files(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {str(path): length for path, length in lengths.items() if length > FILE_LINES}


def test_the_measures_are_those_of_their_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docstrings are no lines, closures and methods are functions, decorators and branches count."""
    monkeypatch.setattr("tests.test_limits.ROOT", tmp_path)
    monkeypatch.setattr("tests.test_limits.name_of", lambda path: "surgery.expand")
    path = tmp_path / "expand.py"
    path.write_text(
        "class A:\n    @property\n    def b(self, x, *y, z=1, **w):\n"
        "        '''One.\n\n        Two.\n        '''\n"
        "        if x and y:\n            return 1\n        return [i for i in y if i]\n"
        "def expand(model):\n    def inner(cls):\n        pass\n    return inner\n",
        encoding="utf-8",
    )
    assert list(measured(path)) == [
        Function("expand.py:A.b", False, 5, 3, 4),
        Function("expand.py:expand", True, 1, 3, 1),
        Function("expand.py:expand.inner", False, 1, 1, 0),
    ]
