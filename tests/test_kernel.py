"""The kernel and its laws but composition, against torch's own layers and plain loops, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import (
    Kernel,
    add,
    apply,
    cast,
    concat,
    identity,
    macs,
    native_weight,
    regroup,
    scale,
    split,
)
from fxexpand.kernel.taps import exchanged
from tests.compare import assert_different, assert_same, relative_error
from tests.kernels import MODES, definition, geometries, kernel

SIZES = {0: (), 1: (11,), 2: (9, 7), 3: (6, 5, 7)}


def image(channels: int, rank: int, batch: int = 2) -> Tensor:
    shape = (batch, 3, channels) if rank == 0 else (batch, channels, *SIZES[rank])
    return torch.randn(shape, dtype=torch.float64)


def test_geometry_is_filled_in_by_rank() -> None:
    flat = Kernel(torch.zeros(4, 3))
    assert (flat.rank, flat.stride, flat.padding, flat.kernel_size, flat.pointwise) == (0, (), (), (), True)
    conv = Kernel(torch.zeros(4, 3, 1, 5), groups=2)
    assert (conv.stride, conv.dilation, conv.padding) == ((1, 1), (1, 1), ((0, 0), (0, 0)))
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (6, 4, (1, 5))
    assert not conv.pointwise
    assert Kernel(torch.zeros(4, 3, 1)).pointwise
    assert not Kernel(torch.zeros(4, 3, 1), stride=(2,)).pointwise
    assert not Kernel(torch.zeros(4, 3, 1), padding=((0, 1),)).pointwise
    with pytest.raises(ValueError, match="stride \\(2,\\) does not fit 2"):
        Kernel(torch.zeros(4, 3, 1, 1), stride=(2,))


def test_macs_are_the_flops_torch_counts() -> None:
    k = kernel(6, 4, 3, 2, groups=2, stride=(2, 1))
    with FlopCounterMode(display=False) as counter:
        y = apply(k, image(4, 2, batch=1))
    assert counter.get_total_flops() == 2 * macs(k) * y[0, 0].numel()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_apply_is_the_definition(data: st.DataObject) -> None:
    k = data.draw(geometries(4, 4, modes=True, transposed=True))
    if k.transposed:
        k = replace(k, padding_mode="zeros")
    x = torch.randn(4, data.draw(st.integers(9, 14)), dtype=torch.float64)
    assert_same(apply(k, x[None])[0], definition(k, x), 1e-13)


@pytest.mark.parametrize("groups", [1, 2])
def test_apply_of_a_grouped_linear_is_block_diagonal(groups: int) -> None:
    k, x = kernel(6, 4, bias=True, groups=groups), image(4, 0)
    conv = replace(k, weight=k.weight[..., None], stride=(), padding=(), dilation=())
    assert_same(apply(k, x), apply(conv, x.mT).mT, 1e-13)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_add_is_the_sum_or_the_outputs_differ(data: st.DataObject) -> None:
    a, b = (data.draw(geometries(4, 4, modes=True, transposed=True)) for _ in range(2))
    a, b = (replace(k, padding_mode="zeros") if k.transposed else k for k in (a, b))
    if data.draw(st.booleans()):  # mostly the interesting case: the same output positions
        span = b.dilation[0] * (b.kernel_size[0] - 1)
        before = data.draw(st.integers(0, 2))
        length = sum(a.padding[0]) - a.dilation[0] * (a.kernel_size[0] - 1)
        b = replace(b, stride=a.stride, transposed=a.transposed, padding=((before, length + span - before),))
        b = replace(b, padding_mode=a.padding_mode)
    x = torch.randn(1, 4, 15, dtype=torch.float64)
    one, two = apply(a, x), apply(b, x)
    try:
        total = add(a, b)
    except InexactError as error:
        assert not same_positions(a, b) or "modes" in str(error)
        return
    assert_same(apply(total, x), one + two, 1e-12)
    assert_same(apply(add(b, a), x), one + two, 1e-12)


def same_positions(a: Kernel, b: Kernel) -> bool:
    """Whether stride and length agree at every input length; a plain kernel may be written transposed."""
    if a.stride != b.stride or (a.transposed != b.transposed and a.stride != (1,)):
        return False
    x = torch.zeros(1, 4, 1, dtype=torch.float64)
    zeros = [replace(k, padding_mode="zeros") for k in (a, b)]
    lengths = [[apply(k, x.expand(1, 4, n)).shape[2] for n in range(9, 15)] for k in zeros]
    return lengths[0] == lengths[1]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_branches_of_different_size_dilation_and_groups_add(rank: int) -> None:
    ones, twos, threes = (1,) * rank, (2,) * rank, (3,) * rank
    wide = kernel(8, 8, *threes, padding=((2, 2),) * rank, dilation=twos, bias=True)
    near = kernel(8, 8, *threes, padding=((1, 1),) * rank, groups=4)
    point = kernel(8, 8, *ones, groups=8, bias=True)
    same = kernel(8, 8, *twos, padding=((0, 1),) * rank)
    x = image(8, rank)
    total = add(add(wide, near), add(point, same))
    assert total.kernel_size == (5,) * rank
    assert total.padding == ((2, 2),) * rank
    assert total.groups == 1
    assert_same(apply(total, x), sum(apply(k, x) for k in (wide, near, point, same)), 1e-12)  # type: ignore[arg-type]
    assert add(near, point).kernel_size == threes
    assert add(near, point).groups == 4
    lattice = add(wide, point)
    assert (lattice.kernel_size, lattice.dilation) == (threes, twos)  # no tap where none is needed


@pytest.mark.parametrize("mode", MODES)
def test_an_unpadded_branch_goes_with_any_mode(mode: str) -> None:
    a = kernel(4, 4, 3, 3, padding=((1, 1), (1, 1)), padding_mode=mode)
    b = kernel(4, 4, 1, 1, bias=True)
    x = image(4, 2)
    assert_same(apply(add(b, a), x), apply(a, x) + apply(b, x), 1e-13)
    with pytest.raises(InexactError, match=f"different modes: {mode} and zeros"):
        add(a, kernel(4, 4, 3, 3, padding=((1, 1), (1, 1))))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (2, 2)}, "stride"),
        ({"padding": ((1, 1), (0, 1))}, "different lengths"),
        ({"stride": (2, 2), "transposed": True}, "stride"),
    ],
)
def test_add_refuses_other_positions(change: dict[str, Any], reason: str) -> None:
    a = kernel(4, 4, 3, 3, padding=((1, 1), (1, 1)))
    with pytest.raises(InexactError, match=reason):
        add(a, replace(a, **change))


def test_add_refuses_other_channels_and_ranks() -> None:
    a = kernel(4, 4, 1)
    for b, reason in [
        (kernel(3, 4, 1), "give 4 and 3"),
        (kernel(4, 3, 1), "take 4 and 3"),
        (kernel(4, 4), "Linear"),
        (kernel(4, 4, 1, 1), "1 and 2 spatial"),
    ]:
        with pytest.raises(InexactError, match=reason):
            add(a, b)


def test_transposed_and_plain_branches_add_at_stride_one() -> None:
    a = kernel(4, 4, 3, bias=True, transposed=True, padding=((1, 1),))
    b = kernel(4, 4, 5, padding=((2, 2),), groups=2)
    c = kernel(4, 4, 3, padding=((1, 1),), padding_mode="reflect")
    x = image(4, 1)
    assert add(a, b).transposed
    assert_same(apply(add(a, b), x), apply(a, x) + apply(b, x), 1e-13)
    d = replace(a, padding=((2, 2),), weight=kernel(4, 4, 5).weight[..., :5])
    valid = kernel(4, 4, 1, transposed=True)
    assert_same(apply(add(valid, c), x), apply(valid, x) + apply(c, x), 1e-13)
    assert_same(apply(add(d, a), x), apply(d, x) + apply(a, x), 1e-13)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_scale_multiplies_the_outputs(rank: int, bias: bool) -> None:
    k, x = kernel(6, 4, *(2,) * rank, bias=bias, groups=2), image(4, rank)
    factor = torch.randn(6, dtype=torch.float64)
    shaped = factor if rank == 0 else factor.reshape(-1, *(1,) * rank)
    assert_same(apply(scale(k, factor), x), apply(k, x) * shaped, 1e-13)
    assert_same(apply(scale(k, -0.3), x), apply(k, x) * -0.3, 1e-13)
    assert_same(apply(scale(k, torch.tensor(1.7, dtype=torch.float64)), x), apply(k, x) * 1.7, 1e-13)
    with pytest.raises(InexactError, match="shape \\(4,\\) is not one value for each of 6"):
        scale(k, factor[:4])


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_identity_is_the_identity(rank: int, groups: int) -> None:
    x = image(6, rank)
    assert torch.equal(apply(identity(6, rank, like=x, groups=groups), x), x)
    with pytest.raises(InexactError, match="6 channels do not divide into 4 groups"):
        identity(6, rank, like=x, groups=4)


def test_concat_stacks_and_split_takes_apart() -> None:
    a = kernel(4, 6, 3, 3, padding=((1, 1), (1, 1)), bias=True)
    b = kernel(6, 6, 1, 1, groups=3)
    x = image(6, 2)
    stacked = concat([a, b])
    assert_same(apply(stacked, x), torch.cat([apply(a, x), apply(b, x)], 1), 1e-13)
    assert stacked.bias is not None
    assert torch.equal(stacked.bias[4:], torch.zeros(6, dtype=torch.float64))
    for part, whole in zip(split(stacked, [4, 6]), [a, b], strict=True):
        assert_same(apply(part, x), apply(whole, x), 1e-13)
    assert concat([b]) is b
    assert split(b, [6]) == [b]
    assert all(part.bias is None for part in split(b, [1, 3, 2]))
    assert_same(torch.cat([apply(part, x) for part in split(b, [1, 3, 2])], 1), apply(b, x), 1e-13)


def test_concat_and_split_refuse_what_does_not_fit() -> None:
    a = kernel(4, 6, 3, 3)
    with pytest.raises(InexactError, match="different lengths"):
        concat([a, kernel(4, 6, 1, 1)])
    with pytest.raises(InexactError, match="take 6 and 4"):
        concat([a, kernel(4, 4, 3, 3)])
    for sizes in ([1, 2], [5, -1]):
        with pytest.raises(InexactError, match="do not add up to 4"):
            split(a, sizes)
    with pytest.raises(ValueError, match="no kernels"):
        concat([])


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("fewer", [1, 2, 3, 6])
def test_regroup_is_the_same_map(rank: int, fewer: int) -> None:
    k, x = kernel(12, 6, *(2,) * rank, groups=6, bias=True), image(6, rank)
    other = regroup(k, fewer)
    assert (other.groups, other.in_channels) == (fewer, 6)
    assert_same(apply(other, x), apply(k, x), 1e-13)
    with pytest.raises(InexactError, match="6 groups cannot be written with 4"):
        regroup(k, 4)


def test_nan_stays_in_its_own_block() -> None:
    k = kernel(4, 4, 1, groups=4)
    k.weight[2] = float("nan")
    dense = regroup(k, 1).weight
    assert int(dense.isnan().sum()) == 1


def test_cast_changes_the_dtype_only() -> None:
    k = kernel(4, 4, 3, bias=True, stride=(2,))
    half = cast(k, torch.float32)
    assert half.weight.dtype == torch.float32
    assert half.bias is not None
    assert half.bias.dtype == torch.float32
    assert half.geometry == k.geometry


@pytest.mark.parametrize("groups", [1, 2])
def test_the_layouts_of_a_transposed_weight_are_inverse(groups: int) -> None:
    module = nn.ConvTranspose2d(4, 6, 3, groups=groups).double()
    weight = exchanged(module.weight, groups)
    assert weight.shape == (6, 4 // groups, 3, 3)
    k = Kernel(weight, groups=groups, transposed=True)
    assert torch.equal(native_weight(k), module.weight)


def test_laws_are_differentiable() -> None:
    def value(a: Tensor, b: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
        wide = Kernel(a, bias, padding=((2, 2),), dilation=(2,))
        near = Kernel(b, padding=((1, 1),), groups=2)
        whole = concat([scale(add(wide, near), factor), near])
        return torch.cat([part.weight.flatten() for part in split(whole, [3, 5])])

    shapes = [(4, 4, 3), (4, 2, 3), (4,), (4,)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(value, inputs)


def test_laws_run_on_meta() -> None:
    near = Kernel(torch.empty(4, 2, 3, device="meta"), padding=((1, 1),), groups=2)
    point = Kernel(torch.empty(4, 4, 1, device="meta"), torch.empty(4, device="meta"))
    total = concat([add(near, point), scale(point, 2.0), identity(4, 1, like=near.weight)])
    assert (total.weight.device.type, total.weight.shape) == ("meta", (12, 4, 3))
    assert apply(total, torch.empty(2, 4, 9, device="meta")).shape == (2, 12, 9)


def test_the_tolerance_catches_a_tenth_of_a_percent() -> None:
    a, b, x = kernel(4, 4, 3, padding=((1, 1),)), kernel(4, 4, 1), image(4, 1)
    total = add(a, replace(b, weight=b.weight * 1.001))
    assert_different(apply(total, x), apply(a, x) + apply(b, x), 1e-6)
    assert relative_error(apply(add(a, b), x), apply(a, x) + apply(b, x)) < 1e-13
