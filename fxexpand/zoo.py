"""Find a model by its name, and read weights and example inputs that a command line names.

A model is ``timm:NAME``, ``torchvision:NAME``, ``transformers:TYPE`` or ``package.module:FACTORY``; the last
is any callable that returns an nn.Module when called without arguments, or an nn.Module itself.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxexpand.errors import FxExpandError, SelectionError, UnusableWeightError, closest
from fxexpand.running.copying import copied
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, call, copy, tensors

# Errors of models for an input of another shape, or for None, whose attributes transformers look up.
_OF_INPUTS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

_INPUT = re.compile(r"(?P<shape>\d+(?:[,x]\d+)*)(?::(?P<dtype>\w+))?")
_NAMES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}


def load_model(name: str, *, meta: bool = False) -> nn.Module:
    """The model called ``name``, with random weights; nothing is downloaded.

    Args:
        meta: build it on the meta device, without memory for weights, if its constructor can do that, else on
            the CPU.

    Raises:
        SelectionError: no such library, model, module or factory; the message names the closest ones.
        FxExpandError: the library of the model is not installed.
    """
    source, colon, rest = name.partition(":")
    if not colon or not source or not rest:
        hint = closest(name, [f"timm:{name}", f"torchvision:{name}"]) if name.isidentifier() else ""
        raise SelectionError(
            f"{name!r} names no model: write timm:NAME, torchvision:NAME, transformers:TYPE or "
            f"package.module:factory.{hint}"
        )
    if source in _LIBRARIES:
        return _LIBRARIES[source](rest, meta)
    return _from_factory(source, rest, meta)


def default_inputs(name: str, model: nn.Module) -> ExampleInputs | None:
    """One example input for ``model``, loaded as ``name``, on the CPU; None where its size is unknown.

    timm has the size in ``pretrained_cfg``, torchvision in the transforms of the weights it offers,
    transformers in the configuration.
    """
    source = name.partition(":")[0]
    shape: Sequence[int] | None = None
    if source == "timm":
        shape = getattr(model, "pretrained_cfg", {}).get("input_size")
    elif source == "torchvision":
        shape = _torchvision_shape(name.partition(":")[2])
    elif source == "transformers":
        return _transformers_inputs(model)
    return None if shape is None else torch.randn(1, *shape)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint strictly: safetensors, or a state dict that ``torch.save`` wrote.

    A tensor that the model has under several names needs one of them in the file: safetensors store no more.
    Nothing is unpickled: torch reads its own files with ``weights_only=True``.

    Raises:
        SelectionError: the file cannot be read, is neither, or does not fit the model; the message names the
            first problem.
        UnusableWeightError: the file holds NaN or Inf; the message names the tensor.
    """
    state = _read(path)
    built: Any = model.state_dict()
    for key, value in state.items():
        if value.is_floating_point() and not _is_usable(value, built.get(key)):
            raise UnusableWeightError(f"{path}: {key!r} holds NaN or Inf. Take an earlier checkpoint.")
    wanted = model.state_dict(keep_vars=True)  # the model's own tensors: one tensor under all of its names
    by_tensor = {id(tensor): state[key] for key, tensor in wanted.items() if key in state}
    tied = {key: by_tensor[id(tensor)] for key, tensor in wanted.items() if id(tensor) in by_tensor}
    for key, value in tied.items():
        state.setdefault(key, value)
    _require_names(path, wanted, state)
    versions = OrderedDict(state)
    # The versions of the layers, which safetensors do not store; MNASNet asks for them.
    versions._metadata = getattr(state, "_metadata", built._metadata)  # type: ignore[attr-defined]
    try:
        model.load_state_dict(versions)
    except RuntimeError as error:
        raise SelectionError(f"{path}: {_last_line(error)}") from error


def _require_names(path: Path, wanted: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises: SelectionError: the file lacks a name of the model, or has another one."""
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    if not missing and not extra:
        return
    if any(".expansion." in key or ".parametrizations." in key for key in extra):
        raise SelectionError(
            f"{path}: holds the weights of an expanded model. Say with --recipe how it was expanded, "
            "where a command takes that; or save fxexpand.fused_state_dict(model) instead."
        )
    problem = f"lacks {missing[0]!r}" if missing else f"holds {extra[0]!r}, which the model lacks"
    more = len(missing) + len(extra) - 1
    raise SelectionError(f"{path}: {problem}{f' ({more} more names differ)' if more else ''}.")


def example_input(text: str, device: torch.device | str = "cpu") -> Tensor:
    """A tensor for ``1,3,224,224`` or ``1,16:int64``: normal random numbers, or zeros and ones.

    Raises: SelectionError: the text has another form.
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise SelectionError(f"input {text!r}: write the shape as 1,3,224,224, or 1,16:int64 with a dtype.")
    dtype = _DTYPES.get(match["dtype"] or "float32")
    if dtype is None:
        raise SelectionError(
            f"input {text!r}: no dtype {match['dtype']!r}.{closest(match['dtype'], _DTYPES)}"
        )
    shape = tuple(int(length) for length in re.split("[,x]", match["shape"]))
    if 0 in shape:
        raise SelectionError(f"input {text!r}: every length must be 1 or more.")
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.randint(0, 2, shape, device=device).to(dtype)


def require_accepts(model: nn.Module, inputs: ExampleInputs) -> None:
    """Run the model once, so that inputs of a wrong shape are a clear error before any work is done.

    Raises: SelectionError: the model raised; the message has its own error in one line.
    """
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors(inputs))
    try:
        with evaluating(model):
            call(model, copy(inputs))
    except _OF_INPUTS as error:
        raise SelectionError(
            f"{type(model).__name__} does not take an input of {shapes}: {_last_line(error)}"
        ) from error


