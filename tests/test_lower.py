"""From kernels to stock modules: the module computes the kernel, and reading it back gives the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel, apply, compose
from fxexpand.kernel.lower import to_module
from fxexpand.kernel.modules import LAYERS, kernel_of
from tests.compare import assert_same
from tests.kernels import MODES, kernel

SIZES = {0: (4,), 1: (13,), 2: (9, 12), 3: (7, 9, 8)}


def image(channels: int, rank: int) -> Tensor:
    return torch.randn((2, 4, channels) if rank == 0 else (2, channels, *SIZES[rank]), dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_round_trip_keeps_the_layer(kind: Any, bias: bool, groups: int) -> None:
    options: dict[str, Any] = {"bias": bias}
    rank, transposed = LAYERS[kind].rank, LAYERS[kind].transposed
    if rank:
        options |= {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "groups": groups}
    if transposed:
        options["output_padding"] = 1
    layer = kind(4, 8, **options).double()
    back = to_module(kernel_of(layer))
    assert type(back) is kind
    assert repr(back) == repr(layer)
    assert back.state_dict().keys() == layer.state_dict().keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
        assert back.state_dict()[name].stride() == tensor.stride()
        assert back.state_dict()[name].data_ptr() != tensor.data_ptr()
    x = image(4, rank)
    assert torch.equal(back(x), layer(x))


@pytest.mark.parametrize("mode", ["zeros", *MODES])
@pytest.mark.parametrize("padding", [1, 0, "same", "valid"])
def test_padding_and_its_mode_are_kept(mode: Any, padding: Any) -> None:
    layer = nn.Conv2d(4, 6, (3, 5), padding=padding, padding_mode=mode).double()
    back = to_module(kernel_of(layer))
    assert kernel_of(back).padding == kernel_of(layer).padding
    x = image(4, 2)
    assert torch.equal(back(x), layer(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_an_uneven_padding_is_same_padding_where_torch_splits_it_so(mode: str) -> None:
    k = kernel(6, 4, 4, 2, padding=((1, 2), (0, 1)), padding_mode=mode, bias=True)
    module, x = to_module(k), image(4, 2)
    assert module.padding == "same"
    assert_same(module(x), apply(k, x), 1e-13)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"padding": ((2, 1), (0, 1))}, "differs before and after"),
        ({"padding": ((1, 2), (0, 1)), "stride": (2, 2)}, "differs before and after"),
        ({"padding": ((-1, -1), (0, 0))}, "crops the input"),
        ({"padding": ((0, 1), (0, 0)), "transposed": True}, "it crops"),
        ({"padding": ((-1, -1), (0, 0)), "transposed": True}, "it crops"),
        ({"padding": ((1, 0), (0, 0)), "transposed": True}, "it crops"),
    ],
)
def test_what_no_layer_does_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InexactError, match=reason):
        to_module(kernel(6, 4, 4, 2, **change))


def test_no_layer_has_four_dimensions() -> None:
    with pytest.raises(InexactError, match="no layer of 4 spatial dimensions"):
        to_module(kernel(2, 2, 1, 1, 1, 1))


def test_a_grouped_linear_becomes_dense() -> None:
    k, x = kernel(6, 4, groups=2, bias=True), image(4, 0)
    assert_same(to_module(k)(x), apply(k, x), 1e-13)


def test_a_transposed_kernel_with_output_padding() -> None:
    k = kernel(6, 4, 3, stride=(3,), padding=((0, -2),), transposed=True, groups=2, bias=True)
    module, x = to_module(k), image(4, 1)
    assert module.output_padding == (2,)
    assert_same(module(x), apply(k, x), 1e-13)


def test_output_padding_may_reach_the_dilation() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, stride=1, dilation=3, output_padding=2).double()
    assert repr(to_module(kernel_of(layer))) == repr(layer)
    with pytest.raises(InexactError, match="it crops"):
        to_module(replace(kernel_of(layer), padding=((0, -3),)))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.ConvTranspose1d])
def test_memory_is_shared_only_on_request(kind: Any) -> None:
    layer = kind(4, 6) if kind is nn.Linear else kind(4, 6, 3)
    for copy in (True, False):
        module = to_module(kernel_of(layer), copy=copy)
        for name, tensor in module.named_parameters():
            assert (tensor.data_ptr() == layer.get_parameter(name).data_ptr()) is not copy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dtype_device_and_requires_grad_are_kept(dtype: torch.dtype, device: str) -> None:
    weight = torch.zeros(4, 3, 1, dtype=dtype, device=device, requires_grad=True)
    module = to_module(Kernel(weight, torch.zeros(4, dtype=dtype, device=device)))
    assert isinstance(module.weight, nn.Parameter)
    assert isinstance(module.bias, nn.Parameter)
    assert (module.weight.dtype, module.weight.device.type) == (dtype, device)
    assert (module.weight.requires_grad, module.bias.requires_grad) == (True, False)


def test_the_parameters_are_leaves_and_draw_no_random_number() -> None:
    outer, inner = nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 3)
    state = torch.get_rng_state()
    module = to_module(compose(kernel_of(outer), kernel_of(inner)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.is_leaf and p.requires_grad for p in module.parameters())
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert module.training


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_channels_last_layer_stays_channels_last(kind: Any) -> None:
    layer = kind(4, 8, 3).to(memory_format=torch.channels_last)
    weight = to_module(kernel_of(layer)).weight
    assert isinstance(weight, Tensor)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    k = kernel_of(nn.Conv2d(4, 8, 3))
    odd = to_module(replace(k, weight=k.weight.mT)).weight  # neither format: contiguous
    assert isinstance(odd, Tensor)
    assert odd.is_contiguous()
