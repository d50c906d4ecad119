"""The contents of an ONNX file, and several files moved into place together."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx


def count_operators(program: onnx.ModelProto) -> dict[str, int]:
    """The count of each operator, largest first, subgraphs and functions included."""
    counts: Counter[str] = Counter()

    def visit(nodes: Any) -> None:
        for node in nodes:
            counts[node.op_type] += 1
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    visit(graph.node)

    visit(program.graph.node)
    for function in program.functions:
        visit(function.node)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def dimensions(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """The shape, with the name of a free dimension in place of its length."""
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def second_file(path: Path) -> Path | None:
    """The file from which an ONNX file at ``path`` reads its weights; None where it reads none."""
    import onnx

    try:
        program = onnx.load(str(path), load_external_data=False)
    except Exception:  # protobuf's own, where the file is of another kind
        return None
    second = path.with_name(f"{path.name}.data")
    entries = (entry for tensor in program.graph.initializer for entry in tensor.external_data)
    named = any(entry.key == "location" and entry.value == second.name for entry in entries)
    return second if named else None


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the state dict: names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            dense = tensor.detach().cpu().to_dense().contiguous().flatten()
            digest.update(dense.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def move_together(files: Sequence[Path], folder: Path) -> None:
    """Move the files into the folder; if one cannot be moved, all earlier files are put back.

    Raises: OSError: the one that stopped it.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".replaced.") as aside:
        moved: list[Path] = []
        try:
            for file in files:
                place = folder / file.name
                if len(files) > 1 and place.exists():  # a single file is replaced in one step
                    os.replace(place, Path(aside) / place.name)
                moved.append(place)
                os.replace(file, place)
        except BaseException:
            for place in moved:
                kept = Path(aside) / place.name
                if kept.exists():
                    os.replace(kept, place)
                elif len(files) > 1:
                    place.unlink(missing_ok=True)
            raise
