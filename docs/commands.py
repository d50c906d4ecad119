"""The page of the command line, docs/cli.md, from the program itself: ``python docs/commands.py``"""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from fxexpand.cli import COMMANDS, app

PAGE = Path(__file__).resolve().parent / "cli.md"
HEAD = """\
# Command line

A model is `timm:NAME`, `torchvision:NAME`, `transformers:TYPE` or `package.module:factory`, where
the factory takes no arguments; the current folder is searched first. Nothing is downloaded: weights
are random, or come from `--weights FILE`, safetensors or a state dict of `torch.save`, which is
read with `weights_only=True`. A file that holds anything but tensors is refused, and no code in it
runs. A model of timm or torchvision gets a head of as many classes as the file has.

The inputs are known for models of the libraries; `--input 1,3,224,224` gives them for others,
once per argument, with a dtype where it is not float32: `--input 1,16:int64`.

Every option may stand in a TOML file, under its name; the command line comes first:
`fxexpand train --config run.toml --seed 1` with lines such as `epochs = 90` and
`select = ["conv*"]`.

Results go to stdout, everything else to stderr; `--json` prints JSON and nothing else on stdout.
Tables have no colours, and fit 80 columns. Files are written whole or not at all.

| Exit code | |
|---|---|
| 0 | done |
| 1 | refused, failed, or a check does not hold |
| 2 | wrong usage: a name, a file, a shape or an option |

Errors are one line, below the usage where an option is unknown or missing; `fxexpand --debug
COMMAND ...` shows the traceback. `fxexpand --install-completion` sets up the completion of your
shell.

This page is made from the program by `python docs/commands.py`.

"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD, _block([])]
    parts += [f"## {name}\n\n{_block([name])}" for name in COMMANDS]
    return "\n".join(parts)


def _block(words: list[str]) -> str:
    # typer writes options as wide as the terminal, and the terminal of a test runner has 80 columns
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*words, "--help"], prog_name="fxexpand")
    assert result.exit_code == 0, result.output
    return f"```text\n{result.stdout.rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
