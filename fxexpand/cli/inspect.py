"""``fxexpand inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxexpand.cli.failures import fail
from fxexpand.cli.options import Json, Source, Strict, recipe_of
from fxexpand.cli.output import show, sites, stdout_kept, working, wrapped
from fxexpand.training.options import RECIPE

if TYPE_CHECKING:
    from torch import nn

    from fxexpand.running.inputs import ExampleInputs


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
            from fxexpand.running.inputs import tensors
            from fxexpand.surgery.expand import expand
            from fxexpand.surgery.fuse import fuse
            from fxexpand.surgery.transaction import report

            # On the meta device where that is possible: factors are large, and their values are not shown.
            bare, _ = source.built(meta=True)
            expanded = report(expand(bare, chosen, select=select, inplace=True))
            network = source.loaded()
            given = source.known_inputs(network)
            traces, before = _size(network, given)
        fused = fuse(network, given)
        with working(f"{source.model}: counting"):
            _, after = _size(fused, given)
        folded = report(fused)
    name, kind = source.model, type(network).__name__
    inputs = {str(i): list(each.shape) for i, each in enumerate(tensors(given if given is not None else ()))}
    values = {"traced": traces, "before": before, "fused": after}
    reports = {"fuse": folded.to_dict(), "expand": expanded.to_dict()}
    shapes = ", ".join("x".join(map(str, shape)) for shape in inputs.values())
    title = f"{name}: {kind}, {f'input {shapes}' if shapes else 'no --input given'}"
    parts = [
        f"{title}\n{wrapped(_read(**traces), '')}",
        _sizes(before, after),
        sites(folded),
        sites(expanded),
    ]
    show("\n\n".join(parts), as_json, {"model": name, "class": kind, "inputs": inputs, **values, **reports})
    if strict and expanded.refusals:
        fail(f"{name}: {len(expanded.refusals)} refused, the first: {expanded.refusals[0].message}")


def _read(graphs: int, nodes: int, failures: dict[str, str]) -> str:
    """The graphs in which a network was read, and the first reason why there is no single one."""
    if not failures:
        return f"traced as one graph of {nodes} nodes"
    name, reason = next(iter(failures.items()))
    parts = f"traced in parts: {graphs} graphs of {nodes} nodes together"
    return f"{parts}. {name or 'The whole'} has no graph: {reason}"


def _size(model: nn.Module, given: ExampleInputs | None) -> tuple[dict[str, Any], dict[str, int | None]]:
    """The graphs of a network; their nodes, its parameters, and its FLOPs where there is an input."""
    from fxexpand.running.flops import count_flops
    from fxexpand.tracing.graphs import regions

    found = regions(model)
    nodes = sum(_nodes(graph) for _, graph in found.graphs)
    params = sum(p.numel() for p in model.parameters())
    flops = None if given is None else count_flops(model, given).total
    traces = {"graphs": len(found.graphs), "nodes": nodes, "failures": found.failures}
    return traces, {"nodes": nodes, "params": params, "flops": flops}


def _nodes(graph: Any) -> int:
    """Nodes that compute something: a fused BatchNorm leaves an Identity."""
    from torch import nn

    idle = {name for name, module in graph.named_modules() if isinstance(module, nn.Identity)}
    return sum(node.op.startswith("call_") and node.target not in idle for node in graph.graph.nodes)


def _sizes(before: dict[str, int | None], after: dict[str, int | None]) -> str:
    from fxexpand.reporting.table import short, table

    rows, names = [], ("graph nodes", "parameters", "FLOPs")
    for name, one, two in zip(names, before.values(), after.values(), strict=True):
        if one is not None and two is not None:
            rows.append((name, short(one), short(two), f"{two / one:.3f}x" if one else "-"))
    return table(("", "as it is", "fused", "ratio"), rows)
