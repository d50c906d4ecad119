"""Options that several commands have, and the networks, inputs, devices and recipes that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fxexpand.cli.output import working
from fxexpand.reporting.options import option

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fxexpand.recipes import Recipe
    from fxexpand.running.inputs import ExampleInputs

MODEL = "timm:NAME, torchvision:NAME, transformers:NAME or package.module:factory."
WEIGHTS = "Weights to load: safetensors, or a saved state dict."
INPUT = "An argument: 1,3,224,224 or 1,16:int64. Repeatable. Left out: what the library says."
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help=WEIGHTS)]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1...")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 if a layer is refused.")]


@dataclass(frozen=True)
class Source:
    """The network that a command reads: its name, the shapes of its inputs, its weights, and its device."""

    model: str = option(MISSING, MODEL, str, argument=True, metavar="MODEL")
    inputs: tuple[str, ...] = option((), INPUT, list[str], flag="--input", metavar="SHAPE")
    weights: Path | None = option(None, WEIGHTS, Path, metavar="FILE")

    @property
    def place(self) -> torch.device:
        """The device."""
        return device_of("cpu")

    def built(self, *, meta: bool = False) -> tuple[nn.Module, list[str]]:
        """A network that the file of weights fits, without them; and the lines of Python that build it.

        A head has as many outputs as the file says, and a layer has a bias if the file has one: folding the
        norms inside an expansion (RepVGG) leaves one.
        """
        import torch
        from torch import nn
        from torch.nn.modules.conv import _ConvNd

        from fxexpand.zoo import load_model

        model, (source, _, rest) = load_model(self.model, meta=meta), self.model.partition(":")
        lines = [f"model = fxexpand.zoo.load_model({self.model!r})"]
        shapes = {} if self.weights is None else _shapes(self.weights)
        classes = _classes_in(shapes, model)
        if classes is not None and give_classes(self.model, model, classes):
            call = {"timm": "timm.create_model", "torchvision": "torchvision.models.get_model"}[source]
            lines = [f"model = {call}({rest!r}, num_classes={classes})"]
        grown: dict[str, int] = {}
        for path, layer in model.named_modules():
            key = f"{path}.bias" if path else "bias"
            if isinstance(layer, nn.Linear | _ConvNd) and layer.bias is None and key in shapes:
                layer.bias = nn.Parameter(torch.zeros(shapes[key], device=layer.weight.device))
                grown[path] = shapes[key][0]
        if grown:
            lines.append(f"for name, size in {grown}.items():")
            lines.append("    model.get_submodule(name).bias = torch.nn.Parameter(torch.zeros(size))")
        return model, lines

    def filled(self, model: nn.Module) -> nn.Module:
        """The model with the weights of the file, on the device and in evaluation mode."""
        from fxexpand.zoo import load_weights

        place = self.place
        if self.weights is not None:
            load_weights(model, self.weights)
        return model.to(place).eval()

    def loaded(self) -> nn.Module:
        """The network with the weights of the file, on the device and in evaluation mode."""
        return self.filled(self.built()[0])

    def ready(self) -> tuple[nn.Module, ExampleInputs, list[str]]:
        """The network of ``loaded``, its ``required_inputs``, and the lines of Python that build it."""
        with working(f"{self.model}: building"):
            network, lines = self.built()
            return self.filled(network), self.required_inputs(network), lines

    def known_inputs(self, model: nn.Module) -> ExampleInputs | None:
        """The inputs of ``--input``, or else those that the model's library gives; the model takes them.

        Raises: SelectionError: the model does not take them.
        """
        from fxexpand.running.inputs import move
        from fxexpand.zoo import default_inputs, example_input, require_accepts

        given: ExampleInputs | None = tuple(example_input(shape, self.place) for shape in self.inputs)
        if not given:
            found = default_inputs(self.model, model)
            given = None if found is None else move(found, self.place)
        if given is not None:
            require_accepts(model, given)
        return given

    def required_inputs(self, model: nn.Module) -> ExampleInputs:
        """The inputs of ``known_inputs``.

        Raises: SelectionError: there are none, or the model does not take them.
        """
        from fxexpand.errors import SelectionError

        given = self.known_inputs(model)
        if given is None:
            raise SelectionError(
                f"{self.model}: what does it take? Give --input, for example --input 1,3,224,224."
            )
        return given


@dataclass(frozen=True)
class PlacedSource(Source):
    """The same on a device of choice."""

    device: str = option("cpu", "cpu, cuda, cuda:1...", metavar="DEVICE")

    @property
    def place(self) -> torch.device:
        """The device.

        Raises: SelectionError: there is no such device.
        """
        return device_of(self.device)


def give_classes(name: str, model: nn.Module, classes: int) -> bool:
    """Give a model of timm or torchvision a head of ``classes`` outputs; whether the head has changed."""
    from torch import nn

    from fxexpand.zoo import load_model

    library: Any = model
    if name.startswith("timm:") and getattr(model, "num_classes", classes) != classes:
        library.reset_classifier(classes)
        return True
    if not name.startswith("torchvision:"):
        return False
    changed = False
    for path, published in load_model(name, meta=True).named_modules():  # with the heads of side branches
        old = model.get_submodule(path)
        new: nn.Linear | nn.Conv2d | None = None
        if isinstance(old, nn.Linear) and getattr(published, "out_features", 0) == 1000:
            new = nn.Linear(old.in_features, classes) if old.out_features != classes else None
        elif isinstance(old, nn.Conv2d) and getattr(published, "out_channels", 0) == 1000:  # SqueezeNet
            new = nn.Conv2d(old.in_channels, classes, 1) if old.out_channels != classes else None
        if new is not None:
            model.set_submodule(path, new.to(next(old.parameters()).device))
            changed = True
    return changed


def _classes_in(shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> int | None:
    """The number of outputs of the head in a file, where only the head differs from the model."""
    state = model.state_dict()
    found = {
        shape[0]
        for name, shape in shapes.items()
        if shape and name in state and shape != state[name].shape and shape[1:] == state[name].shape[1:]
    }
    return found.pop() if len(found) == 1 else None


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors by name; none if the file cannot be read, which ``load_weights`` explains."""
    import torch
    from safetensors import safe_open

    try:
        if weights.suffix == ".safetensors":
            with safe_open(weights, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        state = torch.load(weights, map_location="meta", weights_only=True)
        return {name: tuple(value.shape) for name, value in state.items()}
    except Exception:
        return {}


def device_of(name: str) -> torch.device:
    """The device of that name, tried with one tensor.

    Raises: SelectionError: there is no such device, or it does not work.
    """
    import torch

    from fxexpand.errors import SelectionError

    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SelectionError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def recipe_of(text: str) -> Recipe:
    """The recipe that ``RepVGG`` or ``Chain(depth=2, width=1.5)`` names; nothing in it is evaluated.

    Raises: SelectionError: no such recipe or option; the message names the closest.
    """
    import ast
    import dataclasses

    from fxexpand import recipes
    from fxexpand.errors import SelectionError, closest

    known = {
        name: kind
        for name, kind in vars(recipes).items()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }
    try:
        call = ast.parse(text.strip() if "(" in text else f"{text.strip()}()", mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise SelectionError(f"recipe {text!r}: write Chain(depth=2, width=1.5), or a name alone.") from error
    if call.func.id not in known:
        raise SelectionError(
            f"recipe {text!r}: choose from {', '.join(known)}.{closest(call.func.id, known)}"
        )
    kind = known[call.func.id]
    fields = [field.name for field in dataclasses.fields(kind)]
    if unknown := next((name for name in options if name not in fields), ""):
        raise SelectionError(
            f"recipe {text!r}: {call.func.id} has no {unknown!r}; it has {', '.join(fields) or 'no options'}."
        )
    return cast("Recipe", kind(**options))
