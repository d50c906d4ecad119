"""Models by name, weights from files that hold nothing but tensors, and inputs from the command line."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxexpand.errors import FxExpandError, SelectionError, UnusableWeightError
from fxexpand.training.demo import Digits
from fxexpand.zoo import default_inputs, example_input, load_model, load_weights, require_accepts


@pytest.mark.parametrize(
    "name", ["timm:resnet10t", "torchvision:squeezenet1_1", "transformers:vit_msn", "fxexpand.demo:Digits"]
)
def test_a_model_is_found_by_its_name(name: str) -> None:
    assert any(p.is_meta for p in load_model(name, meta=True).parameters())
    assert not any(p.is_meta for p in load_model(name).parameters())


def test_torchvision_builds_without_downloads_or_warnings() -> None:
    """Detection models download their backbone by default; two old classifiers warn about their weights."""
    for name in ("fasterrcnn_mobilenet_v3_large_fpn", "googlenet"):
        assert isinstance(load_model(f"torchvision:{name}", meta=True), nn.Module)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet19", "timm has no model 'resnet19'. Did you mean resnet18"),
        ("torchvision:resnet_50", "torchvision has no model 'resnet_50'. Did you mean resnet50"),
        ("resnet18", "write timm:NAME.* Did you mean timm:resnet18"),
        ("transformers:brt", "transformers has no model type 'brt'. Did you mean .*bert"),
        ("timm:", "'timm:' names no model"),
        ("fxexpand.demo:Digitz", "fxexpand.demo has no 'Digitz'. Did you mean Digits"),
        ("fxexpand.nowhere:f", "no module 'fxexpand.nowhere'"),
        ("tim:resnet18", "no module 'tim' .* Did you mean timm"),
        ("fxexpand.demo:NETWORK", "is of type str; name a factory"),
        ("./factories:plain", "is no name of a module. Write it as in an import, factories:plain"),
        ("factories.py:plain", "Write it as in an import, factories:plain"),
        ("fxexpand.zoo:load_model", "needs arguments .*'name'"),
        ("fxexpand.recipes:Chain", "gave an object of type Chain, not an nn.Module"),
    ],
)
def test_a_wrong_name_is_answered_with_the_closest(name: str, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        load_model(name)


def test_models_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_this_test.py").write_text(
        "import torch\nnet = torch.nn.Linear(2, 3)\n"
        "def values():\n    return torch.nn.Linear(2, int(torch.ones(()).item()))\n"
    )
    (tmp_path / "broken_for_this_test.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(load_model("mine_for_this_test:net"), nn.Linear)
    read = load_model("mine_for_this_test:values", meta=True)  # its constructor cannot run on meta
    assert not next(read.parameters()).is_meta
    with pytest.raises(FxExpandError, match="needs 'nothing_of_this_name', which is not installed"):
        load_model("broken_for_this_test:f")


def test_a_factory_without_values_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import torch\ndef empty():\n    return torch.nn.Linear(2, 3, device='meta')\n"
    (tmp_path / "empty_for_this_test.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SelectionError, match="a model on the meta device, without values"):
        load_model("empty_for_this_test:empty")


def test_weights_of_a_model_that_asks_for_their_version(tmp_path: Path) -> None:
    source, model = load_model("torchvision:mnasnet0_5"), load_model("torchvision:mnasnet0_5")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    torch.testing.assert_close(model.state_dict()["layers.0.weight"], source.state_dict()["layers.0.weight"])


def test_default_inputs_of_a_language_model_ask_for_no_cache() -> None:
    model = load_model("transformers:gpt2")
    inputs: Any = default_inputs("transformers:gpt2", model)
    assert inputs["input_ids"].shape == (1, 16) and inputs["use_cache"] is False


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_are_loaded_strictly(tmp_path: Path, suffix: str) -> None:
    model, source, path = Digits(), Digits(), tmp_path / f"weights.{suffix}"

    def write(state: dict[str, torch.Tensor]) -> None:
        if suffix == "pt":
            torch.save(state, path)
        else:
            save_file(state, path)

    state = dict(source.state_dict())
    write(state)
    load_weights(model, path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    write({name: value for name, value in state.items() if name != "fc2.bias"})
    with pytest.raises(SelectionError, match=r"weights\.\w+: lacks 'fc2.bias'\."):
        load_weights(model, path)
    write({**state, "extra": torch.ones(1)})
    with pytest.raises(SelectionError, match="holds 'extra', which the model lacks"):
        load_weights(model, path)
    write({**state, "fc2.bias": torch.ones(11)})
    with pytest.raises(SelectionError, match=r"size mismatch for fc2.bias"):
        load_weights(model, path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    for name, write in (("a.pt", torch.save), ("b.pt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        write({"fc1.weight": Trap()}, tmp_path / name)
        with pytest.raises(SelectionError, match="holds more than tensors"):
            load_weights(Digits(), tmp_path / name)
    assert not trap.exists()
    torch.save([torch.ones(1)], tmp_path / "c.pt")
    with pytest.raises(SelectionError, match="not a state dict"):
        load_weights(Digits(), tmp_path / "c.pt")
    (tmp_path / "d.safetensors").write_bytes(b"not tensors")
    with pytest.raises(SelectionError, match="not a safetensors file"):
        load_weights(Digits(), tmp_path / "d.safetensors")
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(SelectionError, match=r": (No such file or directory|Is a directory)\."):
            load_weights(Digits(), missing)


def test_inputs_are_written_as_shapes() -> None:
    image = example_input("2,3,5x7")
    assert image.shape == (2, 3, 5, 7) and image.dtype == torch.float32
    assert 0.5 < float(image.std()) < 1.5
    tokens = example_input(" 4,64:int64 ")
    assert tokens.dtype == torch.int64 and set(tokens.flatten().tolist()) == {0, 1}
    assert example_input("3:bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1;2", "write the shape as"),
        ("", "write the shape"),
        ("2,0", "1 or more"),
        ("2:flota32", "Did you mean float32"),
    ],
)
def test_a_wrong_input_is_an_error(text: str, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        example_input(text)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:resnet10t", (1, 3, 176, 176)),
        ("torchvision:inception_v3", (1, 3, 299, 299)),
        ("torchvision:r3d_18", (1, 3, 16, 112, 112)),
        ("torchvision:lraspp_mobilenet_v3_large", (1, 3, 520, 520)),
        ("torchvision:ssdlite320_mobilenet_v3_large", None),
        ("fxexpand.demo:Digits", None),
    ],
)
def test_libraries_say_what_their_models_take(name: str, shape: tuple[int, ...] | None) -> None:
    found = default_inputs(name, load_model(name, meta=True))
    assert (found.shape if isinstance(found, torch.Tensor) else found) == shape


def test_transformers_take_tokens_or_images() -> None:
    bert = load_model("transformers:bert", meta=True)
    tokens = default_inputs("transformers:bert", bert)
    assert isinstance(tokens, dict) and tokens["input_ids"].dtype == torch.int64
    vit = load_model("transformers:vit", meta=True)
    images = default_inputs("transformers:vit", vit)
    assert isinstance(images, dict) and images["pixel_values"].shape == (1, 3, 224, 224)
    require_accepts(vit, {"pixel_values": images["pixel_values"].to("meta")})


def test_inputs_a_model_does_not_take_are_one_line() -> None:
    model = Digits()
    require_accepts(model, (torch.randn(2, 1, 8, 8),))
    assert model.training
    with pytest.raises(
        SelectionError, match=r"Digits does not take an input of 2x3x8x8: .*channels"
    ) as caught:
        require_accepts(model, (torch.randn(2, 3, 8, 8),))
    assert "\n" not in str(caught.value)
    with pytest.raises(SelectionError, match="2 positional arguments but 3 were given"):
        require_accepts(model, (torch.randn(2, 1, 8, 8), torch.ones(1)))

    class Two(nn.Module):
        def forward(self, ids: torch.Tensor, pixels: torch.Tensor | None = None) -> int:
            return ids.shape[0] + pixels.shape[0]  # type: ignore[union-attr]

    with pytest.raises(SelectionError, match="Two does not take an input of 1x4: 'NoneType' object has no"):
        require_accepts(Two(), (torch.ones(1, 4),))


def test_a_tensor_of_several_names_needs_one_of_them(tmp_path: Path) -> None:
    """safetensors keep no tensor twice: what transformers save has each tied weight under one name."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.head.weight = self.table.weight

    first, second = Tied(), Tied()
    path = tmp_path / "tied.safetensors"
    for name in ("table.weight", "head.weight"):
        save_file({name: first.table.weight.detach(), "head.bias": first.head.bias.detach()}, path)
        load_weights(second, path)
        assert torch.equal(second.table.weight, first.table.weight)
        assert second.head.weight is second.table.weight
    save_file({"head.bias": first.head.bias.detach()}, path)
    with pytest.raises(SelectionError, match=r"lacks 'table.weight' \(1 more"):
        load_weights(second, path)


