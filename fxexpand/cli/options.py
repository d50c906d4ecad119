"""The options that several commands have, and what their words stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fxexpand.inputs import ExampleInputs
    from fxexpand.recipes import Recipe

_MODEL = typer.Argument(
    metavar="MODEL", help="timm:NAME, torchvision:NAME, transformers:NAME or package.module:factory."
)
Model = Annotated[str, _MODEL]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Weights to load: safetensors, or a saved state dict."),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="An argument: 1,3,224,224 or 1,16:int64. Repeatable. Left out: what the library says.",
    ),
]
RecipeText = Annotated[
    str, typer.Option("--recipe", metavar="RECIPE", help="What a layer becomes: RepVGG, Chain(depth=2)...")
]
Select = Annotated[
    list[str] | None,
    typer.Option("--select", metavar="PATTERN", help="Only layers whose name matches. Repeatable."),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1...")]

DEFAULT_RECIPE = "Chain(depth=3, width=2)"


def loaded(name: str, weights: Path | None, device: torch.device | str = "cpu") -> nn.Module:
    """The model, with the weights of the file, on the device and in evaluation mode."""
    from fxexpand.zoo import load_model, load_weights

    model = load_model(name)
    if weights is not None:
        load_weights(model, weights)
    return model.to(device).eval()


def given_inputs(
    name: str, model: nn.Module, shapes: list[str] | None, device: torch.device | str = "cpu"
) -> ExampleInputs:
    """The inputs of ``--input``, or else those that the model's library gives; the model takes them.

    Raises: SelectionError: there are none, or the model does not take them.
    """
    from fxexpand.errors import SelectionError
    from fxexpand.inputs import move
    from fxexpand.zoo import default_inputs, example_input, require_accepts

    if shapes:
        given: ExampleInputs = tuple(example_input(shape, device) for shape in shapes)
    else:
        found = default_inputs(name, model)
        if found is None:
            raise SelectionError(f"{name}: what does it take? Give --input, for example --input 1,3,224,224.")
        given = move(found, device)
    require_accepts(model, given)
    return given


def device_of(name: str) -> torch.device:
    """The device called ``name``, on which a tensor has been made.

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
    from fxexpand.closest import closest
    from fxexpand.errors import SelectionError

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
    for option in options:
        if option not in fields:
            raise SelectionError(
                f"recipe {text!r}: {call.func.id} has no {option!r}; "
                f"it has {', '.join(fields) or 'no options'}."
            )
    return cast("Recipe", kind(**options))
