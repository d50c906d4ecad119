"""Models of the transformers library, small and random: expanded, trained, folded, fused, saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxexpand
from fxexpand import Chain
from fxexpand.running.outputs import tensors_of
from fxexpand.tracing.submodules import observed_calls
from tests.compare import assert_same

pytest.importorskip("transformers")
from benchmarks.zoo import transformers_models as library

EXACT = 1e-10
pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:.*:FutureWarning")

# One of each kind; the others take a minute and run with the slow tests.
QUICK = {
    "albert": "shared layers",
    "gpt2": "Conv1D modules and a tied head",
    "mixtral": "experts as parameters of three dimensions",
    "mamba": "a state space model",
    "rwkv": "a recurrence",
    "t5": "four names for one embedding",
    "deit": "two heads",
    "sam": "submodules that are called in several ways",
    "wav2vec2": "a parametrized convolution, layer drop",
}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in library.names()]
# How many sites are refused: weight normalisation computes one of them.
REFUSED = {"wav2vec2": 1}


def in_float64(name: str) -> tuple[Any, dict[str, Any]]:
    model, inputs = library.build(name)
    wide = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return model.double(), wide


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_of(model(**inputs))


def same(actual: nn.Module, expected: nn.Module, inputs: dict[str, Any], rel: float = EXACT) -> None:
    for a, b in zip(outputs(actual, inputs), outputs(expected, inputs), strict=True):
        finite = b.isfinite()
        assert_same(a[finite], b[finite], rel)


def train(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Three steps, with dropout and whatever else goes by the mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        found = [t[t.isfinite()] for t in tensors_of(model(**inputs)) if t.requires_grad]
        loss: Any = torch.stack([tensor.square().mean() for tensor in found]).sum()
        loss.backward()
        optimizer.step()
    model.eval()


def types(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(part)) for name, part in model.named_modules()]


@pytest.mark.parametrize("name", NAMES)
def test_the_journey(name: str, tmp_path: Path) -> None:
    model, inputs = in_float64(name)
    big = fxexpand.expand(model, Chain(depth=3, width=1), example_inputs=inputs)
    report = fxexpand.report(big)
    assert len(report.refusals) == REFUSED.get(name, 0), str(report)
    weighty = [n for n, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    named = " ".join(row.site + " " + row.reason for row in report.changed)
    assert report.changed and all(part in named for part in weighty), str(report)
    same(big, model, inputs)

    trained = copy.deepcopy(big)
    train(trained, inputs)
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), big.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2

    small = fxexpand.fuse(trained, scope="expanded")
    assert types(small) == types(model) and list(small.state_dict()) == list(model.state_dict())
    same(small, trained, inputs)
    fresh = library.build(name)[0].double()
    fresh.load_state_dict(small.state_dict())
    same(fresh, trained, inputs)

    fused = fxexpand.fuse(model, inputs)
    assert type(fused) is type(model)
    same(fused, model, inputs)
    if library.generates(model):
        tokens = library.generate(model, inputs)
        for network in (big, fused, fxexpand.fuse(big, scope="expanded")):
            assert torch.equal(library.generate(network, inputs), tokens)

    small.save_pretrained(tmp_path)
    back: Any = type(model).from_pretrained(tmp_path).double().eval()
    back.config._experts_implementation = "eager"
    # Buffers that are not saved come back in float32.
    same(back, small, inputs, 1e-6)


def test_a_checkpoint_of_the_expanded_model_under_the_original_names(tmp_path: Path) -> None:
    model, inputs = in_float64("gpt2")
    big = fxexpand.expand(model, Chain(depth=2, width=1))
    train(big, inputs)
    big.save_pretrained(tmp_path, state_dict=fxexpand.fused_state_dict(big))
    same(type(model).from_pretrained(tmp_path).double().eval(), big, inputs)


def test_where_fusing_changes_the_keys_the_same_fusion_loads_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, inputs = in_float64("convnext")
    fused = fxexpand.fuse(model, inputs)
    assert set(fused.state_dict()) != set(model.state_dict())
    fused.save_pretrained(tmp_path)
    other, _ = library.build("convnext")
    for parameter in other.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    back = fxexpand.fuse(other.double(), inputs)
    back.load_state_dict(load_file(tmp_path / "model.safetensors"))
    same(back, fused, inputs)


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
def test_experts_are_found_however_they_are_computed(way: str) -> None:
    built, inputs = library.build("mixtral")
    model: Any = built
    model.config._experts_implementation = way  # the first is the default, in float32 only
    big = fxexpand.expand(model, Chain(depth=2, width=1), example_inputs=inputs)
    sites = {row.site for row in fxexpand.report(big).changed}
    assert "model.layers.0.mlp.experts.gate_up_proj" in sites
    same(big, model, inputs, 1e-5)
    before = {name: parameter.detach().clone() for name, parameter in big.named_parameters()}
    train(big, inputs)
    for name, parameter in big.named_parameters():
        assert not torch.equal(parameter, before[name]) or "experts" not in name


def test_a_cache_is_no_example_of_an_argument() -> None:
    model, inputs = in_float64("gpt2")
    calls = observed_calls(model, inputs)
    names = {name for name, part in model.named_modules() if part in calls}
    assert "transformer.h.0.mlp" in names and "transformer.h.0.attn" not in names
    outputs(model, inputs)  # and the run has changed nothing


def test_a_seven_billion_parameter_model_on_the_meta_device() -> None:
    import resource
    import time

    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())  # the 7B of the first paper
    assert sum(parameter.numel() for parameter in model.parameters()) > 6.7e9
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    big = fxexpand.expand(model)
    seconds = time.perf_counter() - start
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(fxexpand.report(big).changed) == 32 * 7 + 2
    assert kibibytes < 2**20 and seconds < 60, (kibibytes, seconds)
    small = fxexpand.fuse(big, scope="expanded")
    assert list(small.state_dict()) == list(model.state_dict())
