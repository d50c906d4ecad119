"""Trained Rank Pruning: what a projection does, when, to which layers, and the same on every process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]

from fxexpand import SelectionError, TrainedRankPruning, UnusableWeightError, cuts, factorize
from fxexpand.kernel.modules import kernel_of
from fxexpand.lowrank.cuts import SCHEMES, matrix_of, schemes_of
from tests.compare import assert_different, assert_same


class Net(nn.Module):
    """A first layer, plain, strided, pointwise and grouped convolutions, and two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.plain = nn.Conv2d(8, 12, 3, padding=1)
        self.strided = nn.Conv2d(12, 12, 3, 2, 1)
        self.pointwise = nn.Conv2d(12, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.hidden = nn.Linear(16, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.plain, self.strided, self.pointwise, self.grouped):
            x = torch.relu(layer(x))
        result: Tensor = self.head(torch.relu(self.hidden(x.mean((2, 3)))))
        return result


def truncated(module: nn.Module, scheme: Any, energy: float) -> tuple[Tensor, Tensor, int]:
    """By an SVD of its own: the projected matrix, U V^T, and the rank; of one group."""
    own: Any = scheme if scheme in schemes_of(kernel_of(module)) else "channel"
    u, s, v = torch.linalg.svd(matrix_of(kernel_of(module), own).detach()[0].double(), full_matrices=False)
    rank = int((s.square().cumsum(0) / s.square().sum() < energy).sum()) + 1
    return u[:, :rank] * s[:rank] @ v[:rank], u[:, :rank] @ v[:rank], rank


def test_what_was_lost_is_exact_and_the_default_device_is_not_used() -> None:
    model = Net().double()
    layer, before = model.plain, model.plain.weight.detach().clone()
    with torch.device("meta"):
        trp = TrainedRankPruning(model, energy=0.7)
        trp.project()
    lost = float((layer.weight - before).detach().square().sum() / before.square().sum())
    assert {done.layer: done.lost for done in trp.last}["plain"] == pytest.approx(lost, rel=1e-11)


def test_frozen_layers_stay_and_a_shared_weight_is_projected_once() -> None:
    layers = [nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(5)]
    layers[2].weight = layers[1].weight
    layers[3].weight.requires_grad_(False)
    frozen = layers[3].weight.clone()
    trp = TrainedRankPruning(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2)), energy=0.5)
    trp.project()
    assert trp.names == ["1", "4"] == [done.layer for done in trp.last]
    assert torch.equal(layers[3].weight, frozen)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_projection_is_the_truncated_svd(scheme: Any) -> None:
    model: Any = Net().double()
    before: Any = copy.deepcopy(model)
    trp = TrainedRankPruning(model, energy=0.7, scheme=scheme)
    trp.project()
    assert trp.names == ["plain", "strided", "grouped", "hidden"]
    for name in ("plain", "strided", "hidden"):
        own: Any = scheme if name != "hidden" else "channel"
        matrix, _, rank = truncated(before.get_submodule(name), scheme, 0.7)
        assert_same(matrix_of(kernel_of(model.get_submodule(name)), own)[0].detach(), matrix, 1e-9)
        done = next(each for each in trp.last if each.layer == name)
        assert done.rank == rank < done.full_rank and 0 < done.lost <= 0.3
    for name in ("stem", "pointwise", "head"):
        assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)


def test_the_subgradient_is_added_on_projection_steps_alone() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(9, 7), nn.Linear(6, 6)).double()
    weight = model[1].weight
    optimizer = torch.optim.SGD([weight], lr=1.0)
    before: Any = weight.detach().clone()
    trp = TrainedRankPruning(model, every=3, energy=0.8, nuclear=0.01, exclude=("first", "last"))
    trp.attach(optimizer)
    projected, sign, _ = truncated_of(before, 0.8)
    assert_same(weight.detach(), projected, 1e-9)
    for step in range(1, 5):
        start = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        if step in (1, 4):  # the steps that follow a projection
            _, sign, _ = truncated_of(start, 1.0 - 1e-9)
            assert_same(start - 0.01 * sign, after_step(weight, trp, start, sign), 1e-9)
            assert_different(weight.detach(), start, 1e-4)
        elif step == 2:
            assert torch.equal(weight.detach(), start)
    assert trp.steps == 4
    done = trp.finish()
    kept = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert trp.steps == 4 and done[0].layer == "1"
    assert_same(weight.detach(), kept - 1.0, 1e-12)


def truncated_of(weight: Tensor, energy: float) -> tuple[Tensor, Tensor, int]:
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return truncated(layer, "channel", energy)


def after_step(weight: Tensor, trp: TrainedRankPruning, start: Tensor, sign: Tensor) -> Tensor:
    return weight.detach()


