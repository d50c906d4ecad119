"""The new layers of ``Fuse``: which values one layer computes, its name, and the layer itself, verified."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, fx, nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel, cast
from fxexpand.kernel.lower import laid_out_as, to_module
from fxexpand.kernel.modules import describe
from fxexpand.passes.affine.candidates import Candidate
from fxexpand.passes.affine.extraction import Extraction
from fxexpand.passes.affine.maps import Place
from fxexpand.passes.norms import owner_name
from fxexpand.reporting.rows import Row
from fxexpand.running.finite import is_finite
from fxexpand.running.verify import fold_error, require_small
from fxexpand.tracing.edit import call_alone, extract
from fxexpand.tracing.tracer import first_line


@dataclass(frozen=True, eq=False)
class Group:
    """Values that one new layer is to compute, each with its candidate, and the name of that layer."""

    name: str
    values: dict[fx.Node, Candidate]

    @property
    def first(self) -> Candidate:
        """The candidate of the first value; those of the others call the same modules."""
        return next(iter(self.values.values()))

    @cached_property
    def nodes(self) -> set[fx.Node]:
        """The nodes that compute the values."""
        return {node for candidate in self.values.values() for node in candidate.nodes}


@dataclass(frozen=True, eq=False)
class Fusion:
    """The new layer of a group; ``targets`` are the modules and parameters that the merged nodes use."""

    row: Row
    module: nn.Module
    group: Group
    targets: Collection[str]


def grouped(extraction: Extraction) -> list[Group]:
    """The chosen values, calls of the same modules in the same way together; no numbers are computed yet."""
    by_calls: dict[object, dict[fx.Node, Candidate]] = {}
    for node, candidate in extraction.chosen.items():
        by_calls.setdefault(_calls(extraction, candidate) or node, {})[node] = candidate
    gone = extraction.gone()
    calls = (node for node in extraction.order if node.op == "call_module" and node not in gone)
    kept = {str(node.target) for node in calls}
    groups = []
    for values in by_calls.values():
        name = _name(extraction, next(iter(values.values())), kept)
        kept.add(name)
        groups.append(Group(name, values))
    return groups


def _calls(extraction: Extraction, candidate: Candidate) -> object:
    """The calls of modules and the sums of a candidate; None where it has other operators as well."""
    nodes = extraction.kernels(candidate)
    if any(node.op != "call_module" and node.target is not operator.add for node in nodes):
        return None
    return tuple((node.op, node.target) for node in extraction.in_order(candidate))


def _name(extraction: Extraction, candidate: Candidate, kept: set[str]) -> str:
    """The name of the first layer, or of the expanded layer all of whose factors are merged."""
    first = candidate.layer
    assert first is not None
    name, site = str(first.target) if first.op == "call_module" else first.name, extraction.site(first)
    mine = {str(node.target) for node in candidate.nodes}
    if site is not None and extraction.factors(first) <= mine and not extraction.factors(first) & kept:
        name = site
    number, free = 0, name
    while free in kept or ((number > 0 or first.op != "call_module") and _taken(extraction, free)):
        number += 1
        free = f"{name}_{number}"
    return free


def _taken(extraction: Extraction, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    return hasattr(extraction.graph_module.get_submodule(path), attribute)


def new_layers(
    extraction: Extraction,
    groups: Iterable[Group],
    verify: bool = True,
    show: Callable[[str], None] = lambda name: None,
) -> list[Fusion]:
    """The layers of the groups; nothing is changed yet.

    A group whose layer is not exact is refused in ``extraction``, with those that compute a node of it too:
    one value goes for all or for none.

    Args:
        show: takes the name of each layer before it is made.

    Raises: VerificationError: a layer computes something else than what it replaces.
    """
    fusions: list[Fusion] = []
    refused: set[fx.Node] = set()
    for group in groups:
        show(group.name)
        try:
            fusions.append(_new_layer(extraction, group, verify))
        except InexactError as error:
            extraction.refuse(group.values, str(error))
            refused |= group.nodes
    while torn := [fusion for fusion in fusions if fusion.group.nodes & refused]:
        for fusion in torn:
            extraction.refuse(fusion.group.values, "a layer beside it that computes a part of it stays")
            refused |= fusion.group.nodes
        fusions = [fusion for fusion in fusions if fusion not in torn]
    return fusions


@torch.inference_mode(False)  # tensors made in inference mode never train
def _new_layer(extraction: Extraction, group: Group, verify: bool) -> Fusion:
    """The layer of a group, folded in float64 and cast once.

    Raises:
        InexactError: the layer is not exact, or that cannot be checked.
        VerificationError: the layer computes something else than what it replaces.
    """
    candidate, reader = group.first, extraction.reader
    nodes, kernels = extraction.in_order(candidate), extraction.kernels(candidate)
    reading = [node for node in nodes if node in kernels or reader.read(node)]  # ATen's BatchNorm too
    (dtype,) = candidate.dtypes
    biases = [each for node in reading for each in _biases(extraction, node)]
    folded = partial(_folded, extraction, candidate, biased=bool(biases))
    module, kernel = folded(dtype)
    _train_as_before(extraction, module, candidate, biases)
    error = _error(extraction, candidate, module, kernel) if verify and not kernel.weight.is_meta else None
    if error is not None:

        def unrounded() -> float | None:
            return _error(extraction, candidate, *folded(torch.float64))

        require_small(error, dtype, group.name, unrounded)
    tensors = {id(tensor): tensor for node in reading for tensor in reader.tensors(node)}
    row = Row(
        site=group.name,
        kind=describe(module),
        action="fused",
        reason=f"one kernel for {', '.join(_titles(kernels))}",
        params_before=_count(tensors.values()),
        params_after=_count(module.parameters()),
        error=error,
    )
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    return Fusion(row, module, group, called.union(*(reader.read(node) for node in reading)))


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))


def _folded(
    extraction: Extraction, candidate: Candidate, dtype: torch.dtype, biased: bool
) -> tuple[nn.Module, Kernel]:
    """The layer of a candidate, on the device and in the memory format of its first weight.

    A bias of zeros is none, unless it is made of biases that may be trained (``biased``).

    Raises: InexactError: its numbers are not finite.
    """
    assert candidate.layer is not None and candidate.map.shape is not None
    first, shape = _weight(extraction, candidate.layer), candidate.map.shape
    with torch.no_grad():
        kernel = cast(candidate.map.at(Place(shape.in_channels, shape.rank, first.device)), dtype)
        for name, tensor in (("weight", kernel.weight), ("bias", kernel.bias)):
            if tensor is not None and not is_finite(tensor):
                raise InexactError(f"the {name} of one kernel would not be finite in {dtype}")
        if kernel.bias is not None and not biased and not kernel.bias.is_meta and not kernel.bias.any():
            kernel = replace(kernel, bias=None)
        if kernel.weight.ndim == first.ndim:
            kernel = replace(kernel, weight=laid_out_as(kernel.weight, first))
        return to_module(kernel), kernel


def _train_as_before(
    extraction: Extraction, module: nn.Module, candidate: Candidate, biases: Sequence[nn.Parameter]
) -> None:
    """Give a layer the mode of the one that it is named after, and train it if one it replaces is trained."""
    layer = candidate.layer
    assert layer is not None
    holder = extraction.module(layer) if layer.op == "call_module" else extraction.graph_module
    module.train(holder.training)
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    layers = [node for node in candidate.nodes if extraction.has_macs(node)]
    weight.requires_grad_(any(_weight(extraction, node).requires_grad for node in layers))
    if bias is not None:
        bias.requires_grad_(any(each.requires_grad for each in biases) if biases else weight.requires_grad)


def _titles(kernels: Sequence[fx.Node]) -> list[str]:
    """The names of modules that are merged, then those of other nodes, but of sums."""
    modules = [owner_name(str(node.target)) for node in kernels if node.op == "call_module"]
    others = [node.name for node in kernels if node.op != "call_module" and node.target is not operator.add]
    return list(dict.fromkeys([*modules, *others]))


def _error(extraction: Extraction, candidate: Candidate, module: nn.Module, kernel: Kernel) -> float | None:
    """The relative error on a probe; None where the nodes read sizes that only a run of the network knows."""
    probe, sizes = extraction.probe(candidate)
    graph_module, source = extraction.graph_module, candidate.source
    try:
        probed = extract(graph_module, source, extraction.in_order(candidate), sizes)
        alone = call_alone(graph_module, module, source, candidate.before, candidate.after, sizes)
    except InexactError:
        return None
    try:
        return fold_error(probed, alone, kernel, probe)
    except RuntimeError as error:
        raise InexactError(f"it cannot be checked: {first_line(error)}") from error


def _weight(extraction: Extraction, layer: fx.Node) -> Tensor:
    """The weight of a layer, or the largest tensor that it is computed from."""
    if layer.op == "call_module":
        module = extraction.module(layer)
        if isinstance(module._parameters.get("weight"), Tensor):
            return module.get_parameter("weight")
    return max(extraction.reader.tensors(layer), key=Tensor.numel)


def _biases(extraction: Extraction, node: fx.Node) -> Iterator[nn.Parameter]:
    """The parameters that a node adds to each channel."""
    own = extraction.module(node)._parameters.get("bias") if node.op == "call_module" else None
    for tensor in extraction.reader.tensors(node):
        added = tensor is own if node.op == "call_module" else tensor.ndim <= 1
        if added and isinstance(tensor, nn.Parameter):
            yield tensor
