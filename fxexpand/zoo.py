"""Find a model by its name, and read weights and example inputs that a command line names.

A model is ``timm:NAME``, ``torchvision:NAME`` or ``package.module:FACTORY``; the last is any callable that
returns an nn.Module when called without arguments, or an nn.Module itself.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pickle
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.errors import FxExpandError, SelectionError

_INPUT = re.compile(r"(?P<shape>\d+(?:[,x]\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


def load_model(name: str, *, meta: bool = False) -> nn.Module:
    """The model called ``name``, with random weights; nothing is downloaded.

    Args:
        meta: build it on the meta device, without memory for weights, where its constructor can do that; on
            the CPU otherwise.

    Raises:
        SelectionError: no such library, model, module or factory; the message names the closest ones.
        FxExpandError: the library of the model is not installed.
    """
    source, colon, rest = name.partition(":")
    if not colon or not source or not rest:
        hint = _closest(name, [f"timm:{name}", f"torchvision:{name}"]) if name.isidentifier() else ""
        raise SelectionError(
            f"{name!r} names no model: write timm:NAME, torchvision:NAME or package.module:factory.{hint}"
        )
    if source == "timm":
        return _from_timm(rest, meta)
    if source == "torchvision":
        return _from_torchvision(rest, meta)
    return _from_factory(source, rest, meta)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint strictly: safetensors, or a state dict that ``torch.save`` wrote.

    Nothing is unpickled: torch reads the second kind with ``weights_only=True``.

    Raises: SelectionError: the file cannot be read, is neither, or does not fit the model; the message names
        the first problem.
    """
    state = _read(path)
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    if missing or extra:
        problem = f"lacks {missing[0]!r}" if missing else f"holds {extra[0]!r}, which the model lacks"
        more = len(missing) + len(extra) - 1
        raise SelectionError(f"{path}: {problem}{f' ({more} more names differ)' if more else ''}.")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SelectionError(f"{path}: {_last_line(error)}") from error


def example_input(text: str, device: torch.device | str = "cpu") -> Tensor:
    """A tensor for ``1,3,224,224`` or ``1,16:int64``: normal random numbers, or zeros and ones.

    Raises: SelectionError: it is written in another way.
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise SelectionError(f"input {text!r}: write the shape as 1,3,224,224, or 1,16:int64 with a dtype.")
    dtype = _DTYPES.get(match["dtype"] or "float32")
    if dtype is None:
        raise SelectionError(
            f"input {text!r}: no dtype {match['dtype']!r}.{_closest(match['dtype'], _DTYPES)}"
        )
    shape = tuple(int(length) for length in re.split("[,x]", match["shape"]))
    if 0 in shape:
        raise SelectionError(f"input {text!r}: every length must be 1 or more.")
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.randint(0, 2, shape, device=device).to(dtype)


def require_accepts(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Run the model once, so that inputs it cannot take are a clear error before any work is done.

    Raises: SelectionError: the model's own error, in one line.
    """
    from fxexpand.evaluating import evaluating

    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs)
    try:
        with evaluating(model):
            model(*inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        raise SelectionError(
            f"{type(model).__name__} does not take an input of {shapes}: {_last_line(error)}"
        ) from error


def _from_timm(name: str, meta: bool) -> nn.Module:
    timm = _library("timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise SelectionError(f"timm has no model {name!r}.{_closest(name, known)}")
    return _built(lambda: timm.create_model(name, pretrained=False), f"timm:{name}", meta)


def _from_torchvision(name: str, meta: bool) -> nn.Module:
    vision = _library("torchvision")
    known = vision.models.list_models()
    if name.lower() not in known:
        raise SelectionError(f"torchvision has no model {name!r}.{_closest(name, known)}")
    extra: dict[str, Any] = {}
    builder = inspect.signature(vision.models.get_model_builder(name)).parameters
    if "weights_backbone" in builder:
        extra["weights_backbone"] = None  # by default a detection model downloads the weights of its backbone
    if "init_weights" in builder or name in ("googlenet", "inception_v3"):
        extra["init_weights"] = True  # left out, torchvision warns that the default will change
    return _built(lambda: vision.models.get_model(name, weights=None, **extra), f"torchvision:{name}", meta)


def _from_factory(module: str, attribute: str, meta: bool) -> nn.Module:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does; the console script starts without the current folder
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            hint = _closest(module, ["timm", "torchvision"])
            raise SelectionError(f"no module {module!r} in the current folder or installed.{hint}") from error
        raise FxExpandError(f"{module}: needs {error.name!r}, which is not installed.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise SelectionError(f"{module} has no {part!r}.{_closest(part, dir(found))}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise SelectionError(f"{module}:{attribute} is a {type(found).__name__}; name a factory or a module.")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise SelectionError(
            f"{module}:{attribute} needs arguments ({error}). Name a factory without any."
        ) from error
    return _built(found, f"{module}:{attribute}", meta)


def _built(factory: Any, name: str, meta: bool) -> nn.Module:
    model: object
    if meta:
        try:
            with torch.device("meta"):
                model = factory()
        except (RuntimeError, NotImplementedError):  # a constructor that reads values
            model = factory()
    else:
        model = factory()
    if not isinstance(model, nn.Module):
        raise SelectionError(f"{name} gave a {type(model).__name__}, not an nn.Module.")
    return model


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:  # before the libraries, whose errors are of several kinds
            file.read(1)
    except OSError as error:
        raise SelectionError(f"{path}: {error.strerror}.") from error
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise SelectionError(f"{path}: not a safetensors file: {_last_line(error)}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol: our own error says more
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise SelectionError(
            f"{path}: holds more than tensors, or is no checkpoint of torch. Save model.state_dict() alone."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SelectionError(f"{path}: not a state dict. Save model.state_dict() alone.")
    return state


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FxExpandError(f'{name} is not installed. Run pip install "fxexpand[vision]".') from error


def _closest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean a, b or c?", or nothing when no name is close."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    if not found:
        return ""
    *first, last = found
    return f" Did you mean {', '.join(first)}{' or ' if first else ''}{last}?"


def _last_line(error: BaseException) -> str:
    """The end of a message of several lines: torch puts what went wrong last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
