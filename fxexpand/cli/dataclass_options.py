"""The options of a command come from the dataclasses that it takes; ``--config`` reads them from a file.

A field that ``option`` made is written once: its default and help are those of the Python function, of the
command, of its configuration file and of docs/cli.md.
"""

from __future__ import annotations

import functools
import inspect
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from fxexpand.errors import closest
from fxexpand.reporting.options import METADATA


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for each field of the dataclasses among its parameters, and ``--config``.

    typer reads the signature; a call gives the dataclasses to ``command``.
    """
    signature = inspect.signature(command, eval_str=True)
    parts: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if is_dataclass(parameter.annotation)
    }
    found: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in parts:
            found += [_parameter(each) for each in options_of(parts[name])]
        else:
            found.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    found.append(_keyword("config", _CONFIG, None))

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        del given["config"]  # its values are defaults by now
        for name, kind in parts.items():
            values = {each.name: _value(each, given.pop(_name(each))) for each in options_of(kind)}
            given[name] = kind(**values)
        command(**given)

    flat.__dict__["__signature__"] = signature.replace(parameters=found)
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in found}
    return flat


def options_of(kind: type) -> list[Field[Any]]:
    """The fields of a dataclass that are options."""
    return [each for each in fields(kind) if METADATA in each.metadata]


def _parameter(each: Field[Any]) -> inspect.Parameter:
    """The parameter from which typer makes the option of a field."""
    entry = each.metadata[METADATA]
    kind, flag, shown = entry["kind"], entry["flag"], dict(entry["shown"])
    default = None if get_origin(kind) is list else each.default
    if kind is bool and (flag or not default):  # else typer offers --name and --no-name
        flag, default = flag or f"--{each.name.replace('_', '-')}", False
    names = (flag,) if flag else ()
    make = typer.Argument if shown.pop("argument", False) else typer.Option
    kind = kind | None if default is None else kind
    annotation: Any = Annotated[kind, make(*names, help=entry["help"], **shown)]
    return _keyword(_name(each), annotation, inspect.Parameter.empty if default is MISSING else default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _name(each: Field[Any]) -> str:
    """The parameter of a field, which is named after its flag."""
    flag: str = each.metadata[METADATA]["flag"] or each.name
    return flag.removeprefix("--").replace("-", "_")


def _value(each: Field[Any], given: Any) -> Any:
    """The value of a field: bools of a flag are relative to the default, lists are tuples."""
    entry = each.metadata[METADATA]
    if entry["kind"] is bool and entry["flag"]:
        return each.default != given
    if get_origin(entry["kind"]) is list:
        return tuple(given) if given else each.default
    return given


def _read(context: typer.Context, file: Path | None) -> None:
    """Take the values of a TOML file for the defaults of the command.

    Raises: typer.BadParameter: the file cannot be read, or names no option of the command.
    """
    if file is None:
        return
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: {error}") from error
    named = {
        name.lstrip("-"): parameter
        for parameter in context.command.params
        for name in (parameter.opts if parameter.param_type_name == "option" else [parameter.name or ""])
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in named:
            raise typer.BadParameter(f"{file}: no option {key!r}.{closest(name, list(named))}")
        parameter = named[name]
        several = parameter.multiple and not isinstance(value, list)
        defaults[parameter.name or ""] = [value] if several else value
    context.default_map = defaults


_CONFIG = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Options from a TOML file, as NAME = VALUE; those of the command line come first.",
        callback=_read,
        is_eager=True,
    ),
]