def test_a_mask_with_infinities_is_no_broken_checkpoint(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))

    path, source = tmp_path / "masked.pt", Masked()
    torch.save(source.state_dict(), path)
    load_weights(model := Masked(), path)
    assert torch.equal(model.weight, source.weight)
    for key, broken in (("mask", -math.inf), ("mask", math.nan), ("weight", math.inf)):
        state = {**source.state_dict(), key: torch.full((4, 4), broken)}
        torch.save(state, path)
        with pytest.raises(UnusableWeightError, match=f"'{key}' holds NaN or Inf"):
            load_weights(Masked(), path)


def test_a_network_in_a_module_is_its_own_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command loads a model twice: ``inspect`` expands one, ``rank --before`` gives one other weights."""
    (tmp_path / "mine_for_the_next_test.py").write_text(
        "import torch\nfrom torch import nn\nnet = nn.Sequential(nn.Linear(4, 4))\n"
        "class Numbers(nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(4, 4)\n"
        "        self.rates = torch.linspace(0, 1, 4).numpy()\n"
        "def same():\n    return net\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("net", "same"):
        one, two = (load_model(f"mine_for_the_next_test:{name}") for _ in range(2))
        assert one is not two and one[0].weight is not two[0].weight  # type: ignore[index]
    # A constructor that reads values as numpy's fails on the meta device with an error of another type.
    assert not load_model("mine_for_the_next_test:Numbers", meta=True).weight.is_meta
