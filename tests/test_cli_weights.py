"""The command line writes weights that load, and reads weights of every class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxexpand
from fxexpand.cli.options import give_classes, recipe_of
from fxexpand.zoo import load_model
from tests.test_cli import DIGITS, ONE, narrow, run, settled


def expanded() -> nn.Module:
    """The same, expanded."""
    return fxexpand.expand(settled())


@pytest.mark.parametrize("recipe", ["Chain(depth=2)", "Chain(depth=2, batch_norm=True)"])
@pytest.mark.parametrize("scope", ["all", "expanded"])
def test_fuse_saves_what_loads_as_it_says(tmp_path: Path, scope: str, recipe: str) -> None:
    """A BatchNorm inside gives a layer a bias that the original has not, and so another state dict."""
    big = fxexpand.expand(settled(), recipe_of(recipe))
    torch.save(big.state_dict(), tmp_path / "big.pt")
    out = tmp_path / "small.safetensors"
    words = ("fuse", DIGITS, "--recipe", recipe, "--weights", tmp_path / "big.pt", "--scope", scope)
    result = run(*words, "--out", out, *ONE)
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    report, _, loading = result.stdout.partition("It loads by\n\n")
    assert report.startswith("fuse: 8 fused\n" if scope == "all" else "fuse: 5 fused\n")
    scopes: dict[str, object] = {}
    exec("\n".join(line.strip() for line in loading.splitlines()), scopes)
    model = scopes["model"]
    assert isinstance(model, nn.Module)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model.eval()(images), big.eval()(images), rtol=1e-4, atol=1e-5)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["model"]) == DIGITS
    if scope == "expanded" and "batch_norm" not in recipe:
        load_model(DIGITS).load_state_dict(load_file(out))


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_weights_of_other_classes_are_read_by_every_command(name: str, tmp_path: Path) -> None:
    """As `fxexpand train` writes them: the head has as many outputs as the data had classes."""
    model, file, images = load_model(name), tmp_path / "w.safetensors", torch.randn(2, 3, 64, 64)
    assert give_classes(name, model.eval(), 7)
    save_file(model.state_dict(), file)
    torch.save(fxexpand.expand(model, fxexpand.Chain(depth=2, width=1)).state_dict(), tmp_path / "big.pt")
    common = ("--weights", file, "--input", "1,3,64,64", "--json")
    read = {}
    for command, *options in (
        ("inspect",),
        ("fuse", "--out", tmp_path / "all.safetensors"),
        ("export", "--fuse", "--out", tmp_path / "m.onnx"),
        ("bench", "--backend", "eager", "--rounds", "8"),
        ("factorize", "--rank", "8", "--out", tmp_path / "pairs.safetensors"),
        ("rank", "--before", file),
    ):
        given = tuple("2,3,64,64" if command == "rank" and "," in str(word) else word for word in common)
        result = run(command, name, *given, *options)
        assert result.exit_code == 0, result.stderr
        read[command] = json.loads(result.stdout)
    assert [*read["export"]["outputs"].values()] == [["batch", 7]]
    assert any(row["shape"][0] == 7 and row["before"] for row in read["rank"]["weights"])
    big = ("--weights", tmp_path / "big.pt", "--recipe", "Chain(depth=2, width=1)", "--scope", "expanded")
    result = run("fuse", name, *big, "--out", tmp_path / "small.safetensors", "--json")
    assert result.exit_code == 0, result.stderr
    for loading in (read["fuse"]["load"], json.loads(result.stdout)["load"]):
        scopes: dict[str, Any] = {}
        exec(loading, scopes)
        torch.testing.assert_close(scopes["model"].eval()(images), model(images), rtol=1e-3, atol=1e-4)


def test_weights_with_the_biases_of_folded_norms_are_read(tmp_path: Path) -> None:
    """As `fxexpand train --recipe RepVGG` writes them: a layer that had no bias has one."""
    name, file = f"{__name__}:Nested", tmp_path / "w.safetensors"
    small = fxexpand.fuse(fxexpand.expand(Nested(), fxexpand.RepVGG()), scope="expanded").eval()
    nn.init.normal_(small.get_parameter("one.0.bias"))
    save_file(small.state_dict(), file)
    common = ("--weights", file, "--input", "2,3,8,8", "--json")
    assert run("rank", name, *common).exit_code == 0
    result = run("fuse", name, *common, "--out", tmp_path / "o.safetensors")
    assert result.exit_code == 0, result.stderr
    scopes: dict[str, Any] = {}
    exec(json.loads(result.stdout)["load"], scopes)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(scopes["model"](images), small(images), rtol=1e-4, atol=1e-5)
    options = ("--rank", "2", "--out", tmp_path / "pairs.safetensors")
    result = run("factorize", name, *common[:-1], *options)
    assert result.exit_code == 0, result.stderr
    with safe_open(tmp_path / "pairs.safetensors", "pt") as pairs:
        scopes = {"fxexpand": fxexpand, "torch": torch, "ranks": json.loads(pairs.metadata()["ranks"])}
    exec("\n".join(line[4:] for line in result.stdout.partition("loads into\n\n")[2].splitlines()), scopes)
    scopes["model"].load_state_dict(load_file(tmp_path / "pairs.safetensors"))


def doubled() -> nn.Module:
    return settled().double()


def test_the_program_that_loads_gives_the_inputs_their_dtype(tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    result = run("fuse", f"{__name__}:doubled", "--input", "1,1,8,8:float64", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    scopes: dict[str, Any] = {}
    exec(json.loads(result.stdout)["load"], scopes)
    images = torch.randn(2, 1, 8, 8).double()
    torch.testing.assert_close(scopes["model"](images), doubled().eval()(images), rtol=1e-9, atol=1e-10)


def test_export_writes_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    result = run("export", f"{__name__}:expanded", *ONE, "--out", path, "--fuse", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("fuse: 8 fused\n")  # five expansions, three norms
    values = json.loads(result.stdout)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Conv") == values["operators"]["Conv"] == 3
    assert "BatchNormalization" not in operators
    assert values["error"] <= values["tolerance"]


class Nested(nn.Module):
    """Where its branches are added, a graph takes the place of modules that hold modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.two = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.one(x) + self.two(x))


def test_a_fused_graph_is_in_the_mode_of_the_model(tmp_path: Path) -> None:
    fused = fxexpand.fuse(nn.Sequential(Nested()).eval())
    assert isinstance(fused[0], torch.fx.GraphModule)
    assert not any(module.training for module in fused.modules())
    result = run("export", f"{__name__}:Nested", "--input", "1,3,8,8", "--out", tmp_path / "m.onnx", "--fuse")
    assert result.exit_code == 0, result.stderr
    assert narrow(result.stderr)