def _from_timm(name: str, meta: bool) -> nn.Module:
    timm = required("timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise SelectionError(f"timm has no model {name!r}.{closest(name, known)}")
    return _built(lambda: timm.create_model(name, pretrained=False), f"timm:{name}", meta)


def _from_torchvision(name: str, meta: bool) -> nn.Module:
    vision = required("torchvision")
    known = vision.models.list_models()
    if name.lower() not in known:
        raise SelectionError(f"torchvision has no model {name!r}.{closest(name, known)}")
    extra: dict[str, Any] = {}
    builder = inspect.signature(vision.models.get_model_builder(name)).parameters
    if "weights_backbone" in builder:
        extra["weights_backbone"] = None  # by default a detection model downloads the weights of its backbone
    if "init_weights" in builder or name in ("googlenet", "inception_v3"):
        extra["init_weights"] = True  # left out, torchvision warns that the default will change
    return _built(lambda: vision.models.get_model(name, weights=None, **extra), f"torchvision:{name}", meta)


def _torchvision_shape(name: str) -> tuple[int, ...] | None:
    """The shape of the images, or of the videos of 16 frames, that the weights on offer were trained on."""
    models = required("torchvision").models
    offered = models.get_model_weights(name)
    if not len(offered):
        return (3, 224, 224)
    transform, module = offered.DEFAULT.transforms(), models.get_model_builder(name).__module__
    size = getattr(transform, "crop_size", None) or getattr(transform, "resize_size", None)
    if not size or ".detection" in module:  # these take lists
        return None
    height, width = (*size, *size)[:2]
    return (3, 16, height, width) if ".video" in module else (3, height, width)


def _from_transformers(name: str, meta: bool) -> nn.Module:
    library = required("transformers", "zoo")
    known = list(importlib.import_module("transformers.models.auto.modeling_auto").MODEL_MAPPING_NAMES)
    if name not in known:
        raise SelectionError(f"transformers has no model type {name!r}.{closest(name, known)}")
    config = library.AutoConfig.for_model(name)
    return _built(lambda: library.AutoModel.from_config(config), f"transformers:{name}", meta)


def _transformers_inputs(model: nn.Module) -> ExampleInputs | None:
    """Sixteen tokens, or an image as large as the configuration says."""
    config: Any = model.config
    if getattr(model, "main_input_name", "") == "input_ids":
        tokens = torch.arange(1, 17).unsqueeze(0)
        # A cache is no tensor, so no ONNX file can return it.
        return {"input_ids": tokens, **({"use_cache": False} if getattr(config, "use_cache", False) else {})}
    size = getattr(config, "image_size", None)
    if getattr(model, "main_input_name", "") != "pixel_values" or not isinstance(size, int):
        return None
    return {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), size, size)}


def _from_factory(module: str, attribute: str, meta: bool) -> nn.Module:
    if "/" in module or module.startswith(".") or module.endswith(".py"):
        raise SelectionError(
            f"{module!r} is no name of a module. Write it as in an import, {Path(module).stem}:{attribute}; "
            "the current folder is searched first."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does; the console script starts without the current folder
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            hint = closest(module, ["timm", "torchvision"])
            raise SelectionError(f"no module {module!r} in the current folder or installed.{hint}") from error
        raise FxExpandError(f"{module}: needs {error.name!r}, which is not installed.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise SelectionError(f"{module} has no {part!r}.{closest(part, dir(found))}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return copied(found)  # a command loads a model twice, and changes one of them
    if not callable(found):
        kind = type(found).__name__
        raise SelectionError(f"{module}:{attribute} is of type {kind}; name a factory or an nn.Module.")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise SelectionError(
            f"{module}:{attribute} needs arguments ({error}). Name a factory without any."
        ) from error
    model = _built(found, f"{module}:{attribute}", meta)
    return model if isinstance(found, type) else copied(model)  # a function may give the same one again


def _built(factory: Any, name: str, meta: bool) -> nn.Module:
    model: object = None
    if meta:  # a constructor that reads values fails; any other error is raised again below
        with suppress(Exception), torch.device("meta"):
            model = factory()
    model = factory() if model is None else model
    if not isinstance(model, nn.Module):
        raise SelectionError(f"{name} gave an object of type {type(model).__name__}, not an nn.Module.")
    if not meta and any(parameter.is_meta for parameter in model.parameters()):
        raise SelectionError(f"{name} gave a model on the meta device, without values. Build it on the CPU.")
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


def _is_usable(value: Tensor, built: object) -> bool:
    """Whether all values are finite, except infinities that the model was built with, as in a mask."""
    infinite = ~torch.isfinite(value)
    if not bool(infinite.any()):
        return True
    if not isinstance(built, Tensor) or built.shape != value.shape or built.is_meta:
        return False
    return torch.equal(built[infinite].to(value), value[infinite])  # a NaN equals nothing


def required(name: str, extra: str = "vision") -> Any:
    """The library of that name, which an extra of the package brings.

    Raises: FxExpandError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FxExpandError(f'{name} is not installed. Run pip install "fxexpand[{extra}]".') from error


_LIBRARIES: dict[str, Callable[[str, bool], nn.Module]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}


def _last_line(error: BaseException) -> str:
    """The last line of a message: torch puts the cause there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
