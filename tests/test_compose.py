"""Composition: exact or refused, and refused only where folding is wrong. Reference: one after the other."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxexpand.errors import InexactError
from fxexpand.kernel import geometry
from fxexpand.kernel.algebra import Kernel, apply, cast, compose, compose_all
from fxexpand.kernel.geometry import Geometry
from fxexpand.kernel.modules import kernel_of
from tests.compare import assert_different, assert_same, relative_error
from tests.kernels import MODES, geometries, in_turn, kernel, outputs, perturbed

LENGTHS = range(1, 31)


def naive(outer: Kernel, inner: Kernel) -> Kernel:
    """The composition without its conditions: what a careless fold computes."""

    def none(outer: Geometry, inner: Geometry) -> None:
        return None

    with (
        mock.patch.object(geometry, "_plain_reason", none),
        mock.patch.object(geometry, "_transposed_reason", none),
        mock.patch("fxexpand.kernel.algebra.composition", geometry._composition),
    ):
        return compose(outer, inner)


def agree(outer: Kernel, inner: Kernel, merged: Kernel, lengths: range = LENGTHS) -> bool:
    """Whether ``merged`` computes ``outer`` after ``inner`` for every input length."""
    pairs = outputs(
        lambda x: in_turn((inner, outer), x), lambda x: apply(merged, x), inner.in_channels, lengths
    )
    return all(got.shape == want.shape and relative_error(got, want) <= 1e-12 for got, want in pairs)


@settings(max_examples=150, deadline=None)
@given(geometries(4, 8), geometries(8, 4))
def test_plain_kernels_fold_if_and_only_if_it_is_exact(outer: Kernel, inner: Kernel) -> None:
    try:
        merged = compose(outer, inner)
    except InexactError:
        assert not agree(outer, inner, naive(outer, inner))
    else:
        assert agree(outer, inner, merged)


@settings(max_examples=150, deadline=None)
@given(geometries(4, 8, transposed=True, crops=False), geometries(8, 4, transposed=True, crops=False))
def test_transposed_kernels_fold_if_and_only_if_it_is_exact(outer: Kernel, inner: Kernel) -> None:
    assume(outer.transposed or inner.transposed)
    try:
        merged = compose(outer, inner)
    except InexactError as error:
        if "in general no single kernel" not in str(error):
            assert not agree(outer, inner, naive(outer, inner))
    else:
        assert agree(outer, inner, merged)


@settings(max_examples=150, deadline=None)
@given(geometries(4, 8, modes=True), geometries(8, 4, modes=True))
def test_padding_modes_fold_only_if_it_is_exact(outer: Kernel, inner: Kernel) -> None:
    try:
        merged = compose(outer, inner)
    except InexactError:
        return
    assert agree(outer, inner, merged, range(4, 20))


@settings(max_examples=300, deadline=None)
@given(*[st.tuples(*[st.integers(1, 4)] * 3, *[st.integers(-2, 5)] * 2) for _ in range(2)])
def test_output_lengths_compose_for_every_input_length(
    one: tuple[int, int, int, int, int], two: tuple[int, int, int, int, int]
) -> None:
    inner, outer = (
        Kernel(torch.empty(1, 1, k, device="meta"), None, (s,), ((before, after),), (d,))
        for k, s, d, before, after in (one, two)
    )
    merged = naive(outer, inner)
    for length in range(1, 120):
        between = out_length(inner, length)
        if between > 0:
            assert out_length(merged, length) == out_length(outer, between)


def out_length(k: Kernel, length: int) -> int:
    """As documented for torch.nn.Conv1d."""
    return (length + sum(k.padding[0]) - k.dilation[0] * (k.kernel_size[0] - 1) - 1) // k.stride[0] + 1


# Torch's own layers, of every rank -------------------------------------------------------------------------

CONVS: dict[int, Any] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {0: (), 1: (13,), 2: (9, 12), 3: (7, 9, 8)}


def layer(rank: int, inp: int, out: int, size: int | tuple[int, ...] = 1, **options: Any) -> nn.Module:
    made: nn.Module = CONVS[rank](inp, out, **({"kernel_size": size} if rank else {}), **options).double()
    return made


def image(channels: int, rank: int) -> Tensor:
    return torch.randn((2, channels, *SIZES[rank]) if rank else (2, 3, channels), dtype=torch.float64)


def check(*layers: nn.Module, x: Tensor) -> Kernel:
    """All layers as one kernel, which computes the same."""
    merged = compose_all([kernel_of(each) for each in layers])
    assert_same(apply(merged, x), nn.Sequential(*layers)(x), 1e-12)
    return merged


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chain_of_huh_folds(rank: int, bias: bool) -> None:
    options = {"stride": 2, "padding": 1, "dilation": 2} if rank else {}
    first = layer(rank, 3, 10, 3, bias=False, **options)
    check(first, layer(rank, 10, 7, bias=bias), layer(rank, 7, 5, bias=bias), x=image(3, rank))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", list(itertools.product([1, 2, 4, 6, 12], repeat=2)))
@pytest.mark.parametrize("sizes", [(3, 1), (1, 3), (2, 3), (1, 1)])
def test_groups_of_any_kind_fold(rank: int, groups: tuple[int, int], sizes: tuple[int, int]) -> None:
    if rank == 3 and sizes == (2, 3):
        sizes = (2, 2)
    inner = layer(rank, 12, 24, sizes[0], groups=groups[0], padding=1 if sizes[0] == 3 else 0)
    outer = layer(rank, 24, 12, sizes[1], groups=groups[1])
    merged = check(inner, outer, x=image(12, rank)[:1])
    assert merged.groups == torch.tensor(groups).gcd(torch.tensor(groups[::-1]))[0]


def test_depthwise_after_pointwise_and_before_it() -> None:
    x = image(6, 2)
    depthwise = layer(2, 12, 12, 3, groups=12, padding=1, bias=False)
    check(layer(2, 6, 12, bias=False), depthwise, layer(2, 12, 5), x=x)
    check(layer(2, 6, 6, 3, groups=6), layer(2, 6, 18, groups=6), layer(2, 18, 18, 3, groups=18), x=x)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_spatial_kernels_of_any_stride_and_dilation_convolve(rank: int) -> None:
    merged = check(
        layer(rank, 3, 4, (3, 1, 2)[:rank], stride=(1, 2, 2)[:rank], dilation=(2, 1, 1)[:rank], padding=1),
        layer(rank, 4, 5, (1, 3, 2)[:rank], dilation=(1, 2, 1)[:rank]),
        layer(rank, 5, 2, (2, 1, 1)[:rank], stride=(3, 1, 2)[:rank]),
        x=image(3, rank),
    )
    assert merged.padding == ((1, 1),) * rank


def test_equal_dilations_stay_dilated() -> None:
    merged = check(layer(2, 3, 4, 3, dilation=2), layer(2, 4, 5, 2, dilation=2), x=image(3, 2))
    assert (merged.kernel_size, merged.dilation) == ((4, 4), (2, 2))
    strided = check(layer(1, 3, 4, 1, stride=2), layer(1, 4, 5, 3), x=image(3, 1))
    assert (strided.kernel_size, strided.dilation, strided.stride) == ((3,), (2,), (2,))


@pytest.mark.parametrize("mode", MODES)
def test_modes_commute_with_pointwise_layers(mode: str) -> None:
    x = image(3, 2)
    padded = layer(2, 4, 5, 3, padding=(1, 2), padding_mode=mode, stride=2)
    assert check(layer(2, 3, 4), padded, layer(2, 5, 2), x=x).padding_mode == mode
    spatial = layer(2, 5, 5, 3)
    assert check(padded, spatial, x=image(4, 2)).padding_mode == mode  # the outer kernel pads nothing
    along_width = layer(2, 3, 4, (1, 3), padding=(0, 1), padding_mode=mode)
    along_height = layer(2, 4, 4, (3, 1), padding=(1, 0), padding_mode=mode)
    assert check(along_width, along_height, x=x).padding == ((1, 1), (1, 1))


@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths"
)  # torch's own, at run time
@pytest.mark.parametrize("size", [2, 3, 4])
def test_same_padding_folds(size: int) -> None:
    same = layer(2, 4, 5, size, padding="same", dilation=(1, 3))
    check(layer(2, 3, 4, bias=False), same, layer(2, 5, 2), x=image(3, 2))


NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_norms_fold_on_either_side(rank: int) -> None:
    before, after = perturbed(NORMS[rank](4)), perturbed(NORMS[rank](6))
    merged = check(before, layer(rank, 4, 6, 3, groups=2), after, x=image(4, rank))
    assert merged.groups == 2
    with pytest.raises(InexactError, match="zero padding follows a bias"):
        compose(kernel_of(layer(rank, 4, 6, 3, padding=1)), kernel_of(before))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_layer_folds_with_pointwise_ones(rank: int, groups: int) -> None:
    shapes: list[dict[str, int]] = [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": 3, "padding": 1, "output_padding": 2, "dilation": 2},
    ]
    for shape in shapes:
        up = TRANSPOSED[rank](8, 4, 3, groups=groups, **shape).double()
        merged = check(
            layer(rank, 6, 8, groups=groups, bias=False), up, layer(rank, 4, 10, groups=2), x=image(6, rank)
        )
        assert merged.transposed
        assert merged.stride == (shape.get("stride", 1),) * rank


@pytest.mark.parametrize("rank", [1, 2])
def test_transposed_layers_fold(rank: int) -> None:
    inner = TRANSPOSED[rank](3, 4, 3, stride=2, bias=False, dilation=2).double()
    outer = TRANSPOSED[rank](4, 6, 2, stride=3, padding=1, output_padding=2, groups=2).double()
    assert check(inner, outer, x=image(3, rank)).stride == (6,) * rank
    # Of non-overlapping patches, what the inner layer crops, the outer one cannot bring back.
    cropped = TRANSPOSED[rank](3, 4, 4, stride=2, padding=1, bias=False).double()
    check(cropped, TRANSPOSED[rank](4, 2, 2, stride=2).double(), x=image(3, rank))


def test_a_transposed_layer_and_a_spatial_one_of_stride_one() -> None:
    x = image(3, 1)
    up = nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1).double()
    merged = check(up, layer(1, 4, 6, 3, groups=2), x=x)
    assert merged.transposed
    valid = layer(1, 3, 4, 3, padding=2, bias=False)
    check(valid, nn.ConvTranspose1d(4, 4, 4, stride=2, padding=1).double(), x=x)
    flat = nn.ConvTranspose1d(3, 4, 3, padding=1).double()
    assert not check(flat, layer(1, 4, 5, 3, stride=2), x=x).transposed  # stride 1 is plain, flipped
    reflected = layer(1, 3, 3, 3, padding=1, padding_mode="reflect")
    assert not check(reflected, nn.ConvTranspose1d(3, 4, 3, padding=2).double(), x=x).transposed


# Refusals: the reason, and that a careless fold is wrong ---------------------------------------------------

PAD: dict[str, Any] = {"padding": ((1, 1),)}
REFUSED: list[tuple[str, Kernel, Kernel, str]] = [
    ("bias", kernel(4, 4, 3, **PAD), kernel(4, 4, 1, bias=True), "zero padding follows a bias"),
    ("taps", kernel(4, 4, 3, **PAD), kernel(4, 4, 3), "would not compute as zero"),
    ("same padding twice", kernel(4, 4, 3, **PAD), kernel(4, 4, 3, **PAD), "would not compute as zero"),
    ("crop", kernel(4, 4, 3, **PAD), kernel(4, 4, 1, padding=((-1, 0),)), "would not compute as zero"),
    ("mode", kernel(4, 4, 3, **PAD), kernel(4, 4, 3, padding_mode="reflect", **PAD), "one padding mode"),
    ("reflect taps", kernel(4, 4, 3, padding_mode="reflect", **PAD), kernel(4, 4, 3), "commutes only"),
    (
        "reflect",
        kernel(4, 4, 3, padding_mode="reflect", **PAD),
        kernel(4, 4, 1, stride=(2,)),
        "commutes only",
    ),
    (
        "transposed bias",
        kernel(4, 4, 3, transposed=True, stride=(2,)),
        kernel(4, 4, 1, bias=True),
        "a transposed kernel follows a bias",
    ),
    (
        "patches of a bias",
        kernel(4, 4, 2, transposed=True, stride=(2,)),
        kernel(4, 4, 1, bias=True),
        "a transposed kernel follows a bias",
    ),
    (
        "rows past the output",
        kernel(4, 4, 1, transposed=True, padding=((0, -1),)),
        kernel(4, 4, 1, bias=True, transposed=True, stride=(2,)),
        "follows a bias",
    ),
    (
        "cropped rows",
        kernel(4, 4, 3, transposed=True, stride=(2,)),
        kernel(4, 4, 3, transposed=True, stride=(2,), padding=((1, 1),)),
        "crops rows",
    ),
]


@pytest.mark.parametrize(("outer", "inner", "reason"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_is_refused_would_be_wrong(outer: Kernel, inner: Kernel, reason: str) -> None:
    with pytest.raises(InexactError, match=reason):
        compose(outer, inner)
    assert not agree(outer, inner, naive(outer, inner))


@pytest.mark.parametrize(
    ("outer", "inner", "reason"),
    [
        (kernel(4, 4, 1), kernel(4, 4), "a Linear mixes the last dimension"),
        (kernel(4, 4), kernel(4, 4, 1, 1), "a Linear mixes the last dimension"),
        (kernel(4, 4, 1), kernel(4, 4, 1, 1), "1 and 2 spatial dimensions"),
        (kernel(4, 4), kernel(5, 4), "gives 5 channels, the outer one takes 4"),
        (kernel(4, 4, 3, stride=(2,)), kernel(4, 4, 3, stride=(2,), transposed=True), "no single kernel"),
        (kernel(4, 4, 3, stride=(2,), transposed=True), kernel(4, 4, 3, stride=(2,)), "no single kernel"),
    ],
)
def test_what_has_no_kernel_is_refused(outer: Kernel, inner: Kernel, reason: str) -> None:
    with pytest.raises(InexactError, match=reason):
        compose(outer, inner)


# Formats, devices, compilation -----------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "form"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_a_channels_last_weight_stays_channels_last(rank: int, form: torch.memory_format) -> None:
    spatial = kernel(8, 6, *(3,) * rank, bias=True)
    last = replace(spatial, weight=spatial.weight.contiguous(memory_format=form))
    grouped = replace(last, groups=2)
    for outer, inner in [
        (kernel(4, 8, *(1,) * rank), last),
        (kernel(4, 8, *(1,) * rank, groups=2), grouped),
        (kernel(8, 8, *(1,) * rank, groups=8), last),
        (last, kernel(6, 5, *(1,) * rank)),
    ]:
        merged = compose(outer, inner).weight
        assert merged.is_contiguous(memory_format=form)
        plain = [replace(k, weight=k.weight.contiguous()) for k in (outer, inner)]
        assert compose(*plain).weight.is_contiguous()
        assert_same(merged, compose(*plain).weight, 1e-14)


def test_composition_runs_on_meta() -> None:
    inner = Kernel(torch.empty(8, 2, 3, 3, device="meta"), torch.empty(8, device="meta"), groups=2)
    outer = Kernel(torch.empty(6, 4, 2, 2, device="meta"), torch.empty(6, device="meta"), groups=2)
    merged = compose_all([inner, outer, Kernel(torch.empty(5, 6, 1, 1, device="meta"))])
    assert (merged.weight.device.type, merged.weight.shape) == ("meta", (5, 4, 4, 4))


def test_composition_compiles_as_one_graph() -> None:
    layers = [layer(2, 3, 8, 3, padding=1, bias=False), layer(2, 8, 8, groups=2), layer(2, 8, 4)]

    def collapsed(x: Tensor) -> Tensor:
        return apply(compose_all([kernel_of(each) for each in layers]), x)

    compiled = torch.compile(collapsed, fullgraph=True, backend="aot_eager")
    x = image(3, 2)
    assert_same(compiled(x), nn.Sequential(*layers)(x), 1e-12)


def test_folding_in_float64_casts_once() -> None:
    chain = [cast(kernel(32, 32), torch.float32) for _ in range(6)]
    exact = compose_all([cast(k, torch.float64) for k in chain])
    assert_same(cast(exact, torch.float32).weight, exact.weight.float(), 0.0)
    assert relative_error(cast(exact, torch.float32).weight, exact.weight) < 6e-8


def test_the_tolerance_catches_a_tenth_of_a_percent() -> None:
    inner, outer, x = kernel(6, 3, 3, padding=((1, 1),)), kernel(4, 6, 1, bias=True), image(3, 1)
    off = replace(inner, weight=inner.weight * 1.001)
    assert_different(apply(compose(outer, off), x), in_turn((inner, outer), x), 1e-6)
    assert not agree(outer, inner, compose(outer, off))
