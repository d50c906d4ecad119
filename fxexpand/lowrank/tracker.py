"""Spectra of a model's weights over training, in bounded memory, from any training loop."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.errors import FxExpandError, SelectionError, UnusableWeightError
from fxexpand.lowrank.measures import scaled_spectrum, summary_of
from fxexpand.lowrank.model_ranks import layer_weights
from fxexpand.lowrank.rank_plots import plot_ranks, plot_spectra
from fxexpand.reporting.files import write_whole
from fxexpand.running.evaluation import evaluating

SHOWN = 6  # number of recorded steps in the plot of spectra


@dataclass(frozen=True)
class LayerSpectrum:
    """A weight at one step: its ranks, and singular values over the largest at ``indices`` (from 1)."""

    effective_rank: float
    entropy: float
    stable_rank: float
    indices: tuple[int, ...]
    values: tuple[float, ...]


class RankTracker:
    """Records the spectra of weights every ``every`` steps; call it once after each optimiser step.

    ``tracker = RankTracker(model, every=100)``, then ``tracker()`` in the loop, ``trainer.add_callback(
    tracker.transformers_callback())`` or ``Trainer(callbacks=[tracker.lightning_callback()])``.

    Memory stays below ``max_records * layers * max_values`` numbers: when the records are full, every second
    one is dropped and ``every`` doubles. A weight with more singular values than ``max_values`` keeps those
    at evenly spread indices, the first and the last among them; its ranks are computed from all. The model
    does not change: gradients, modes and random state stay as they are.

    Args:
        model: plain, expanded or parametrized; weights are named and read as by ``rank_report``.
        every: steps between records.
        select: a predicate on the name of the weight; all weights by default.
        max_records: two or more.
        max_values: two or more.

    Raises: SelectionError: an option out of range, or no weight to record.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        select: Callable[[str], bool] = bool,
        max_records: int = 200,
        max_values: int = 64,
    ) -> None:
        for option, value, least in (
            ("every", every, 1),
            ("max_records", max_records, 2),
            ("max_values", max_values, 2),
        ):
            if value < least:
                raise SelectionError(f"RankTracker({option}={value}): choose {least} or more.")
        self.model, self.every = model, every
        self.select, self.max_records, self.max_values = select, max_records, max_values
        self.step = 0
        self.records: list[tuple[int, dict[str, LayerSpectrum]]] = []
        self.record()
        if not self.records[0][1]:
            raise SelectionError("RankTracker: the model has no selected weight.")

    def __call__(self, step: int | None = None) -> None:
        """Count one training step, or set their number to ``step``; records after ``every`` steps."""
        self.step = self.step + 1 if step is None else step
        if self.step - self.records[-1][0] >= self.every:
            self.record()

    def record(self) -> None:
        """Record now, unless this step is recorded already.

        Raises:
            UnusableWeightError: a weight holds NaN or Inf; the message names the weight and the step.
            SelectionError: a weight that was recorded is no longer in the model.
        """
        if self.records and self.records[-1][0] == self.step:
            return
        found: dict[str, LayerSpectrum] = {}
        with evaluating(self.model):
            for name, kind, weight, groups in layer_weights(self.model):
                if self.select(name):
                    try:
                        found[name] = self._spectrum(weight, groups)
                    except UnusableWeightError as error:
                        raise UnusableWeightError(f"step {self.step}: {name} ({kind}): {error}") from None
        gone = [name for name in self.records[0][1] if name not in found] if self.records else []
        if gone:
            raise SelectionError(
                f"RankTracker: step {self.step}: {gone[0]} is no longer in the model. "
                "Make a new tracker when layers are taken out."
            )
        self.records.append((self.step, found))
        # Every second one of an odd number includes the last: the weights at the end of training.
        if len(self.records) > self.max_records - self.max_records % 2:
            self.records = self.records[::2]
            self.every *= 2

    def ranks(self) -> dict[str, list[float]]:
        """The effective ranks by weight, one per record."""
        return {
            name: [record[name].effective_rank for _, record in self.records] for name in self.records[0][1]
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        ranks = self.ranks()
        return {
            "steps": [step for step, _ in self.records],
            "weights": {
                name: {
                    "indices": list(first.indices),
                    "effective_rank": ranks[name],
                    "entropy": [record[name].entropy for _, record in self.records],
                    "stable_rank": [record[name].stable_rank for _, record in self.records],
                    "spectra": [
                        [round(value, 6) for value in record[name].values] for _, record in self.records
                    ],
                }
                for name, first in self.records[0][1].items()
            },
        }

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``ranks.json``, ``ranks.svg`` and ``spectra.svg`` in ``folder``, which is made if need be.

        Raises: FxExpandError: matplotlib is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        steps = [step for step, _ in self.records]
        path = folder / "ranks.json"
        write_whole(path, json.dumps(self.to_dict()) + "\n")
        last = len(self.records) - 1
        shown = sorted({round(i * last / (SHOWN - 1)) for i in range(SHOWN)})
        spectra = {
            name: [
                (self.records[i][0], self.records[i][1][name].indices, self.records[i][1][name].values)
                for i in shown
            ]
            for name in self.records[0][1]
        }
        return [
            path,
            plot_ranks(steps, self.ranks(), folder / "ranks.svg"),
            plot_spectra(spectra, folder / "spectra.svg"),
        ]

    def transformers_callback(self, folder: str | Path | None = None) -> Any:
        """A callback for ``transformers.Trainer``; writes to ``folder`` when training ends.

        Raises: FxExpandError: transformers is not installed.
        """
        tracker = self

        class RankCallback(_installed("transformers").TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.is_world_process_zero:
                    tracker(state.global_step)

            def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.is_world_process_zero:
                    tracker._finish(folder)

        return RankCallback()

    def lightning_callback(self, folder: str | Path | None = None) -> Any:
        """A callback for Lightning's ``Trainer``; writes to ``folder`` when training ends.

        Raises: FxExpandError: neither lightning nor pytorch_lightning is installed.
        """
        tracker = self

        class RankCallback(_installed("lightning.pytorch", "pytorch_lightning").Callback):  # type: ignore[misc]
            def on_train_batch_end(self, trainer: Any, *rest: Any, **named: Any) -> None:
                if trainer.is_global_zero:
                    tracker(trainer.global_step)

            def on_train_end(self, trainer: Any, module: Any) -> None:
                if trainer.is_global_zero:
                    tracker._finish(folder)

        return RankCallback()

    def _finish(self, folder: str | Path | None) -> None:
        self.record()
        if folder is not None:
            self.write(folder)

    def _spectrum(self, weight: Tensor, groups: int) -> LayerSpectrum:
        spectrum = scaled_spectrum(weight, groups=groups)[0]
        count = len(spectrum)
        kept = min(count, self.max_values)
        places = [round(i * (count - 1) / max(kept - 1, 1)) for i in range(kept)]
        largest = spectrum[0].clamp(min=torch.finfo(spectrum.dtype).tiny)
        return LayerSpectrum(
            **summary_of(spectrum),
            indices=tuple(place + 1 for place in places),
            values=tuple((spectrum[places] / largest).tolist()),
        )


def _installed(*names: str) -> Any:
    """The first of these modules that is installed."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    library = names[0].partition(".")[0]
    raise FxExpandError(f"{library} is not installed. Run pip install {library}.")
