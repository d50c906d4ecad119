"""Example inputs, quiet evaluation, and the comparison of outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fxexpand.errors import SelectionError, VerificationError
from fxexpand.running import inputs
from fxexpand.running.evaluation import evaluating
from fxexpand.running.outputs import tensors_of, worst_error


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        return x * scale


def test_the_three_ways_to_write_inputs() -> None:
    x = torch.randn(2, 3)
    model = Scaled()
    assert torch.equal(inputs.call(model, x), x)
    assert torch.equal(inputs.call(model, (x, 3.0)), x * 3.0)
    assert torch.equal(inputs.call(model, {"scale": 2.0, "x": x}), x * 2.0)
    assert inputs.as_call((x, 3.0)) == ((x, 3.0), {})
    assert inputs.as_call({"x": x}) == ((), {"x": x})


@pytest.mark.parametrize("wrong", [[torch.zeros(1)], "x", 3, {1: torch.zeros(1)}])
def test_anything_else_is_an_error_that_says_what_to_write(wrong: Any) -> None:
    for function in (inputs.as_call, inputs.move, inputs.copy):
        with pytest.raises(SelectionError, match="example_inputs"):
            function(wrong)


def test_move_changes_floating_tensors_only() -> None:
    x = torch.randn(2)
    given = {"x": x, "nested": [torch.arange(3), (torch.randn(1), 5)], "flag": True}
    moved = inputs.move(given, dtype=torch.float64)
    assert isinstance(moved, dict)
    assert moved["x"].dtype == torch.float64
    assert moved["nested"][0].dtype == torch.int64
    assert moved["nested"][1][0].dtype == torch.float64
    assert moved["nested"][1][1] == 5 and moved["flag"] is True
    assert x.dtype == torch.float32
    on_meta = inputs.move((torch.randn(2), torch.arange(3)), "meta")
    assert [tensor.device.type for tensor in inputs.tensors(on_meta)] == ["meta", "meta"]


def test_copies_share_nothing() -> None:
    x = torch.randn(2)
    copied = inputs.copy((x,))
    assert isinstance(copied, tuple)
    copied[0].zero_()
    assert bool(x.any())


def test_a_named_tuple_of_arguments_is_taken_as_positional() -> None:
    class Pair(NamedTuple):
        x: Tensor
        scale: float

    copied = inputs.copy(Pair(torch.ones(2), 2.0))
    assert torch.equal(inputs.call(Scaled(), copied), torch.full((2,), 2.0))


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_resizing_keeps_the_rows_apart(size: int) -> None:
    x, mask = torch.randn(3, 4), torch.randn(7, 7)
    resized = inputs.resize_batch({"x": x, "ids": torch.arange(3), "mask": mask}, size)
    assert isinstance(resized, dict)
    assert resized["x"].shape == (size, 4)
    assert resized["ids"].tolist() == [i % 3 for i in range(size)]
    assert resized["mask"] is mask
    assert torch.equal(resized["x"][:3], x[:size])
    assert len({tuple(row.tolist()) for row in resized["x"]}) == size


def test_without_a_batch_dimension_there_is_nothing_to_resize() -> None:
    with pytest.raises(SelectionError, match="no tensor with a batch dimension"):
        inputs.resize_batch((torch.tensor(1.0),), 2)


class Counting(nn.Module):
    """Writes to its buffers and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)
        self.calls: Tensor
        self.last: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return self.frozen(self.norm(x)) + torch.rand(3)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_leaves_no_trace(fails: bool) -> None:
    model = Counting().train()
    model.frozen.eval()
    model(torch.randn(4, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    last, random_state = model.last, torch.get_rng_state()
    try:
        with evaluating(model):
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in model.modules())
            assert not model(torch.randn(4, 3)).requires_grad
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert flags["frozen"] is False and flags["norm"] is True
    assert model.last is last
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_tensors_are_found_in_any_structure() -> None:
    @dataclass
    class Output:
        logits: Tensor
        hidden: tuple[Tensor, ...]
        label: str = "x"

    a, b, c, d = torch.randn(4, 2)
    assert [id(t) for t in tensors_of({"o": Output(a, (b, c)), "rest": [d, None, 3]})] == [
        id(a),
        id(b),
        id(c),
        id(d),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_below_the_smallest_normal_number_nothing_differs(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    outputs = torch.tensor([0.5, -0.3, 0.1], dtype=dtype) * tiny
    flushed = worst_error([torch.zeros_like(outputs)], [outputs])
    assert flushed == (0.0 if dtype != torch.float16 else 1.0)  # which is computed in float32
    assert worst_error([torch.zeros_like(outputs)], [outputs * 100]) == 1.0


def test_the_worst_error_over_all_outputs_counts() -> None:
    a, b = torch.randn(5, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    assert worst_error([a, b], [a, b]) == 0.0
    assert worst_error([a, b * 1.001], [a, b]) == pytest.approx(1e-3)
    assert worst_error([a, b * float("nan")], [a, b]) == float("inf")
    assert worst_error([torch.arange(3)], [torch.arange(3)]) == 0.0
    masked = torch.tensor([1.0, float("-inf")])
    assert worst_error([masked], [masked.clone()]) == 0.0


@pytest.mark.parametrize(
    ("actual", "expected"), [([], []), ([torch.zeros(2)], []), ([torch.zeros(2, 1)], [torch.zeros(1, 2)])]
)
def test_what_cannot_be_compared_is_an_error(actual: list[Tensor], expected: list[Tensor]) -> None:
    with pytest.raises(VerificationError):
        worst_error(actual, expected)
