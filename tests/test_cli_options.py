"""Options are written once: dataclass, function, command and configuration file agree."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import fxexpand
from fxexpand.cli import COMMANDS, app
from fxexpand.cli.dataclass_options import flattened, options_of
from fxexpand.deploy.options import LatencyOptions, OnnxOptions
from fxexpand.lowrank.options import FactorizeOptions
from fxexpand.reporting.options import METADATA, option
from fxexpand.training.demo import run as demo
from fxexpand.training.options import DemoOptions, Schedule, Settings

DIGITS = "fxexpand.demo:Digits"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (fxexpand.measure_latency, LatencyOptions),
        (fxexpand.export_onnx, OnnxOptions),
        (fxexpand.factorize, FactorizeOptions),
        (demo, DemoOptions),
    ],
)
def test_a_function_and_its_options_have_the_same_names_types_and_defaults(
    function: Callable[..., Any], options: type
) -> None:
    parameters = {
        name: (each.annotation, each.default)
        for name, each in inspect.signature(function).parameters.items()
        if each.kind is each.KEYWORD_ONLY
    }
    found = {each.name: (each.type, each.default) for each in dataclasses.fields(options)}
    assert found == {name: each for name, each in parameters.items() if name in found}
    assert list(found) == [name for name in parameters if name in found]
    if options in (LatencyOptions, OnnxOptions):  # given by position
        assert list(found) == list(parameters)


@pytest.mark.parametrize(
    "options", [DemoOptions, FactorizeOptions, LatencyOptions, OnnxOptions, Schedule, Settings]
)
def test_an_option_is_read_as_the_type_of_its_field(options: type) -> None:
    """The types that the command line reads are among those of the annotation, which it cannot load."""
    for each in options_of(options):
        kind, text = each.metadata[METADATA]["kind"], str(each.type)
        if typing.get_origin(kind) is list:
            inner = typing.get_args(kind)[0].__name__
            assert text in (f"tuple[{inner}, ...]", f"Sequence[{inner}] | None"), each.name
        elif kind.__name__ not in text.split(" | "):
            assert kind in (str, int) and text[0].isupper(), each.name  # an alias: Init, Method, Ranks
        assert each.metadata[METADATA]["help"].endswith(".")


@dataclasses.dataclass(frozen=True)
class Some:
    whole: int = option(3, "A number.", min=1)
    names: tuple[str, ...] = option((), "Names.", list[str], flag="--name")
    safe: bool = option(True, "Not safe.", flag="--unsafe")
    hidden: float = 0.5


def test_a_dataclass_becomes_options_and_is_given_to_the_command() -> None:
    seen: list[Any] = []

    def command(some: Some, last: int = 7) -> None:
        seen.append((some, last))

    flat = flattened(command)
    assert list(inspect.signature(flat).parameters) == ["whole", "name", "unsafe", "last", "config"]
    flat(whole=4, name=["a", "b"], unsafe=True, last=1, config=None)
    flat(whole=4, name=None, unsafe=False, last=1, config=None)
    assert seen == [(Some(4, ("a", "b"), False), 1), (Some(4), 1)]


def test_a_file_has_the_options_and_the_command_line_comes_first(tmp_path: Path) -> None:
    (tmp_path / "bench.toml").write_text(
        f'model = "{DIGITS}"\ninput = "1,1,8,8"\nbackend = ["eager"]\nrounds = 9\nchannels_last = true\n'
        "batch = [1, 2]\njson = true\n"
    )
    result = run("bench", "--config", tmp_path / "bench.toml", "--rounds", "8", "--batch", "3")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["rounds"], values["channels_last"]) == (8, True)
    assert {row["batch"] for row in values["measurements"]} == {3}
    (tmp_path / "train.toml").write_text(
        f'epochs = 1\nbatch-size = 300\nrecipe = "Chain(depth=2, width=1)"\nout = "{tmp_path}/run"\n'
        'select = "conv*"\n'
    )
    result = run("train", "--config", tmp_path / "train.toml", "--json")
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    assert settings["epochs"] == 1 and settings["batch_size"] == 300 and settings["select"] == ["conv*"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohcs = 1", "no option 'epohcs'. Did you mean epochs?"),
        ("epochs = ", "Invalid value"),
        ("epochs = 'many'", "Invalid value for '--epochs'"),
        ("lr = -1", "lr=-1.0: choose a positive number."),
    ],
)
def test_a_wrong_file_is_wrong_usage(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    result = run("train", "--config", file, "--out", tmp_path / "run")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert run("train", "--config", tmp_path / "none.toml").exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reads_a_file(name: str) -> None:
    assert "--config FILE" in run(name, "--help").stdout
