"""``fxexpand inspect``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxexpand.cli.failures import fail
from fxexpand.cli.options import (
    DEFAULT_RECIPE,
    Input,
    Json,
    Model,
    RecipeText,
    Select,
    Weights,
    built,
    given_inputs,
    loaded,
    recipe_of,
)
from fxexpand.cli.output import show, show_json, sites, stdout_kept, working, wrapped

if TYPE_CHECKING:
    from torch import nn

    from fxexpand.running.inputs import ExampleInputs


@dataclass(frozen=True)
class Size:
    """What a network costs: nodes of its graphs, parameters, and FLOPs where there is an input."""

    nodes: int
    params: int
    flops: int | None


@dataclass(frozen=True)
class Traces:
    """How a network was read: in how many graphs, and why not in one."""

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
    model: Model,
    inputs: Input = None,
    weights: Weights = None,
    recipe: RecipeText = DEFAULT_RECIPE,
    select: Select = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a layer is refused.")] = False,
    as_json: Json = False,
) -> None:
    """Show how a model is read, and what fusing and expanding would change.

    Nothing is written. FLOPs are those of the input; without one there are none.
    """
    chosen = recipe_of(recipe)
    with stdout_kept():
        with working(f"{model}: reading"):
            from fxexpand.surgery.expand import expand
            from fxexpand.surgery.fuse import fuse
            from fxexpand.surgery.transaction import report
            from fxexpand.zoo import default_inputs

            # On the meta device where that is possible: factors are large, and nobody asks for their values.
            bare, _ = built(model, weights, meta=True)
            expanded = report(expand(bare, chosen, select=select, inplace=True))
            network = loaded(model, weights)
            known = bool(inputs) or default_inputs(model, network) is not None
            given = given_inputs(model, network, inputs) if known else None
            traces, before = _traces(network), _size(network, given)
        fused = fuse(network, given)
        with working(f"{model}: counting"):
            after = _size(fused, given)
        folded = report(fused)
    if as_json:
        show_json(
            {
                "model": model,
                "class": type(network).__name__,
                "inputs": _shapes(given),
                "traced": asdict(traces),
                "before": asdict(before),
                "fused": asdict(after),
                "fuse": folded.to_dict(),
                "expand": expanded.to_dict(),
            }
        )
    else:
        shapes = ", ".join("x".join(map(str, shape)) for shape in _shapes(given).values())
        title = f"{model}: {type(network).__name__}, {f'input {shapes}' if shapes else 'no --input given'}"
        show(
            "\n".join(
                [
                    title,
                    wrapped(str(traces), ""),
                    "",
                    _sizes(before, after),
                    "",
                    sites(folded),
                    "",
                    sites(expanded),
                ]
            )
        )
    if strict and expanded.refusals:
        fail(f"{model}: {len(expanded.refusals)} refused, the first: {expanded.refusals[0].message}")


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
