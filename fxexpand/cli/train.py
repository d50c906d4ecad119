"""``fxexpand train``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fxexpand.cli.files import require_folder
from fxexpand.cli.options import DEFAULT_RECIPE, Device, Json, Select, Weights
from fxexpand.cli.output import note, show, show_json, stdout_kept

if TYPE_CHECKING:
    from torch import nn

    from fxexpand.training.data import Data
    from fxexpand.training.train import Watch

SMALL = "fxexpand.demo:Digits"
_Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME or package.module:factory."),
]
_Recipe = Annotated[
    str, typer.Option(metavar="RECIPE", help="What a layer becomes: RepVGG, Chain(depth=2)... or none.")
]


def train(
    model: _Model = SMALL,
    data: Annotated[
        str, typer.Option(help="digits, cifar10, cifar100, or imagenet: images in folders.")
    ] = "digits",
    root: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where CIFAR, or train/<class>/ and val/<class>/, are."),
    ] = None,
    recipe: _Recipe = DEFAULT_RECIPE,
    select: Select = None,
    init: Annotated[str, typer.Option(help="preserve, matched or kaiming.")] = "preserve",
    form: Annotated[str, typer.Option(help="auto, chain or collapsed.")] = "auto",
    weights: Weights = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 20,
    batch_size: Annotated[
        int, typer.Option(help="Images per step, over all processes and micro-batches.")
    ] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate; it falls to 0 along half a cosine.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Epochs in which the learning rate rises.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="sgd (Nesterov momentum of 0.9) or adamw.")] = "adamw",
    weight_decay: Annotated[float, typer.Option(help="Of weights; not of biases and norms.")] = 0.0,
    decay_on: Annotated[str, typer.Option(help="factors, or the effective weight.")] = "factors",
    clip: Annotated[float, typer.Option(help="Largest norm of the gradients; 0 for any.")] = 0.0,
    accumulate: Annotated[int, typer.Option(help="Micro-batches per step.")] = 1,
    amp: Annotated[str, typer.Option(help="Autocast: bf16, fp16 or off.")] = "off",
    ema: Annotated[float, typer.Option(help="Decay of a moving average of the weights; 0: none.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights, order and crops.")] = 0,
    device: Device = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the run is written.")] = Path(
        "runs/train"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints within an epoch.")] = 1000,
    rank_every: Annotated[int, typer.Option(help="Epochs between rank measurements; 0: ends only.")] = 1,
    compile: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Under torchrun: shard, not replicate.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model, expanded, and save the fused weights.

    On several devices: torchrun --nproc-per-node N -m fxexpand train ...
    """
    with stdout_kept():
        from fxexpand.cli.options import device_of, recipe_of
        from fxexpand.errors import SelectionError
        from fxexpand.training import train as job
        from fxexpand.training.runs import Settings

        chosen = None if recipe.lower() == "none" else recipe_of(recipe)
        settings = Settings(
            model=model,
            data=data,
            recipe="none" if chosen is None else str(chosen),
            select=tuple(select or ()),
            init=cast(Any, init),
            form=cast(Any, form),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            warmup=warmup,
            optimizer=cast(Any, optimizer),
            weight_decay=weight_decay,
            decay_on=cast(Any, decay_on),
            clip=clip,
            accumulate=accumulate,
            amp=cast(Any, amp),
            ema=ema,
            seed=seed,
            compile=compile,
            fsdp=fsdp,
            save_every=save_every,
            rank_every=rank_every,
            workers=workers,
        )
        require_folder(out)  # now, not after an epoch
        if fsdp and "WORLD_SIZE" not in os.environ:
            raise SelectionError(
                "--fsdp shards over processes: start them with torchrun -m fxexpand train ..."
            )
        place = device_of(device)
        images = _data(data, root)
        with _watching(settings.epochs) as watch:
            found = job.train(
                _network(model, weights, images, seed),
                images,
                chosen,
                settings,
                out,
                resume=resume,
                device=place,
                watch=watch,
            )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        show_json(found.to_dict())
    else:
        show(str(found))


def _data(name: str, root: Path | None) -> Data:
    from fxexpand.errors import SelectionError
    from fxexpand.reporting.closest import closest
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
    """The model, with as many outputs as there are classes where its library can give it these."""
    import torch

    from fxexpand.cli.options import built, give_classes
    from fxexpand.errors import SelectionError
    from fxexpand.zoo import load_weights, require_accepts

    torch.manual_seed(seed)
    model, _ = built(name, weights)
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
    from fxexpand.training.train import Watch

    class Lines(Watch):
        def epoch(self, epoch: Any) -> None:
            note(str(epoch))

    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=None)

        class Bar(Watch):
            def begin(self, step: int, steps: int) -> None:
                bar.update(task, total=steps, completed=step, description="training")

            def step(self) -> None:
                bar.advance(task)

            def epoch(self, epoch: Any) -> None:
                if epoch.loss is not None:
                    text = f"epoch {epoch.epoch}/{epochs}: loss {epoch.loss:.3f}, {epoch.accuracy:.1f} %"
                    bar.update(task, description=text)

        yield Bar()
