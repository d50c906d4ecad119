"""The training run of ``fxexpand train``: on torch's own engine, and resumed exactly after any end."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.layers.accumulation import accumulate
from fxexpand.layers.param_groups import param_groups
from fxexpand.lowrank import rank_report
from fxexpand.recipes import Recipe
from fxexpand.reporting.files import write_whole
from fxexpand.running.evaluation import evaluating
from fxexpand.running.outputs import worst_error
from fxexpand.surgery.expand import expand
from fxexpand.surgery.fuse import fuse
from fxexpand.surgery.transaction import report
from fxexpand.training import checkpoint
from fxexpand.training.data import Data, Order, loader
from fxexpand.training.distributed import Processes, processes, wrapped
from fxexpand.training.options import Settings, require_same
from fxexpand.training.runs import CHECKPOINTS, WEIGHTS, Epoch, Outcome, write_log

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Watch:
    """Told of a run's progress; this one does nothing."""

    def begin(self, step: int, steps: int) -> None:
        """Before the first step: how many are done already, and how many there are."""

    def step(self) -> None:
        """After every step."""

    def epoch(self, epoch: Epoch) -> None:
        """After every epoch, with its line of the log."""


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe | None,
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> Outcome:
    """Expand ``model``, train it as a classifier, and write what ``fuse`` makes of it.

    In ``folder``: ``checkpoints/``, the newest one; ``log.jsonl``, a line per epoch; at the end
    ``model.safetensors``, the fused weights under the original names, of the moving average if there is one.
    Each appears whole or not at all.

    Started by ``torchrun``, all processes train together; each must call it with equal arguments. Then the
    images of a step, and with them its gradients, are those of one process, up to rounding. (BatchNorm sees
    the share of one process only.)

    Args:
        model: as it will be deployed; changed in place.
        recipe: what each layer becomes; None trains the model as it is.
        resume: go on from the newest checkpoint, if there is one: with the same weights, bit by bit, on a CPU
            and the same number of processes, as if the run had not ended.
        watch: told of every step, in the first process.

    Raises:
        SelectionError: a setting out of range; outputs that do not fit the classes; a folder that holds a
            run, without ``resume``, or one with other settings or data.
        FxExpandError: the loss is NaN or Inf.
        OSError: a file cannot be written.
    """
    with processes(torch.device(device)) as group:
        return _Run(model, data, recipe, settings, folder, group).carried_out(resume, watch or Watch())


