"""``fxexpand train``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxexpand.cli.files import require_folder
from fxexpand.cli.options import Device, Json, Weights
from fxexpand.cli.output import note, show, stdout_kept
from fxexpand.training.options import Settings

if TYPE_CHECKING:
    from torch import nn

    from fxexpand.training.data import Data
    from fxexpand.training.train import Watch


def train(
    settings: Settings,
    root: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where CIFAR, or train/<class>/ and val/<class>/, are."),
    ] = None,
    weights: Weights = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the run is written.")] = Path(
        "runs/train"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model, expanded, and save the fused weights.

    On several devices: torchrun --nproc-per-node N -m fxexpand train ...
    """
    with stdout_kept():
        from fxexpand.cli.options import device_of, recipe_of
        from fxexpand.errors import SelectionError
        from fxexpand.training import train as job

        recipe = None if settings.recipe.lower() == "none" else recipe_of(settings.recipe)
        settings = replace(settings, recipe="none" if recipe is None else str(recipe))
        require_folder(out)  # an error comes now, not after an epoch
        if settings.fsdp and "WORLD_SIZE" not in os.environ:
            raise SelectionError(
                "--fsdp shards over processes: start them with torchrun -m fxexpand train ..."
            )
        place = device_of(device)
        images = _data(settings.data, root)
        model = _network(settings.model, weights, images, settings.seed)
        with _watching(settings.epochs) as watch:
            found = job.train(model, images, recipe, settings, out, resume=resume, device=place, watch=watch)
    if os.environ.get("RANK", "0") != "0":
        return
    show(str(found), as_json, found.to_dict())


def _data(name: str, root: Path | None) -> Data:
    from fxexpand.errors import SelectionError, closest
    from fxexpand.training.data import cifar, digits, image_folders

    known = ("digits", "cifar10", "cifar100", "imagenet")
    if name not in known:
        hint = f" Images in folders are --data imagenet --root {name}." if Path(name).is_dir() else ""
        raise SelectionError(
            f"--data {name!r}: choose from {', '.join(known)}.{hint or closest(name, known)}"
        )
    if name == "digits":
        return digits(train_size=1200)
    if root is None:
        raise SelectionError(f"--data {name}: nothing is downloaded. Say where it is with --root FOLDER.")
    if name == "imagenet":
        return image_folders(root)
    return cifar(root, 10 if name == "cifar10" else 100)


def _network(name: str, weights: Path | None, data: Data, seed: int) -> nn.Module:
    """The model; if its library can, with as many outputs as there are classes."""
    import torch

    from fxexpand.cli.options import Source, give_classes
    from fxexpand.errors import SelectionError
    from fxexpand.zoo import load_weights, require_accepts

    torch.manual_seed(seed)
    model, _ = Source(name, weights=weights).built()
    if weights is not None:
        load_weights(model, weights)
    if give_classes(name, model, data.classes) and weights is not None:
        note(f"{weights}: has other classes than the {data.classes} of {data.name}; the head is new")
    image = data.test[0][0].unsqueeze(0)
    try:
        require_accepts(model, (image,))
    except SelectionError as error:
        raise SelectionError(f"{name} on {data.name}: {error}") from error
    return model


@contextlib.contextmanager
def _watching(epochs: int) -> Iterator[Watch]:
    """A bar on a terminal, a line per epoch elsewhere; on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    from fxexpand.reporting.progress import bars
    from fxexpand.training.train import Watch

    columns = ("{task.description}", BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with bars(None, *columns) as bar:
        task = bar.add_task("measuring", total=None)

        class Shown(Watch):
            def begin(self, step: int, steps: int) -> None:
                bar.update(task, total=steps, completed=step, description="training")

            def step(self) -> None:
                bar.advance(task)

            def epoch(self, epoch: Any) -> None:
                if bar.disable:
                    note(str(epoch))
                elif epoch.loss is not None:
                    text = f"epoch {epoch.epoch}/{epochs}: loss {epoch.loss:.3f}, {epoch.accuracy:.1f} %"
                    bar.update(task, description=text)

        yield Shown()
