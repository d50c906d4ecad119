"""``fxexpand inspect``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxexpand.cli.failures import fail
from fxexpand.cli.options import Json, Source, Strict, recipe_of
from fxexpand.cli.output import show, show_json, sites, stdout_kept, working, wrapped
from fxexpand.training.options import RECIPE

if TYPE_CHECKING:
    from torch import nn

    from fxexpand.running.inputs import ExampleInputs


@dataclass(frozen=True)
class Size:
    """The cost of a network: nodes of its graphs, parameters, and FLOPs where there is an input."""

    nodes: int
    params: int
    flops: int | None


@dataclass(frozen=True)
class Traces:
    """The number of graphs in which a network was read, and the reasons why there is no single one."""

    graphs: int
    nodes: int
    failures: dict[str, str]

    def __str__(self) -> str:
        if not self.failures:
            return f"traced as one graph of {self.nodes} nodes"
        name, reason = next(iter(self.failures.items()))
        return (
            f"traced in parts: {self.graphs} graphs of {self.nodes} nodes together. "
            f"{name or 'The whole'} has no graph: {reason}"
        )


def inspect(
    source: Source,
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="Recipe of each layer: RepVGG, Chain(depth=2)...")
    ] = RECIPE,
    select: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only layers whose name matches. Repeatable.")
    ] = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Show how a model is read, and the layers that fuse and expand would change.

    Nothing is written. FLOPs are those of the input; without one there are none.
    """
    chosen = recipe_of(recipe)
    with stdout_kept():
        with working(f"{source.model}: reading"):
            from fxexpand.surgery.expand import expand
            from fxexpand.surgery.fuse import fuse
            from fxexpand.surgery.transaction import report

            # On the meta device where that is possible: factors are large, and their values are not shown.
            bare, _ = source.built(meta=True)
            expanded = report(expand(bare, chosen, select=select, inplace=True))
            network = source.loaded()
            given = source.known_inputs(network)
            traces, before = _traces(network), _size(network, given)
        fused = fuse(network, given)
        with working(f"{source.model}: counting"):
            after = _size(fused, given)
        folded = report(fused)
    name, kind, inputs = source.model, type(network).__name__, _shapes(given)
    if as_json:
        sizes = {"traced": asdict(traces), "before": asdict(before), "fused": asdict(after)}
        reports = {"fuse": folded.to_dict(), "expand": expanded.to_dict()}
        show_json({"model": name, "class": kind, "inputs": inputs, **sizes, **reports})
    else:
        shapes = ", ".join("x".join(map(str, shape)) for shape in inputs.values())
        title = f"{name}: {kind}, {f'input {shapes}' if shapes else 'no --input given'}"
        parts = [
            f"{title}\n{wrapped(str(traces), '')}",
            _sizes(before, after),
            sites(folded),
            sites(expanded),
        ]
        show("\n\n".join(parts))
    if strict and expanded.refusals:
        fail(f"{name}: {len(expanded.refusals)} refused, the first: {expanded.refusals[0].message}")


def _traces(model: nn.Module) -> Traces:
    from fxexpand.tracing.graphs import regions

    found = regions(model)
    return Traces(len(found.graphs), sum(_nodes(graph) for _, graph in found.graphs), found.failures)


def _size(model: nn.Module, given: ExampleInputs | None) -> Size:
    from fxexpand.running.flops import count_flops

    params = sum({id(p): p.numel() for p in model.parameters()}.values())
    return Size(_traces(model).nodes, params, None if given is None else count_flops(model, given).total)


def _nodes(graph: Any) -> int:
    """Nodes that compute something: a fused BatchNorm leaves an Identity."""
    from torch import nn

    idle = {name for name, module in graph.named_modules() if isinstance(module, nn.Identity)}
    return sum(node.op.startswith("call_") and node.target not in idle for node in graph.graph.nodes)


def _shapes(given: ExampleInputs | None) -> dict[str, list[int]]:
    from fxexpand.running.inputs import tensors

    found = [] if given is None else tensors(given)
    return {str(i): list(tensor.shape) for i, tensor in enumerate(found)}


def _sizes(before: Size, after: Size) -> str:
    from fxexpand.reporting.table import short, table

    rows = []
    for name, one, two in (
        ("graph nodes", before.nodes, after.nodes),
        ("parameters", before.params, after.params),
        ("FLOPs", before.flops, after.flops),
    ):
        if one is not None and two is not None:
            rows.append((name, short(one), short(two), f"{two / one:.3f}x" if one else "-"))
    return table(("", "as it is", "fused", "ratio"), rows)