class _Run:
    """A run under way."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe | None,
        settings: Settings,
        folder: Path,
        group: Processes,
    ) -> None:
        self.data, self.settings, self.folder, self.group = data, settings, folder, group
        self.order = Order(
            data.sizes[0],
            settings.batch_size,
            settings.seed,
            group.rank,
            group.world,
            settings.accumulate,
        )
        self.left: tuple[str, ...] = ()
        self.expanded = recipe is not None
        if recipe is not None:
            generator = torch.Generator().manual_seed(settings.seed)
            options: Any = {"init": settings.init, "form": settings.form, "generator": generator}
            expand(model, recipe, select=list(settings.select) or None, inplace=True, **options)
            found = report(model)
            self.left = tuple(row.message for row in found.refusals)
            if not found.changed:
                raise FxExpandError(f"{settings.model}: {recipe} expands no layer. {' '.join(self.left[:1])}")
        self.model = model.to(group.device)
        # No process has all weights of a sharded model: where they are needed, they are gathered here.
        self.whole = copy.deepcopy(model).cpu() if settings.fsdp and group.first else None
        self.average = _averaged(model, settings.ema) if settings.ema else None
        network = wrapped(model, group, shard=settings.fsdp)
        if self.average is not None and settings.fsdp:
            wrapped(self.average.module, group, shard=True)
        self.network: Any = torch.compile(network) if settings.compile else network
        groups = param_groups(model, settings.weight_decay, on=settings.decay_on)
        if not groups:
            raise SelectionError(f"{settings.model}: no parameter requires gradients. Nothing would train.")
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, settings.lr, momentum=0.9, nesterov=True)
            if settings.optimizer == "sgd"
            else torch.optim.AdamW(groups, settings.lr)
        )
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=settings.amp == "fp16")
        self.step = 0
        self.total = torch.zeros((), dtype=torch.float64, device=group.device)  # of losses in this epoch
        self.seconds = 0.0
        self.epochs: list[Epoch] = []
        self.full_ranks: dict[str, int] = {}
        # The same weights everywhere, then random numbers of its own for each process.
        torch.manual_seed(settings.seed + group.rank)

    def carried_out(self, resume: bool, watch: Watch) -> Outcome:
        """The whole of it."""
        steps, settings = self.order.steps, self.settings
        if not resume:
            self._require_new()
        resumed = self._resume() if resume else None
        if not self.epochs:
            self._close_epoch(0, watch)
        if self.group.first:
            watch.begin(self.step, settings.epochs * steps)
        for epoch in range(self.step // steps, settings.epochs):
            self._epoch(epoch, watch)
        error, fused = self._write_fused()
        return Outcome(
            folder=self.folder,
            settings=settings,
            sizes=self.data.sizes,
            processes=self.group.world,
            device=str(self.group.device),
            steps=steps,
            epochs=tuple(self.epochs),
            full_ranks=self.full_ranks,
            parameters=(sum(p.numel() for p in self.model.parameters()), fused),
            fused_error=error,
            resumed=resumed,
            left=self.left,
        )

    def _epoch(self, epoch: int, watch: Watch) -> None:
        settings, steps = self.settings, self.order.steps
        begin = time.perf_counter()
        self.model.train()
        micro_batches = self._batches(self.data.train, self.order.epoch(epoch, self.step % steps), epoch)
        for _ in range(self.step % steps, steps):
            self._one_step([*islice(micro_batches, settings.accumulate)])
            self.step += 1
            if self.group.first:
                watch.step()
            if self.step % settings.save_every == 0 and self.step % steps:
                self.seconds += time.perf_counter() - begin
                begin = time.perf_counter()
                self._save()
        self.seconds += time.perf_counter() - begin
        self._close_epoch(epoch + 1, watch)

    def _one_step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        settings, count = self.settings, len(micro_batches)
        rate = settings.rate(self.step, self.order.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        shares = count > 1 and not settings.fsdp
        with accumulate(self.network, count) if shares else nullcontext():
            for i, (images, labels) in enumerate(micro_batches):
                with self._reducing(last=i == count - 1):
                    with self._autocast():
                        logits = self.network(images)
                        self._require_classes(logits, labels)
                        loss = cross_entropy(logits, labels) / count
                    self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                self.total += loss.detach()
        if settings.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _reducing(self, last: bool) -> AbstractContextManager[Any]:
        """Add the gradients of all processes up after the last micro-batch only."""
        if self.settings.fsdp:
            self.network.set_requires_gradient_sync(last)
        elif self.group.world > 1 and not last:
            no_sync: AbstractContextManager[Any] = self.network.no_sync()
            return no_sync
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISION.get(self.settings.amp)
        return torch.autocast(self.group.device.type, dtype=dtype, enabled=dtype is not None)

    def _batches(
        self, dataset: Any, order: Iterator[list[int]], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device, settings = self.group.device, self.settings
        found = loader(
            dataset,
            order,
            seed=settings.seed,
            epoch=epoch,
            workers=settings.workers,
            pinned=device.type == "cuda",
        )
        for images, labels in found:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _close_epoch(self, epoch: int, watch: Watch) -> None:
        """Measure, note it in the log, and save."""
        settings, begin = self.settings, time.perf_counter()
        # The loss is the mean over processes: each has the mean over its share of every batch.
        loss = float(self.group.sum(self.total)) / self.group.world / self.order.steps
        self.total.zero_()
        if not math.isfinite(loss):
            raise FxExpandError(f"training: the loss is {loss} in epoch {epoch}. Lower --lr {settings.lr:g}.")
        self.group.agree(self.model)
        test_loss, accuracy = self._evaluated(self.model)
        averaged = self._evaluated(self.average.module)[1] if self.average is not None and epoch else None
        measured = epoch in (0, settings.epochs) or (settings.rank_every and epoch % settings.rank_every == 0)
        ranks = self._ranks() if measured else {}
        self.seconds += time.perf_counter() - begin
        line = Epoch(
            epoch=epoch,
            step=self.step,
            loss=loss if epoch else None,
            test_loss=test_loss,
            accuracy=accuracy,
            ema_accuracy=averaged,
            lr=self.optimizer.param_groups[0]["lr"] if epoch else None,
            ranks=ranks,
            seconds=self.seconds,
        )
        self.seconds = 0.0
        self.epochs.append(line)
        if self.group.first:
            if epoch:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_log(self.folder, self.epochs)
            watch.epoch(line)
        if epoch:
            self._save()

    def _evaluated(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss and accuracy in per cent on the test images, each process having its share."""
        group, count = self.group, self.data.sizes[1]
        size = max(1, self.settings.batch_size // (group.world * self.settings.accumulate))
        # Every process takes part in as many batches: a sharded model waits for all of them.
        places = range(group.rank, -(-count // group.world) * group.world, group.world)
        parts = [list(places[i : i + size]) for i in range(0, len(places), size)]
        sums = torch.zeros(2, dtype=torch.float64, device=group.device)
        with evaluating(model):
            batches = self._batches(self.data.test, iter([[p % count for p in part] for part in parts]), 0)
            for part, (images, labels) in zip(parts, batches, strict=True):
                with self._autocast():
                    logits = model(images)
                if part is parts[0]:
                    self._require_classes(logits, labels)
                counts = torch.tensor([p < count for p in part], device=group.device)
                losses = cross_entropy(logits.float(), labels, reduction="none")
                sums[0] += losses[counts].sum()
                sums[1] += (logits.argmax(-1) == labels)[counts].sum()
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]
        loss, right = group.sum(sums).tolist()
        return loss / count, 100.0 * right / count

    def _require_classes(self, logits: object, labels: Tensor) -> None:
        classes = self.data.classes
        if not isinstance(logits, Tensor) or logits.shape != (len(labels), classes):
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            mode = " in training mode" if self.model.training else ""
            raise SelectionError(
                f"{self.settings.model}: gives {given} for {len(labels)} images{mode}; {self.data.name} has "
                f"{classes} classes, so ({len(labels)}, {classes}) is needed."
            )

    def _gathered(self, model: nn.Module) -> nn.Module | None:
        """The network with all its weights, in the first process; None in the others."""
        if not self.settings.fsdp:
            return model if self.group.first else None
        state = checkpoint.whole_state(model)
        if self.whole is not None:
            self.whole.load_state_dict(state)
        return self.whole

    def _ranks(self) -> dict[str, float]:
        whole = self._gathered(self.model)
        if whole is None:
            return {}
        with evaluating(whole):
            rows = {row.name.removesuffix(".weight"): row for row in rank_report(whole).rows}
        self.full_ranks = {name: row.full_rank for name, row in rows.items()}
        return {name: row.effective_rank for name, row in rows.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that goes on from one step to the next."""
        found = checkpoint.states(self.model, self.optimizer)
        if self.average is not None:
            inner = checkpoint.states(self.average.module)
            found.update({f"average.{name}": value for name, value in inner.items()})
            found["average.count"] = self.average.n_averaged
        device, place = self.group.device, f"random.{self.group.world}.{self.group.rank}"
        found[f"{place}.cpu"] = torch.get_rng_state()
        if device.type == "cuda":
            found[f"{place}.cuda"] = torch.cuda.get_rng_state(device)
        return found

    def _save(self) -> None:
        self.group.agree(self.model)
        if self.average is not None:
            self.group.agree(self.average)
        values = {
            "settings": asdict(self.settings),
            "sizes": list(self.data.sizes),
            "step": self.step,
            "total": float(self.group.sum(self.total.clone())) / self.group.world,
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "full_ranks": self.full_ranks,
        }
        checkpoint.save(self.folder / CHECKPOINTS, self.step, self._tensors(), values)

    def _require_new(self) -> None:
        if checkpoint.latest(self.folder / CHECKPOINTS) is not None:
            raise SelectionError(
                f"{self.folder}: holds a run already. Go on with --resume, or name another folder with --out."
            )

    def _resume(self) -> int | None:
        newest = checkpoint.latest(self.folder / CHECKPOINTS)
        if newest is None:
            return None
        values = checkpoint.values_of(newest)
        require_same(self.folder, self.settings, values["settings"])
        sizes = list(self.data.sizes)
        if values.get("sizes", sizes) != sizes:  # a step would belong to another epoch, of other images
            raise SelectionError(
                f"{self.folder}: was trained on {values['sizes'][0]} images and tested on "
                f"{values['sizes'][1]}, not {sizes[0]} and {sizes[1]}. Resume it with the same data."
            )
        tensors = self._tensors()
        read = checkpoint.load(newest, tensors, optional=("random.", "optimizer."))
        states = {n: t for n, t in tensors.items() if n.startswith(("model.", "optimizer."))}
        checkpoint.restore(states, self.model, self.optimizer)
        if self.average is not None:
            inner = {
                n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.model.")
            }
            checkpoint.restore(inner, self.average.module)
        self.scaler.load_state_dict(values["scaler"])
        self.step, self.seconds = values["step"], values["seconds"]
        self.total.fill_(values["total"] * self.group.world if self.group.first else 0.0)
        self.epochs = [Epoch(**epoch) for epoch in values["epochs"]]
        self.full_ranks = values["full_ranks"]
        place = f"random.{self.group.world}.{self.group.rank}"
        if f"{place}.cpu" in read:
            torch.set_rng_state(tensors[f"{place}.cpu"])
        else:  # the number of processes has changed
            torch.manual_seed(self.settings.seed + self.group.rank + self.step)
        if f"{place}.cuda" in read:
            torch.cuda.set_rng_state(tensors[f"{place}.cuda"], self.group.device)
        return self.step

    def _write_fused(self) -> tuple[float, int]:
        """Write the fused weights; how far its logits are from the trained network's, and its parameters."""
        source = self._gathered(self.model if self.average is None else self.average.module)
        if source is None:
            return 0.0, 0
        from safetensors.torch import save

        fused = fuse(source, scope="expanded") if self.expanded else source
        device = next(fused.parameters()).device
        count = min(self.data.sizes[1], self.settings.batch_size)
        images, _ = next(loader(self.data.test, [list(range(count))]))
        with evaluating(source, fused):
            error = worst_error([source(images.to(device))], [fused(images.to(device))])
        state = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in fused.state_dict().items()
        }
        write_whole(self.folder / WEIGHTS, save(state))
        return error, sum(p.numel() for p in fused.parameters())


def _averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the parameters and of the running statistics; the first average is the model."""
    average: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def apart(averages: Any, values: Any, count: Any) -> None:
        # torch's fused update refuses a list in which some tensors are sharded, and some, the buffers, not.
        for sharded in (False, True):
            pairs = [p for p in zip(averages, values, strict=True) if hasattr(p[0], "device_mesh") == sharded]
            if pairs:
                average(*map(list, zip(*pairs, strict=True)), count)

    return _Average(model, multi_avg_fn=apart, use_buffers=True)


class _Average(AveragedModel):
    """What is no statistic is copied: numbers of places, of which torch would round each average down, again
    at every step, and masks with infinities, whose difference is NaN.
    """

    def update_parameters(self, model: nn.Module) -> None:
        if not hasattr(self, "copied"):
            named = dict(model.named_buffers())
            self.copied = [n for n, b in named.items() if not b.is_floating_point() or bool(b.isinf().any())]
        super().update_parameters(model)
        for name in self.copied:
            self.module.get_buffer(name).copy_(model.get_buffer(name))
