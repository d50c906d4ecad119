"""The script and the commands of docs/training.md, under ``torchrun`` as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fxexpand.training.runs import WEIGHTS

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
[SCRIPT] = re.findall(r"^```python\n(# several.py\n.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```console\n(.*?)\n```$", TEXT, re.MULTILINE | re.DOTALL)


def torchrun(command: str, folder: Path, **environment: str) -> str:
    program, *arguments = shlex.split(command)
    assert program == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_script_finds_the_same_on_two_processes_as_on_one(tmp_path: Path) -> None:
    results = []
    for name, environment in (("ddp", {}), ("fsdp", {"FSDP": "1"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "several.py").write_text(SCRIPT, encoding="utf-8")
        first = torchrun(COMMANDS[0], tmp_path / name, **environment)
        alone = COMMANDS[0].replace("--nproc-per-node 2", "--nproc-per-node 1")
        outputs = (first, torchrun(alone, tmp_path / name))
        results.append([output.splitlines()[-1] for output in outputs])  # gloo of torch 2.9 prints before
    (ddp, alone), (fsdp, alone_again) = results
    assert ddp == fsdp and ddp.startswith("2 processes: ")
    assert alone == alone_again and alone.startswith("1 processes: ")
    assert float(alone.split()[-1]) < float(ddp.split()[-1])  # it went on from the checkpoint


@pytest.mark.slow
def test_the_command_trains_sharded(tmp_path: Path) -> None:
    output = torchrun(COMMANDS[1], tmp_path)
    assert "(2 processes, cpu)" in output
    assert (tmp_path / "runs" / "sharded" / WEIGHTS).exists()
