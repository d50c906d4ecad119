"""The command line: one file per command, which is imported when the command is called or its help is asked.

The commands are ``demo``, ``inspect``, ``fuse``, ``export``, ``bench``, ``train``, ``factorize`` and
``rank``. They share ``options``, ``output`` (what is printed), ``files`` and ``failures`` (messages and
exit codes). ``dataclass_options`` makes the options of a command from the dataclasses that it takes. The
libraries that a command needs are imported inside it, so that ``--help`` and ``--version`` answer at once.
Exit codes: 0 ok, 1 refused or a check failed, 2 wrong usage.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fxexpand.cli.failures import reported

# The file of a command, its function and the command have one name. The order is that of the help.
COMMANDS = {
    "demo": "Train a network plain and expanded, fuse it, prove the result.",
    "inspect": "Show how a model is read, and the layers that fuse and expand would change.",
    "fuse": "Fold everything affine, and save the weights of the fused network.",
    "export": "Write a model as ONNX, and compare the file with the model.",
    "bench": "Measure latency: a model as it is, and fused.",
    "train": "Train a model, expanded, and save the fused weights.",
    "factorize": "Replace layers by cheaper pairs of low rank, and save their weights.",
    "rank": "Show the effective rank of every weight of a model.",
}
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Command(TyperCommand):
    """One command. Each failure is one line on stderr and an exit code; with --debug, a traceback."""

    def invoke(self, ctx: Any) -> Any:
        with reported(debug=bool(ctx.find_root().params.get("debug"))):
            return super().invoke(ctx)


class Commands(TyperGroup):
    """The commands of ``COMMANDS``, each loaded when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands and cmd_name in self.list_commands(ctx):
            from fxexpand.cli.dataclass_options import flattened

            module = importlib.import_module(f"{__name__}.{cmd_name}")
            alone = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=SETTINGS)
            alone.command(cmd_name, cls=Command)(flattened(getattr(module, cmd_name)))
            self.commands[cmd_name] = typer.main.get_command(alone)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        from fxexpand.cli.failures import fail
        from fxexpand.errors import closest

        if not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            fail(
                f"no command {args[0]!r}.{closest(args[0], self.list_commands(ctx))} See fxexpand --help.", 2
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    help="Expand a network's layers into linear chains for training, and fuse them back exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=SETTINGS,
)


def _version(shown: bool) -> None:
    if shown:
        from fxexpand import __version__

        typer.echo(f"fxexpand {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Expand a network's layers into linear chains for training, and fuse them back exactly.

    MODEL is timm:NAME, torchvision:NAME, transformers:NAME or package.module:factory.
    Exit codes: 0 ok; 1 refused, failed, or a check does not hold; 2 wrong usage.
    """
