"""Checkpoints of training runs: written whole or not at all, for any number of processes, without pickle.

A checkpoint is a folder: the tensors as safetensors, which torch.distributed.checkpoint writes and reads,
each process its own shards, and other values as JSON. For another number of processes torch puts the shards
together. (torch's own format unpickles a file when it is read.)
"""

from __future__ import annotations

import json
import re
import reprlib
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fxexpand.errors import FxExpandError, SelectionError
from fxexpand.reporting.files import write_whole

VALUES = "values.json"
_NAME = re.compile(r"step-(\d{9,})(\.replaced)?")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(folder: str | Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> Path:
    """Write a checkpoint as ``folder/step-<step>``, then remove the others; all processes call it.

    The folder is written under another name, which ``latest`` does not see, and renamed at the end; at any
    time ``latest`` finds the last one or the new one. Folders that ``save`` does not name are left alone.
    Several machines need a file system that all of them see.

    Args:
        tensors: sharded ones (DTensor) go out shard by shard; any other is written once, from some process,
            so it must be the same in all, or have a name that only one process has.
        values: as JSON, which must give them back as they are: numbers, strings, bools, None, lists, and
            dicts with strings for keys. Those of the first process are written.

    Raises:
        TypeError: JSON cannot hold a value; the message has its path. Nothing was written.
        OSError: the folder cannot be written to.
        FxExpandError: a process could not write its part; the last checkpoint is still there.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        _require_json(values, "values")
    folder = Path(folder)
    path, draft = folder / f"step-{step:09d}", folder / f".step-{step:09d}.unfinished"
    replaced = path.with_suffix(".replaced")
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".step-*.unfinished"):
            shutil.rmtree(left_over, ignore_errors=True)
        draft.mkdir()
    _meet()
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}  # as safetensors asks
    with _storage(f"{path}: was not written"):
        writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
        state_dict_saver.save(state, storage_writer=writer, no_dist=not dist.is_initialized())
    if first:
        write_whole(draft / VALUES, json.dumps(values))
        if path.exists():  # of the same step: a folder cannot be replaced in one move
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        draft.rename(path)
        for other in set(_complete(folder)) - {path}:
            gone = folder / f".{other.name}.unfinished"  # at once; it takes time to empty it
            other.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    _meet()
    return path


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in ``folder``."""
    return max(_complete(Path(folder)), key=lambda path: (int(path.stem[5:]), not path.suffix), default=None)


def values_of(checkpoint: str | Path) -> dict[str, Any]:
    """The values of a checkpoint that are not tensors.

    Raises: SelectionError: the file is missing or damaged.
    """
    try:
        found = json.loads(Path(checkpoint, VALUES).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{VALUES} holds no object, but {reprlib.repr(found)}")
    except (OSError, ValueError, RecursionError) as error:
        raise SelectionError(f"{checkpoint}: not a checkpoint of a training run: {error}") from error
    return found


def load(checkpoint: str | Path, tensors: dict[str, Tensor], optional: Iterable[str] = ()) -> set[str]:
    """Read a checkpoint into ``tensors``, in place; all processes call it.

    Args:
        optional: beginnings of names that the checkpoint may lack; such tensors are left as they are.

    Returns: the names that were read.

    Raises: SelectionError: the checkpoint has other tensors, or other shapes, than ``tensors``.
    """
    try:
        reader = HuggingFaceStorageReader(str(checkpoint))
        saved: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    except (OSError, SafetensorError) as error:
        raise SelectionError(f"{checkpoint}: cannot be read: {error}") from error
    skipped = tuple(optional)
    wanted = {name: tensor for name, tensor in tensors.items() if name in saved}
    differing = sorted(name for name in set(saved) ^ set(tensors) if not name.startswith(skipped))
    if differing:
        where = "only there" if differing[0] in saved else "missing there"
        more = f" ({len(differing) - 1} more names differ)" if len(differing) > 1 else ""
        raise SelectionError(f"{checkpoint}: of another model: {differing[0]!r} is {where}{more}.")
    for name, tensor in wanted.items():
        if saved[name].size != tensor.shape:
            raise SelectionError(
                f"{checkpoint}: of another model: {name!r} is {tuple(saved[name].size)} there, and "
                f"{tuple(tensor.shape)} here."
            )
    with _storage(f"{checkpoint}: cannot be read"):
        state_dict_loader.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    return set(wanted)


def states(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """The tensors of a model and of its optimizer, by name: ``model.<name>``, ``optimizer.state.<name>...``.

    Under ``fully_shard`` they are shards (DTensor). Learning rates and other settings of the optimizer are
    left out: they come from the options of the run. An optimizer without a state yet is given one.
    A tensor that several modules share has one name.
    """
    again = _second_names(model)
    state = get_model_state_dict(model)
    found = {f"model.{name}": value for name, value in state.items() if name not in again}
    if optimizer is not None:
        inner: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        found.update({f"optimizer.{name}": value for name, value in inner.items()})
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put the result of ``states`` back."""
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, inner = name.partition(".")
        parts[part][inner] = tensor
    set_model_state_dict(model, {**get_model_state_dict(model), **parts["model"]})
    if optimizer is not None:
        groups = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        set_optimizer_state_dict(model, optimizer, {**groups, **parts["optimizer"]}, options=_FLAT)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model``, gathered from all processes onto the CPU of the first; empty elsewhere."""
    if not dist.is_initialized():
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}
    state: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    return state


def _second_names(model: nn.Module) -> set[str]:
    """All names but the first of each shared parameter or buffer: safetensors refuses shared memory."""
    every, firsts = set[str](), set[str]()
    for kind in (model.named_parameters, model.named_buffers):
        every.update(name for name, _ in kind(remove_duplicate=False))
        firsts.update(name for name, _ in kind())
    return every - firsts


def _complete(folder: Path) -> list[Path]:
    """Finished checkpoints of ``save``: the name appears with the last file in it."""
    return [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]


def _require_json(value: object, path: str) -> None:
    """Require that JSON gives the value back as it is; Python's has NaN and infinities, but no tuples."""
    if type(value) is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{path}[{key!r}]: not JSON: a key that is no string. Write str(key).")
            _require_json(inner, f"{path}[{key!r}]")
    elif type(value) is list:
        for i, inner in enumerate(value):
            _require_json(inner, f"{path}[{i}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        kind = type(value).__name__
        raise TypeError(f"{path}: not JSON: {kind}. Make it a list, a number or a string, or save a tensor.")


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _storage(problem: str) -> Iterator[None]:
    """Silence torch's warning about a single process, and raise the cause of an error of any process."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise FxExpandError(f"{problem}: {cause}") from cause
