"""Expanded networks with torch's own tools: autocast, compilation, checkpointing, copies, moving averages."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxexpand import expand, fuse
from tests.compare import assert_same
from tests.networks import ConvNet, fresh, train_steps
from tests.test_expand import IMAGES, convnet, language, standardised


@pytest.mark.parametrize("form", ["auto", "chain", "collapsed"])
def test_a_batch_of_none(form: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Flatten(), nn.Linear(5 * 12, 2)).double()
    big = expand(model, form=form)
    y = big(IMAGES[:0])
    assert y.shape == (0, 2) == model(IMAGES[:0]).shape
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in big.parameters())


def test_half_precision_models_keep_their_dtype() -> None:
    model, x = convnet()
    for dtype, rel in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        half = fresh(model).to(dtype).eval()
        big = expand(half)
        assert {p.dtype for p in big.parameters()} == {dtype}
        small = fuse(big, scope="expanded")
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert_same(big(x.to(dtype)), half(x.to(dtype)), rel=rel)
        assert_same(small(x.to(dtype)), half(x.to(dtype)), rel=rel)


def test_autocast_multiplies_factors_in_their_own_precision() -> None:
    model, x = convnet()
    model = model.float().eval()
    big = expand(model, form="collapsed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert big.stem.weight.dtype == torch.float32
        output, expected = big(x.float()), model(x.float())
    assert output.dtype == torch.bfloat16
    assert_same(output, expected, rel=2e-2)


def test_channels_last_is_kept() -> None:
    model, x = convnet()
    model = model.to(memory_format=torch.channels_last).eval()
    big = expand(model, form="collapsed")
    last = torch.channels_last
    assert big.stem.weight.is_contiguous(memory_format=last)
    small = fuse(big, scope="expanded")
    assert small.stem.weight.is_contiguous(memory_format=last)
    assert_same(big(x.contiguous(memory_format=last)), model(x), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["auto", "chain", "collapsed"])
def test_compiles_as_one_graph(form: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 70, 5))
    big = expand(model, form=form)
    x = IMAGES.float()
    compiled: Any = torch.compile(big, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), big(x), rel=1e-5)
    towards = list(big.parameters())
    by_compiled = torch.autograd.grad(compiled(x).sum(), towards)
    for a, b in zip(by_compiled, torch.autograd.grad(big(x).sum(), towards), strict=True):
        assert_same(a, b, rel=1e-4)


def test_weight_space_compiles_as_one_graph() -> None:
    model, x = standardised()
    big = expand(model)
    compiled: Any = torch.compile(big, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), big(x), rel=1e-10)


def test_checkpointing_gives_the_same_gradients() -> None:
    model, x = convnet()
    big = expand(model)
    plain = torch.autograd.grad(big(x).sum(), list(big.parameters()))
    saved = torch.autograd.grad(checkpoint(big, x, use_reentrant=False).sum(), list(big.parameters()))
    for a, b in zip(saved, plain, strict=True):
        assert_same(a, b, rel=1e-9)


def test_models_travel(tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    model, x = convnet()
    big = expand(model)
    travelled: Any = pickle.loads(pickle.dumps(big))
    assert_same(travelled(x), big(x), rel=0.0)
    assert_same(copy.deepcopy(big)(x), big(x), rel=0.0)
    buffer = io.BytesIO()
    torch.save(big.state_dict(), buffer)
    buffer.seek(0)
    twin = expand(model, generator=torch.Generator().manual_seed(9))
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(twin(x), big(x), rel=0.0)
    save_model(big, str(tmp_path / "big.safetensors"))
    twin = expand(model, generator=torch.Generator().manual_seed(9))
    load_model(twin, str(tmp_path / "big.safetensors"))
    assert_same(twin(x), big(x), rel=0.0)


def test_weight_space_travels_too() -> None:
    model, x = language()
    big: Any = expand(model)
    for _ in range(2):
        for travelled in (copy.deepcopy(big), pickle.loads(pickle.dumps(big))):
            assert_same(travelled(x), big(x), rel=0.0)
            assert list(travelled.state_dict()) == list(big.state_dict())
            assert travelled.head.parametrizations.weight is travelled.tokens.parametrizations.weight
            small = fuse(travelled, scope="expanded")
            assert type(small.head) is nn.Linear and type(small.recurrent) is nn.LSTM
            travelled.load_state_dict(model.state_dict())  # under the original names
            assert_same(travelled(x), model(x), rel=1e-10)
        train_steps(big, x)


def test_a_moving_average_follows() -> None:
    timm_utils = pytest.importorskip("timm.utils")
    model, x = convnet()
    big = expand(model)
    average = timm_utils.ModelEmaV3(big, decay=0.5)
    train_steps(big, x)
    average.update(big)
    small = fuse(average.module.eval(), scope="expanded")
    assert type(small) is ConvNet
    assert_same(small(x), average.module(x), rel=1e-10)


def test_the_meta_device_costs_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Embedding(50_000, 2048), nn.Linear(2048, 50_000), nn.MultiheadAttention(2048, 8)
        )
    big = expand(model)
    assert all(p.is_meta for p in big.parameters())
    small = fuse(big, scope="expanded")
    assert list(small.state_dict()) == list(model.state_dict())
    assert all(p.is_meta for p in small.parameters())
