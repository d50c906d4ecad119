"""Code of a forward that a weight which is computed from factors would change: it is read, not run."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

LISTINGS = ("parameters", "named_parameters", "state_dict", "_parameters")


def misuses(model: nn.Module) -> dict[str, str]:
    """Names of parameters, or of modules with all in them, that must stay parameters, each with the reason.

    A forward that lists parameters would find the factors, and one that writes into a weight would have it
    factored anew at each call. ``next(self.parameters())``, which asks for a device or dtype, is neither.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        cls: Any = type(module)
        if cls.__module__.startswith("torch."):
            continue
        for target, writes, code in _of_class(cls):
            name = _resolved(module, target, writes)
            if name is None:
                continue
            doing = "writes into it" if writes else "lists parameters"
            effect = "would factor it anew at each call" if writes else "would find the factors"
            reason = f"the forward of {cls.__name__} {doing} ({code}), which {effect}"
            found.setdefault(".".join(filter(None, (path, name))), reason)
    return found


def _resolved(module: nn.Module, target: str | None, writes: bool) -> str | None:
    """The part of a module that a target names: all of it where that is not known; None: no parameter."""
    held: Any = module
    for name in target.split(".") if target else ():
        held = getattr(held, name, None)
    if writes and target is not None:
        return target if isinstance(held, nn.Parameter) else None
    return target or "" if isinstance(held, nn.Module) else ""


@cache
def _of_class(cls: type[nn.Module]) -> list[tuple[str | None, bool, str]]:
    """(target, whether it is written to, the code) of each misuse in the forward and its methods."""
    waiting, seen = ["forward"], set()
    found: list[tuple[str | None, bool, str]] = []
    while waiting:
        name = waiting.pop()
        method = getattr(cls, name, None)
        if name in seen or not inspect.isfunction(method) or method.__module__.startswith("torch."):
            continue
        seen.add(name)
        try:
            tree: Any = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
        except (OSError, TypeError, SyntaxError, IndexError):  # made by exec, or a lambda inside a call
            continue
        if isinstance(tree, ast.FunctionDef) and tree.args.args:
            own = tree.args.args[0].arg
            found += _in_tree(tree, own)
            paths = (_path(node.func, own) for node in ast.walk(tree) if isinstance(node, ast.Call))
            waiting += [path for path in paths if path and "." not in path]
    return found


def _in_tree(tree: ast.AST, own: str) -> Iterator[tuple[str | None, bool, str]]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ignored = {inner for call in calls if ast.unparse(call.func) == "next" for inner in ast.walk(call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in ignored:
            writes = node.attr == "data" and isinstance(node.ctx, ast.Store)
            if writes or node.attr in LISTINGS:
                yield _path(node.value, own), writes, ast.unparse(node)
    for call in calls:
        path = _written(call.func, own)
        if path is not None:
            yield path, True, ast.unparse(call.func)


def _written(function: ast.AST, own: str) -> str | None:
    """The path of the attribute that a method in place writes into, as ``self.weight.data.copy_``."""
    if not isinstance(function, ast.Attribute) or not re.fullmatch(r"[^_].*_", function.attr):
        return None
    written = function.value
    while isinstance(written, ast.Attribute) and written.attr == "data":
        written = written.value
    return _path(written, own) if isinstance(written, ast.Attribute) else None


def _path(node: ast.AST, own: str) -> str | None:
    """The dotted path of an attribute of ``self``, "" of itself; None of another expression."""
    if isinstance(node, ast.Name):
        return "" if node.id == own else None
    inner = _path(node.value, own) if isinstance(node, ast.Attribute) else None
    return None if inner is None else f"{inner}.{node.attr}".lstrip(".")  # type: ignore[attr-defined]
