"""Composition is associative, distributes over addition, and has an identity and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel, add, apply, compose, compose_all, identity, scale
from fxexpand.kernel.modules import kernel_of
from tests.compare import assert_different, assert_same
from tests.kernels import geometries, kernel, perturbed
from tests.test_compose import image, layer

# The algebra -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(geometries(2, 4), geometries(4, 4), geometries(4, 2))
def test_composition_is_associative_where_both_sides_are_exact(c: Kernel, b: Kernel, a: Kernel) -> None:
    try:
        left, right = compose(compose(c, b), a), compose(c, compose(b, a))
    except InexactError:
        assume(False)
    same = (left.stride, left.padding, left.groups, left.kernel_size)
    assert same == (right.stride, right.padding, right.groups, right.kernel_size)
    assert_same(left.weight, right.weight, 1e-12)
    assert (left.bias is None) == (right.bias is None)
    if left.bias is not None and right.bias is not None:
        assert_same(left.bias, right.bias, 1e-12)


@settings(max_examples=50, deadline=None)
@given(geometries(4, 4, crops=False), st.integers(1, 3), st.booleans())
def test_composition_distributes_over_addition(outer: Kernel, taps: int, first: bool) -> None:
    outer = replace(outer, padding=((0, 0),), bias=None)
    a = kernel(4, 4, 2 * taps - 1, padding=((taps - 1, taps - 1),), bias=first)
    b = kernel(4, 4, 1, groups=2, bias=True)
    left, right = compose(outer, add(a, b)), add(compose(outer, a), compose(outer, b))
    x = image(4, 1)
    assert_same(apply(left, x), apply(right, x), 1e-12)
    point, two = kernel(4, 4, 1), kernel(4, 4, 3, padding=((1, 1),), bias=True)
    x = image(4, 1)
    assert_same(
        apply(compose(add(two, b), point), x), apply(add(compose(two, point), compose(b, point)), x), 1e-12
    )


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_identity_is_neutral_and_scale_moves_out(rank: int) -> None:
    k = kernel(6, 4, *(3,) * rank, bias=True, groups=2, padding=((1, 1),) * rank)
    one, other = identity(6, rank, like=k.weight, groups=6), identity(4, rank, like=k.weight)
    assert_same(compose(one, k).weight, k.weight, 1e-15)
    x = image(4, rank)
    assert_same(apply(compose(k, other), x), apply(k, x), 1e-13)
    outer, factor = kernel(3, 6, *(1,) * rank), torch.randn(3, dtype=torch.float64)
    assert_same(compose(scale(outer, factor), k).weight, scale(compose(outer, k), factor).weight, 1e-13)


def test_gradients_are_those_of_the_layers_in_turn() -> None:
    norm = perturbed(nn.BatchNorm2d(8))
    up = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2).double()
    chains = [
        [layer(0, 4, 6), layer(0, 6, 3), layer(0, 3, 5)],
        [layer(2, 3, 8, 3, padding=1, stride=2), layer(2, 8, 8, groups=4), norm, layer(2, 8, 4)],
        [layer(2, 4, 8, bias=False, groups=2), layer(2, 8, 8, 3, groups=8, padding=1), layer(2, 8, 3)],
        [layer(1, 3, 4, 3, dilation=2), layer(1, 4, 4, 2, groups=2), layer(1, 4, 2, 3, stride=2)],
        [layer(1, 3, 4, bias=False), up, layer(1, 6, 2)],
    ]
    for layers in chains:
        rank = max(kernel_of(each).rank for each in layers)
        x = image(kernel_of(layers[0]).in_channels, rank).requires_grad_()
        leaves = [x, *(p for each in layers for p in each.parameters())]
        expected = nn.Sequential(*layers)(x)
        direction = torch.randn_like(expected)
        want = torch.autograd.grad((expected * direction).sum(), leaves)
        merged = apply(compose_all([kernel_of(each) for each in layers]), x)
        got = torch.autograd.grad((merged * direction).sum(), leaves)
        for one, two in zip(got, want, strict=True):
            assert_same(one, two, 1e-9)
        assert_different(got[1] * 1.001, want[1], 1e-9)