def test_the_subgradient_is_that_of_the_nuclear_norm() -> None:
    model: Any = nn.Sequential(nn.Linear(7, 5)).double()
    weight = model[0].weight
    optimizer = torch.optim.SGD([weight], lr=1.0)
    trp = TrainedRankPruning(model, energy=1.0, nuclear=0.1, everywhere=True, exclude=())
    trp.attach(optimizer)
    for _ in range(2):
        start = weight.detach().clone().requires_grad_(True)
        torch.linalg.matrix_norm(start, "nuc").backward()
        assert start.grad is not None
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert_same(start.detach() - 0.1 * start.grad, weight.detach(), 1e-6)


def test_without_the_nuclear_norm_gradients_are_left_alone() -> None:
    model: Any = nn.Sequential(nn.Linear(7, 5)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    TrainedRankPruning(model, nuclear=0.0, exclude=(), every=100).attach(optimizer)
    start = model[0].weight.detach().clone()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    assert torch.equal(model[0].weight.detach(), start)


def test_training_ends_at_low_rank_and_factorizes_without_loss() -> None:
    model: Any = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trp = TrainedRankPruning(model, every=4, energy=0.85, scheme="spatial").attach(optimizer)
    x, y = torch.randn(32, 3, 8, 8), torch.randint(0, 5, (32,))
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    ranks = {each.layer: each.rank for each in trp.finish()}
    small: Any = factorize(model, x, energy=0.9999, scheme="spatial", select=trp.names)
    assert_same(small(x).detach(), model(x).detach(), 1e-4)
    assert {name: cut.rank for name, cut in cuts(small).items()}["plain"] <= ranks["plain"]


def test_layers_are_excluded_as_asked() -> None:
    model: Any = Net()
    assert TrainedRankPruning(model, exclude=("strided", "last")).names == [
        "stem", "plain", "pointwise", "grouped", "hidden",
    ]  # fmt: skip
    assert TrainedRankPruning(model, exclude=(), select="plain").names == ["plain"]


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"energy": 0.0},
        {"nuclear": -1.0},
        {"scheme": "depth"},
        {"exclude": ("middle",)},
        {"select": "stem"},
        {"select": "nothing"},
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SelectionError):
        TrainedRankPruning(Net(), **options)


def test_attaching_twice_and_nan_are_errors() -> None:
    model: Any = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trp = TrainedRankPruning(model).attach(optimizer)
    with pytest.raises(SelectionError, match="attached already"):
        trp.attach(optimizer)
    with torch.no_grad():
        model.plain.weight[0] = float("nan")
    with pytest.raises(UnusableWeightError, match=r"plain\.weight"):
        trp.project()


def test_a_weight_with_nan_leaves_the_others_and_the_optimizer_alone() -> None:
    model: Any = Net()
    sound = model.hidden.weight.detach().clone()
    with torch.no_grad():
        model.hidden.weight[0] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trp = TrainedRankPruning(model, energy=0.5)
    with pytest.raises(UnusableWeightError, match=r"hidden\.weight"):
        trp.attach(optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or name == "hidden.weight"
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with torch.no_grad():
        model.hidden.weight.copy_(sound)
    assert trp.attach(optimizer).last


def test_the_subgradient_has_the_unit_of_gradients_that_a_fused_optimizer_unscales() -> None:
    """A fused optimizer gets the gradients times the scale of AMP, and divides by it in its step."""
    trained = []
    for fused in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        x = torch.randn(3, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        TrainedRankPruning(model, every=100, nuclear=0.5).attach(optimizer)
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        trained.append(model[1].weight.detach())
    assert_same(trained[1], trained[0], 1e-5)


def _train(rank: int, world: int, folder: str) -> None:
    """One process: its own batches, gradients averaged by DDP, and weights that differ by noise at first."""
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    model: Any = Net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if rank:
        with torch.no_grad():  # what differs between processors: the last bits
            model.plain.weight.add_(1e-6)
    trp = TrainedRankPruning(model, every=2, energy=0.8, nuclear=1e-2).attach(optimizer)
    torch.manual_seed(rank)
    for _ in range(4):
        optimizer.zero_grad()
        wrapped(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    trp.finish()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_process_ends_with_the_same_bits(tmp_path: Path) -> None:
    multiprocessing.spawn(_train, args=(2, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS])
def test_gradients_that_a_closure_makes_get_the_subgradient(make: Any, by_keyword: bool) -> None:
    """Lightning passes a closure to every step, which zeroes the gradients and makes them."""
    model: Any = nn.Sequential(nn.Linear(6, 5)).double()
    weight, x = model[0].weight, torch.randn(8, 6, dtype=torch.float64)
    optimizer = make(model.parameters(), lr=0.1)
    trp = TrainedRankPruning(model, energy=0.8, nuclear=0.5, exclude=()).attach(optimizer)
    projected = weight.detach().clone()
    _, sign, _ = truncated_of(projected, 1.0 - 1e-9)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        seen.append(weight.grad.clone())
        return loss

    _ = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    if make is torch.optim.SGD:
        assert len(seen) == 1
        assert_same(weight.detach(), projected - 0.1 * (seen[0] + 0.5 * sign), 1e-6)
    else:
        assert len(seen) > 1  # and each time it is there
        assert_same(weight.grad, seen[-1] + 0.5 * sign, 1e-6)
    assert trp.steps == 1
