"""DistributedDataParallel and FSDP2 in two processes against one: losses, gradients, checkpoints, folds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxexpand.errors import FxExpandError
from fxexpand.layers.accumulation import accumulate
from fxexpand.layers.expanded import Expanded
from fxexpand.layers.param_groups import param_groups
from fxexpand.recipes import OREPA
from fxexpand.surgery.expand import expand
from fxexpand.surgery.fold import fused_state_dict
from fxexpand.surgery.fuse import fuse
from fxexpand.training import checkpoint
from fxexpand.training.distributed import Processes, wrapped
from tests.compare import assert_different, assert_same
from tests.networks import Language
from tests.processes import ranks

MICRO, STEPS = 2, 3
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of torch: an output that is a view


class Convolutions(nn.Module):
    """Layers in layer space; BatchNorm is left out, as it sees the images of one process only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.grouped = nn.Conv2d(7, 7, 3, stride=2, groups=7, bias=False)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.tanh(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


IMAGES = torch.randn(16, 3, 9, 8, generator=seeded(1), dtype=torch.float64)
TOKENS = torch.randint(0, 11, (16, 5), generator=seeded(2))
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "chain, auto": (Convolutions, IMAGES, {}),
    "chain, on activations": (Convolutions, IMAGES, {"form": "chain"}),
    "branches": (Convolutions, IMAGES, {"recipe": OREPA(), "select": "stem"}),
    "weight space": (Language, TOKENS, {}),
}
WRAPPERS = ("ddp", "ddp, accumulated", "fsdp", "fsdp, accumulated", "fsdp, as one unit")


def built(case: str) -> tuple[nn.Module, Tensor]:
    make, batch, options = CASES[case]
    torch.manual_seed(3)
    return expand(make().double(), **options).train(), batch


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, 0.1, on="effective"), lr=1e-2)


