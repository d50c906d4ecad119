"""The training run of ``fxexpand train``: on torch's own engine, and resumed exactly after any end."""

from __future__ import annotations

import copy
import math
import reprlib
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.layers.param_groups import param_groups
from fxexpand.lowrank import rank_report
from fxexpand.recipes import Recipe
from fxexpand.reporting.files import write_whole
from fxexpand.reporting.rows import plain
from fxexpand.running.evaluation import evaluating
from fxexpand.running.outputs import worst_error
from fxexpand.surgery.expand import expand
from fxexpand.surgery.fuse import fuse
from fxexpand.surgery.transaction import report
from fxexpand.training import checkpoint
from fxexpand.training.average import Average
from fxexpand.training.data import Data, Order, loader
from fxexpand.training.distributed import Processes, processes, reducing, wrapped
from fxexpand.training.loop import Batch, Loop
from fxexpand.training.options import Settings, require_same
from fxexpand.training.runs import CHECKPOINTS, WEIGHTS, Epoch, Outcome, write_log
from fxexpand.training.state import State


class Watch:
    """Receives the progress of a run; this one ignores it."""

    def begin(self, step: int, steps: int) -> None:
        """Called before the first step, with the number of steps done already and of all."""

    def step(self) -> None:
        """Called after every step."""

    def epoch(self, epoch: Epoch) -> None:
        """Called after every epoch, with its line of the log."""


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
    """Expand ``model``, train it as a classifier, fuse it, and write the fused weights.

    In ``folder``: ``checkpoints/``, the newest one; ``log.jsonl``, a line per epoch; at the end
    ``model.safetensors``, the fused weights under the original names, of the moving average if there is one.
    Each appears whole or not at all.

    Started by ``torchrun``, all processes train together; each must call it with equal arguments. Then the
    images of a step, and with them its gradients, are those of one process, up to rounding. (BatchNorm sees
    the share of one process only.)

    Args:
        model: as it will be deployed; changed in place.
        recipe: of each layer; None trains the model as it is.
        resume: go on from the newest checkpoint, if there is one: with the same weights, bit by bit, on a CPU
            and the same number of processes, as if the run had not ended.
        watch: receives the progress, in the first process.

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
        shares = (group.rank, group.world, settings.accumulate)
        self.order = Order(data.sizes[0], settings.batch_size, settings.seed, *shares)
        self.expanded = recipe is not None
        self.left = _expanded(model, recipe, settings) if recipe is not None else ()
        self.model = model.to(group.device)
        # No process has all weights of a sharded model: where they are needed, they are gathered here.
        self.whole = copy.deepcopy(model).cpu() if settings.fsdp and group.first else None
        average = Average(model, settings.ema) if settings.ema else None
        network: Any = wrapped(model, group, shard=settings.fsdp)
        if average is not None and settings.fsdp:
            wrapped(average.module, group, shard=True)
        self.loop = Loop(
            model,
            _optimizer(model, settings),
            lambda step: settings.rate(step, self.order.steps),
            network=torch.compile(network) if settings.compile else network,
            average=average,
            amp=settings.amp,
            clip=settings.clip,
        )
        self.state = State(self.loop, group, settings.seed)
        # All processes have the same weights; each has its own random numbers from here on.
        torch.manual_seed(settings.seed + group.rank)

    def carried_out(self, resume: bool, watch: Watch) -> Outcome:
        """Train to the end, and write the fused weights."""
        steps, settings, state = self.order.steps, self.settings, self.state
        if not resume and checkpoint.latest(self.folder / CHECKPOINTS) is not None:
            raise SelectionError(
                f"{self.folder}: holds a run already. Go on with --resume, or name another folder with --out."
            )
        resumed = self._resume() if resume else None
        if not state.epochs:
            self._close_epoch(0, watch)
        if self.group.first:
            watch.begin(self.loop.step, settings.epochs * steps)
        for epoch in range(self.loop.step // steps, settings.epochs):
            self._epoch(epoch, watch)
        error, fused = self._write_fused()
        return Outcome(
            folder=self.folder,
            settings=settings,
            sizes=self.data.sizes,
            processes=self.group.world,
            device=str(self.group.device),
            steps=steps,
            epochs=tuple(state.epochs),
            full_ranks=state.full_ranks,
            parameters=(sum(p.numel() for p in self.model.parameters()), fused),
            fused_error=error,
            resumed=resumed,
            left=self.left,
        )

    def _epoch(self, epoch: int, watch: Watch) -> None:
        settings, state, start = self.settings, self.state, self.loop.step % self.order.steps
        begin = time.perf_counter()
        micro_batches = self._batches(self.data.train, self.order.epoch(epoch, start), epoch)
        batches = iter(lambda: [*islice(micro_batches, settings.accumulate)], [])
        reduced = partial(reducing, self.loop.network)
        for loss, _ in self.loop.steps(
            batches, reducing=reduced, check=self._require_classes, shares=not settings.fsdp
        ):
            state.total += loss
            if self.group.first:
                watch.step()
            if self.loop.step % settings.save_every == 0 and self.loop.step % self.order.steps:
                state.seconds += time.perf_counter() - begin
                begin = time.perf_counter()
                self._save()
        state.seconds += time.perf_counter() - begin
        self._close_epoch(epoch + 1, watch)

    def _batches(self, dataset: Any, order: Iterator[list[int]], epoch: int) -> Iterator[Batch]:
        device, settings = self.group.device, self.settings
        options: Any = {"workers": settings.workers, "pinned": device.type == "cuda"}
        for images, labels in loader(dataset, order, seed=settings.seed, epoch=epoch, **options):
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def _close_epoch(self, epoch: int, watch: Watch) -> None:
        """Measure, write a line of the log, and save."""
        settings, state, begin = self.settings, self.state, time.perf_counter()
        loss = state.mean_loss(self.order.steps)
        state.total.zero_()
        if not math.isfinite(loss):
            raise FxExpandError(f"training: the loss is {loss} in epoch {epoch}. Lower --lr {settings.lr:g}.")
        self.group.agree(self.model)
        test_loss, accuracy = self._evaluated(self.model)
        average = self.loop.average
        averaged = self._evaluated(average.module)[1] if average is not None and epoch else None
        measured = epoch in (0, settings.epochs) or (settings.rank_every and epoch % settings.rank_every == 0)
        ranks = self._ranks() if measured else {}
        state.seconds += time.perf_counter() - begin
        line = Epoch(
            epoch=epoch,
            step=self.loop.step,
            loss=loss if epoch else None,
            test_loss=test_loss,
            accuracy=accuracy,
            ema_accuracy=averaged,
            lr=self.loop.optimizer.param_groups[0]["lr"] if epoch else None,
            ranks=ranks,
            seconds=state.seconds,
        )
        state.seconds = 0.0
        state.epochs.append(line)
        if self.group.first:
            if epoch:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_log(self.folder, state.epochs)
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
                with self.loop.autocast():
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
        self.state.full_ranks = {name: row.full_rank for name, row in rows.items()}
        return {name: row.effective_rank for name, row in rows.items()}

    def _save(self) -> None:
        average = self.loop.average
        for model in (self.model, *([] if average is None else [average])):
            self.group.agree(model)
        checkpoint.save(self.folder / CHECKPOINTS, self.loop.step, *self._contents())

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the values of a checkpoint of the run as it is now."""
        state = {"settings": plain(self.settings), "sizes": plain(self.data.sizes), **self.state.state_dict()}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return tensors, {name: value for name, value in state.items() if name not in tensors}

    def _resume(self) -> int | None:
        newest = checkpoint.latest(self.folder / CHECKPOINTS)
        if newest is None:
            return None
        tensors, now = self._contents()
        then = {"sizes": now["sizes"], **checkpoint.values_of(newest)}
        if wrong := next((name for name in now if type(then.get(name)) is not type(now[name])), ""):
            found = reprlib.repr(then.get(wrong))
            raise SelectionError(f"{newest}: values.json is damaged: {wrong} is {found}. Restore the file.")
        require_same(self.folder, self.settings, then["settings"])
        if then["sizes"] != now["sizes"]:  # a step would belong to another epoch
            before, after = (map(repr, each["sizes"]) for each in (then, now))
            raise SelectionError(
                f"{self.folder}: was trained on {' images and tested on '.join(before)}, not "
                f"{' and '.join(after)}. Resume it with the same data."
            )
        read = checkpoint.load(newest, tensors, optional=("random.", "optimizer."))
        try:
            self.state.load_state_dict(then | {name: tensors[name] for name in read})
        except (AttributeError, KeyError, TypeError) as error:
            raise SelectionError(f"{newest}: values.json is damaged: {error!r}. Restore the file.") from error
        return self.loop.step

    def _write_fused(self) -> tuple[float, int]:
        """Write the fused weights; the error of the fused network's logits, and its number of parameters."""
        source = self._gathered(self.model if self.loop.average is None else self.loop.average.module)
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


def _expanded(model: nn.Module, recipe: Recipe, settings: Settings) -> tuple[str, ...]:
    """Expand the model in place; the refusals.

    Raises: FxExpandError: no layer is expanded.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    options: Any = {"init": settings.init, "form": settings.form, "generator": generator}
    expand(model, recipe, select=list(settings.select) or None, inplace=True, **options)
    found = report(model)
    left = tuple(row.message for row in found.refusals)
    if not found.changed:
        raise FxExpandError(f"{settings.model}: {recipe} expands no layer. {' '.join(left[:1])}")
    return left


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    groups = param_groups(model, settings.weight_decay, on=settings.decay_on)
    if not groups:
        raise SelectionError(f"{settings.model}: no parameter requires gradients. Nothing would train.")
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, settings.lr)
