"""The operator table: a module's kernel computes what the module computes, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import apply
from fxexpand.kernel.modules import LAYERS, describe, kernel_of, same_padding
from tests.compare import assert_different, assert_same
from tests.kernels import MODES, perturbed

SIZES = {0: (4, 3), 1: (13,), 2: (9, 12), 3: (7, 9, 8)}


def image(channels: int, rank: int) -> Tensor:
    return torch.randn(
        (2, *SIZES[0], channels) if rank == 0 else (2, channels, *SIZES[rank]), dtype=torch.float64
    )


def check(module: nn.Module, channels: int, rank: int) -> None:
    k, x = kernel_of(module), image(channels, rank)
    assert (k.rank, k.in_channels) == (rank, channels)
    assert_same(apply(k, x), module(x), 1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    check(nn.Linear(5, 7, bias=bias).double(), 5, 0)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "stride": 2},
        {"padding": 2, "dilation": 2, "groups": 2},
        {"groups": 4, "padding": "same", "dilation": 2},
        {"padding": "valid", "stride": 3},
        *({"padding": 2, "padding_mode": mode, "stride": 2} for mode in MODES),
        {"padding": "same", "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_convolutions(kind: Any, options: dict[str, Any]) -> None:
    check(kind(4, 8, 3, **options).double(), 4, LAYERS[kind].rank)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", *MODES])
@pytest.mark.parametrize(("size", "dilation"), [((4, 2), (1, 1)), ((2, 3), (3, 2)), ((1, 4), (5, 1))])
def test_same_padding_is_split_as_torch_does(mode: Any, size: Any, dilation: Any) -> None:
    module = nn.Conv2d(4, 6, size, padding="same", dilation=dilation, padding_mode=mode).double()
    check(module, 4, 2)
    assert kernel_of(module).padding == same_padding(size, dilation)


def test_sizes_that_differ_by_dimension() -> None:
    check(nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)).double(), 4, 2)
    check(nn.Conv3d(4, 6, (3, 1, 2), padding=(0, 2, 1), padding_mode="circular").double(), 4, 3)
    shape: dict[str, Any] = {"stride": (3, 2), "padding": (0, 2), "output_padding": (2, 1)}
    check(nn.ConvTranspose2d(4, 6, (2, 3), groups=2, **shape).double(), 4, 2)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "bias": False, "groups": 2},
        {"stride": 3, "padding": 1, "output_padding": 2, "groups": 4},
        {"padding": 2, "dilation": 2},
        {"output_padding": 1, "dilation": 2, "stride": 2},  # rows past the full output: the bias alone
    ],
    ids=str,
)
def test_transposed_convolutions(kind: Any, options: dict[str, Any]) -> None:
    check(kind(4, 8, 3, **options).double(), 4, LAYERS[kind].rank)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("affine", [False, True])
def test_norms(kind: Any, affine: bool) -> None:
    rank = int(kind.__name__[-2])
    norm = perturbed(kind(6, eps=0.01, affine=affine))
    check(norm, 6, rank)
    assert kernel_of(norm).groups == 6
    with torch.no_grad():
        norm.running_var.mul_(1.002)  # type: ignore[operator]
    x = image(6, rank)
    before = apply(kernel_of(norm), x)
    norm.eps += 0.01  # type: ignore[operator, assignment]
    assert_different(apply(kernel_of(norm), x), before, 1e-4)


def test_a_norm_after_a_linear_is_of_rank_zero() -> None:
    norm, x = perturbed(nn.BatchNorm1d(6)), torch.randn(5, 6, dtype=torch.float64)
    assert_same(apply(kernel_of(norm, rank=0), x), norm(x), 1e-13)
    with pytest.raises(InexactError, match="a Conv2d has 2 spatial dimensions, not 1"):
        kernel_of(nn.Conv2d(1, 1, 1), rank=1)


def test_a_norm_is_computed_in_the_dtype_asked_for() -> None:
    wide = perturbed(nn.BatchNorm2d(64))
    narrow = nn.BatchNorm2d(64).eval()
    narrow.load_state_dict(wide.state_dict())
    exact = perturbed(nn.BatchNorm2d(64))
    exact.load_state_dict(narrow.state_dict())  # the float32 numbers, in float64
    assert_same(kernel_of(narrow, dtype=torch.float64).weight, kernel_of(exact).weight, 1e-15)
    assert kernel_of(narrow).weight.dtype == torch.float32
    assert_same(kernel_of(narrow).weight.double(), kernel_of(exact).weight, 3e-7)
    half = nn.BatchNorm2d(64).eval()
    half.load_state_dict(wide.state_dict())
    half = half.bfloat16()
    got = kernel_of(half).weight
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, kernel_of(half, dtype=torch.float32).weight.bfloat16())  # rounded once


def test_the_tensors_are_the_modules_own() -> None:
    conv = nn.Conv2d(4, 4, 3)
    assert kernel_of(conv).weight is conv.weight
    assert kernel_of(conv).bias is conv.bias
    assert kernel_of(conv, dtype=torch.float64).weight.dtype == torch.float64
    up = nn.ConvTranspose2d(4, 6, 3, groups=2).double()
    (gradient,) = torch.autograd.grad(kernel_of(up).weight.square().sum(), up.weight)
    assert torch.equal(gradient, 2 * up.weight)
    norm = perturbed(nn.BatchNorm2d(4))
    assert kernel_of(norm).weight.requires_grad


def test_kernels_are_read_on_meta() -> None:
    with torch.device("meta"):
        modules = [nn.Linear(3, 4), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(4).eval()]
    for module in modules:
        assert kernel_of(module).weight.device.type == "meta"


class OwnConv(nn.Conv2d):
    """A subclass, whose forward may be anything."""


class OwnNorm(nn.BatchNorm2d):
    """Another."""


def with_own_forward() -> nn.Module:
    conv = nn.Conv2d(3, 4, 1)
    conv.__dict__["forward"] = torch.relu
    return conv


def legacy_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        normed: nn.Module = nn.utils.weight_norm(nn.Linear(3, 4))
    return normed


def pruned() -> nn.Module:
    linear = nn.Linear(3, 4)
    prune.l1_unstructured(linear, "weight", 1)  # type: ignore[no-untyped-call]
    return linear


def quantised() -> nn.Module:
    linear = nn.Linear(3, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    return linear


def sparse() -> nn.Module:
    linear = nn.Linear(3, 4)
    linear.weight = nn.Parameter(torch.eye(4, 3).to_sparse())
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.BatchNorm2d(4), "in training mode"),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(), "without running statistics"),
        (lambda: OwnConv(3, 4, 1), "OwnConv is a subclass of Conv2d"),
        (lambda: OwnNorm(3).eval(), "OwnNorm is a subclass of BatchNorm2d"),
        (lambda: nn.LazyConv2d(4, 1), "not initialised"),
        (lambda: nn.LazyLinear(4), "not initialised"),
        (lambda: nn.LazyBatchNorm2d().eval(), "not initialised"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "torch.nn.utils.parametrize"),
        (legacy_weight_norm, "weight is computed by a hook"),
        (pruned, "weight is computed by a hook"),
        (with_own_forward, "a forward of its own"),
        (quantised, "weight is int8"),
        (sparse, "weight is sparse"),
        (lambda: nn.Conv1d(3, 4, 1, dtype=torch.complex64), "weight is complex64"),
        (nn.ReLU, "ReLU is not a known affine map"),
        (lambda: nn.Sequential(), "Sequential is not a known affine map"),
        (lambda: nn.LayerNorm(4), "LayerNorm is not a known affine map"),
    ],
)
def test_what_has_no_kernel_is_refused_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(InexactError, match=reason):
        kernel_of(make())


def test_a_lazy_layer_has_a_kernel_once_it_ran() -> None:
    lazy = nn.LazyConv2d(4, 3, padding=1).double()
    lazy(image(3, 2))
    check(lazy, 3, 2)


DESCRIBED = {
    "Linear 10->5": nn.Linear(10, 5),
    "Conv2d 64->64 k3 p1": nn.Conv2d(64, 64, 3, padding=1),
    "Conv2d 4->8 k3x1 s2 p1x0 g4 d2": nn.Conv2d(4, 8, (3, 1), 2, (1, 0), groups=4, dilation=2),
    "Conv1d 3->4 k3 p=same reflect": nn.Conv1d(3, 4, 3, padding="same", padding_mode="reflect"),
    "ConvTranspose2d 4->2 k3 s2x1 op1x0": nn.ConvTranspose2d(4, 2, 3, (2, 1), output_padding=(1, 0)),
    "BatchNorm2d 7": nn.BatchNorm2d(7),
    "Embedding 10x4": nn.Embedding(10, 4),
    "OwnConv 3->4 k1": OwnConv(3, 4, 1),
    "ReLU": nn.ReLU(),
}


@pytest.mark.parametrize("words", DESCRIBED)
def test_a_module_is_described_in_a_few_words(words: str) -> None:
    assert describe(DESCRIBED[words]) == words