def loss_of(network: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = network(x).square().mean()
    return loss


def alone(case: str, steps: int = STEPS) -> tuple[nn.Module, list[float], dict[str, Tensor]]:
    """The plain loop in one process; the losses, and the gradients of the first step."""
    model, batch = built(case)
    losses, gradients, optimizer = [], {}, optimizer_of(model)
    for step in range(steps):
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return model, losses, gradients


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def together(rank: int, case: str, wrapper: str) -> dict[str, Any]:
    """The same in this process of several."""
    model, batch = built(case)
    world = dist.get_world_size()
    group = Processes(rank, world, torch.device("cpu"))
    network: Any
    sharded, accumulated = wrapper.startswith("fsdp"), wrapper.endswith("accumulated")
    as_one_unit = wrapper == "fsdp, as one unit"
    network = fully_shard(model) if as_one_unit else wrapped(model, group, shard=sharded)
    if sharded:
        units = [m for m in model.modules() if isinstance(m, Expanded) and hasattr(m, "reshard")]
        assert bool(units) == (not as_one_unit and case != "weight space")
    optimizer = optimizer_of(model)
    losses, gradients = [], {}
    parts = batch[rank::world].chunk(MICRO if accumulated else 1)
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        with accumulate(network, MICRO) if accumulated and not sharded else nullcontext():
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                if sharded:
                    network.set_requires_gradient_sync(last)
                with nullcontext() if last or sharded else network.no_sync():
                    loss = loss_of(network, part) / len(parts)
                    loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        losses.append(float(group.sum(total)) / world)
        if step == 0:
            named = model.named_parameters()
            gradients = {n: whole(p.grad).clone() for n, p in named if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients, "state": checkpoint.whole_state(model)}


def every_case(rank: int, file: Path) -> None:
    found = {f"{case}/{wrapper}": together(rank, case, wrapper) for case in CASES for wrapper in WRAPPERS}
    if rank == 0:
        torch.save(found, file)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two processes found, by case and wrapper."""
    file = tmp_path_factory.mktemp("two") / "found.pt"
    ranks(2, every_case, file)
    return dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_folds_are_those_of_one_process(
    case: str, two: dict[str, dict[str, Any]]
) -> None:
    model, losses, gradients = alone(case)
    folded = fused_state_dict(model)
    assert losses[0] > losses[-1]
    for wrapper in WRAPPERS:
        found = two[f"{case}/{wrapper}"]
        assert_same(torch.tensor(found["losses"]), torch.tensor(losses), rel=1e-6)
        assert max(abs(a - b) / b for a, b in zip(found["losses"], losses, strict=True)) < 1e-11, wrapper
        assert found["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_same(found["gradients"][name], gradient, rel=1e-9)
        twin, _ = built(case)
        twin.load_state_dict(found["state"])
        ours = fuse(twin, scope="expanded").state_dict()
        assert ours.keys() == folded.keys()
        for name, weight in folded.items():
            assert_same(ours[name], weight, rel=1e-6)
    start, _ = built(case)
    name = next(name for name, weight in folded.items() if weight.ndim > 1)
    assert_different(folded[name], fused_state_dict(start)[name], rel=1e-3)


RESUMED = ("chain, auto", "weight space")


def trained_on(rank: int, folder: Path, steps: int, saves: bool) -> None:
    """Resume each case from its checkpoint, if it has one; train; save it, or what one process can read."""
    world = dist.get_world_size()
    for case in RESUMED:
        model, batch = built(case)
        network = wrapped(model, Processes(rank, world, torch.device("cpu")), shard=world > 1)
        optimizer = optimizer_of(model)
        newest = checkpoint.latest(folder / case)
        if newest is not None:
            tensors = checkpoint.states(model, optimizer)
            assert checkpoint.load(newest, tensors) == set(tensors)
            checkpoint.restore(tensors, model, optimizer)
        for _ in range(steps):
            loss_of(network, batch[rank::world]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        if saves:
            checkpoint.save(folder / case, steps, checkpoint.states(model, optimizer), {})
        state = checkpoint.whole_state(model)
        if rank == 0:
            torch.save(state, folder / f"{case} {world}.pt")


def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_four(tmp_path: Path) -> None:
    ranks(2, trained_on, tmp_path, 2, True)
    for world in (1, 4):
        ranks(world, trained_on, tmp_path, 3, False)
    for case in RESUMED:
        [path] = (tmp_path / case).iterdir()
        shards = sorted(file.name.split("-")[1] for file in path.glob("*.safetensors"))
        assert shards == ["00001", "00002"]  # each wrote its own
        expected = fused_state_dict(alone(case, steps=5)[0])
        for world in (1, 4):
            model, _ = built(case)
            model.load_state_dict(torch.load(tmp_path / f"{case} {world}.pt", weights_only=True))
            ours = fused_state_dict(model)
            for name, weight in expected.items():
                assert_same(ours[name], weight, rel=1e-7)
        wrong = fused_state_dict(alone(case, steps=4)[0])
        assert max(float((wrong[n] - w).abs().max()) for n, w in expected.items()) > 1e-4


def averaged(model: nn.Module) -> AveragedModel:
    fn = get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=fn)


def average_of_shards(rank: int, file: Path) -> None:
    model, batch = built("chain, auto")
    average = averaged(model)
    group = Processes(rank, 2, torch.device("cpu"))
    network = wrapped(model, group, shard=True)
    wrapped(average.module, group, shard=True)
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        loss_of(network, batch[rank::2]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    state = checkpoint.whole_state(average.module)
    if rank == 0:
        torch.save(state, file)


def test_a_moving_average_of_shards_fuses(tmp_path: Path) -> None:
    ranks(2, average_of_shards, tmp_path / "a.pt")
    model, batch = built("chain, auto")
    average, optimizer = averaged(model), optimizer_of(model)
    for _ in range(STEPS):
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    twin, _ = built("chain, auto")
    twin.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    for name, weight in fused_state_dict(average.module).items():
        assert_same(fused_state_dict(twin)[name], weight, rel=1e-8)


def refusals(rank: int) -> None:
    model, batch = built("chain, auto")
    plain = copy.deepcopy(model)
    unused = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    with pytest.raises(FxExpandError, match="find_unused_parameters takes the factors"), accumulate(unused):
        pass
    in_pieces = copy.deepcopy(model)
    for module in reversed(list(in_pieces.modules())):
        if isinstance(module, nn.Conv2d):
            fully_shard(module)
    with pytest.raises(FxExpandError, match=r"FSDPExpandedConv2d: its factors are sharded one by one"):
        in_pieces(batch)
    fully_shard(model)
    for call in (expand, fuse, fused_state_dict, lambda m: expand(m, inplace=True)):
        with pytest.raises(FxExpandError, match=r"FSDPConvolutions: is sharded. Call expand before"):
            call(model)
    for _ in range(2):  # whole factors for the moment are as little use
        with pytest.raises(FxExpandError, match="is sharded, and a product"), accumulate(model):
            pass
        model.unshard()  # type: ignore[operator]
    loss_of(model, batch[rank::2]).backward()  # type: ignore[no-untyped-call]
    # On the meta device first, as large models begin.
    late = plain.to("meta")
    for module in late.modules():
        if isinstance(module, Expanded):
            fully_shard(module)
    late.to_empty(device="cpu")
    for module in late.modules():
        if isinstance(module, Expanded):
            module.reset_parameters()
    fully_shard(late)
    loss_of(late, batch[rank::2]).backward()  # type: ignore[no-untyped-call]
    factor: Any = late.stem.expansion[0].weight  # type: ignore[union-attr, index]
    value = factor.full_tensor()
    expected = value.clone()
    dist.broadcast(expected, 0)
    assert torch.equal(value, expected) and float(value.abs().sum()) > 0


def test_what_cannot_be_sharded_or_shared_says_so() -> None:
    ranks(2, refusals)
