"""Count the floating-point operations of one forward pass, per module and per operator.

A multiply-add counts as two operations. Matrix products, convolutions, attention and recurrent layers count;
biases, normalisation and element-wise operators do not, as is usual in the literature.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from fxexpand.reporting.table import short, table
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, call
from fxexpand.running.inputs import copy as copy_inputs

_WRAPPER = "_orig_mod"  # the name that torch.compile gives to the model it wraps


@dataclass(frozen=True)
class FlopChange:
    """A module in which two models differ; a model that lacks the module counts 0 FLOPs there."""

    path: str
    before: int
    after: int


@dataclass(frozen=True)
class FlopComparison:
    """The difference of two models in FLOPs: one row per module that both have, or that one of them lacks."""

    changes: tuple[FlopChange, ...]
    before: int
    after: int

    def __str__(self) -> str:
        counts = [(c.path or "(model)", c.before, c.after) for c in self.changes]
        counts.append(("total", self.before, self.after))
        rows = [(name, short(one), short(two), _ratio(one, two)) for name, one, two in counts]
        return table(("module", "FLOPs before", "after", "ratio"), rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        changes = [{"path": c.path, "before": c.before, "after": c.after} for c in self.changes]
        return {"before": self.before, "after": self.after, "changes": changes}


@dataclass(frozen=True)
class FlopReport:
    """The FLOPs of one forward pass.

    ``own`` maps the path of every module to the FLOPs spent in it outside its submodules ("" is the model
    itself); ``by_operator`` maps operators (``aten.convolution``) to their FLOPs. Both sum to ``total``.
    ``parameters`` counts the elements of all parameters, shared ones once.
    """

    total: int
    own: Mapping[str, int]
    by_operator: Mapping[str, int]
    parameters: int

    @property
    def by_module(self) -> dict[str, int]:
        """FLOPs per module path, submodules included; ``by_module[""]`` is the total."""
        inclusive = dict.fromkeys(self.own, 0)
        for path, flops in self.own.items():
            for ancestor in _with_ancestors(path):
                inclusive[ancestor] += flops
        return inclusive

    def compare(self, other: FlopReport) -> FlopComparison:
        """The difference between this report (before) and ``other`` (after).

        A module that one model lacks has a row of its own when its parent is a container in both models; else
        it counts to its parent: a convolution that became a chain is one row.
        """
        containers = _containers(self.own) & _containers(other.own)
        before: dict[str, int] = {}
        after: dict[str, int] = {}
        for side, counts in ((self.own, before), (other.own, after)):
            for path, flops in side.items():
                place = _place(path, self.own, other.own, containers)
                counts[place] = counts.get(place, 0) + flops
        paths = dict.fromkeys([*before, *after])
        changes = (FlopChange(path, before.get(path, 0), after.get(path, 0)) for path in paths)
        return FlopComparison(tuple(c for c in changes if c.before != c.after), self.total, other.total)

    def __str__(self) -> str:
        counts = {path: flops for path, flops in self.own.items() if flops}
        rows = [(path or "(model)", short(n), f"{n / self.total:.1%}") for path, n in counts.items()]
        rows.append(("total", short(self.total), "100.0%" if self.total else "-"))
        operators = ", ".join(f"{name} {short(flops)}" for name, flops in self.by_operator.items()) or "none"
        return (
            f"{table(('module', 'FLOPs', 'share'), rows)}\n"
            f"operators: {operators}\nparameters: {short(self.parameters)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "total": self.total,
            "parameters": self.parameters,
            "by_module": self.by_module,
            "by_operator": dict(self.by_operator),
        }


def count_flops(model: nn.Module, example_inputs: ExampleInputs) -> FlopReport:
    """Count the FLOPs of ``model`` in evaluation mode for ``example_inputs``.

    The model runs once, without gradients, on its own device (the meta device costs nothing). Training flags,
    buffers, inputs and the random state are as before afterwards.

    Args:
        model: any module, in any mode; a compiled model is counted as if it were not compiled.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
    """
    inputs = copy_inputs(example_inputs)  # the model may write to them
    counter = FlopCounterMode(display=False, custom_mapping=_more_operators())
    tracked: Any = counter
    tracked.mod_tracker = _Untracked()
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_counted_kernels(model))
        stack.enter_context(counter)
        own = stack.enter_context(_attributed(model, counter))
        call(model, inputs)
    counts = counter.get_flop_counts().get("Global", {})
    by_operator = {str(name): int(flops) for name, flops in counts.items()}
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
    return FlopReport(sum(own.values()), own, by_operator, parameters)


class _Untracked:
    """A replacement of the counter's own tracker of modules, which follows gradients through their inputs.

    The counter's tracker fails without gradients (a parameter read under ``no_grad``), and in a model that
    takes gradients itself (forces of an energy). ``_attributed`` follows the modules instead.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Nothing to start."""

    def __exit__(self, *_: object) -> None:
        """Nothing to stop."""


@contextmanager
def _attributed(model: nn.Module, counter: FlopCounterMode) -> Iterator[dict[str, int]]:
    """Charge FLOPs to the innermost module of ``model`` that is running.

    The counter's own tracker charges every running module, so that a module called from a sibling counts
    twice; here each FLOP has one owner.
    """
    paths = {module: _plain(path) for path, module in model.named_modules()}
    own = dict.fromkeys(paths.values(), 0)
    running = [""]
    charged = 0

    def charge() -> None:
        nonlocal charged
        total = int(counter.get_total_flops())
        own[running[-1]] += total - charged
        charged = total

    def enter(module: nn.Module, args: Any) -> None:
        if module in paths:
            charge()
            running.append(paths[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in paths:
            charge()
            running.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield own
        charge()
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _counted_kernels(model: nn.Module) -> Iterator[None]:
    """Make torch take the kernels that the counter knows, the same on every device.

    Fused attention and the fused transformer layer become matrix products; compiled code runs eagerly.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    compiled = any(_WRAPPER in m._modules or m._compiled_call_impl is not None for m in model.modules())
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Global hooks run for the wrapper too, which is harmless: both have the same path.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings(
                "ignore", message="Using `torch.compile.* global hooks", category=UserWarning
            )
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield


def _more_operators() -> dict[Any, Callable[..., int]]:
    """FLOP formulas, from shapes, of operators that torch's counter passes over."""
    aten = torch.ops.aten
    Shape: TypeAlias = Sequence[int]

    def matrix_vector(matrix: Shape, vector: Shape, **_: Any) -> int:
        return 2 * prod(matrix)

    def added_matrix_vector(added: Shape, matrix: Shape, vector: Shape, **_: Any) -> int:
        return 2 * prod(matrix)

    def added_batch(added: Shape, batch: Shape, other: Shape, **_: Any) -> int:
        return 2 * prod(batch) * other[-1]

    def time_first(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
        return 2 * prod(out_shape) * prod(weight[:2])  # (k, in, out)

    def dot(a: Shape, b: Shape, **_: Any) -> int:
        return 2 * prod(a)

    def fused_layer(x: Shape, input_weight: Shape, hidden_weight: Shape, *_: Any, **__: Any) -> int:
        return 2 * prod(x[:-1]) * (prod(input_weight) + prod(hidden_weight))

    def fused_stack(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
        return 2 * prod(x[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)

    def bilinear(one: Shape, weight: Shape, two: Shape, *_: Any, **__: Any) -> int:
        # The first input with the weight, then the result with the second input.
        return 2 * one[0] * (prod(weight) + weight[0] * weight[2])

    return {
        aten._trilinear: bilinear,
        aten.mv: matrix_vector,
        aten.addmv: added_matrix_vector,
        aten.dot: dot,
        aten.vdot: dot,
        aten.addbmm: added_batch,
        aten.conv_tbc: time_first,
        aten.mkldnn_rnn_layer: fused_layer,
        aten._cudnn_rnn: fused_stack,
    }


def _plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != _WRAPPER)


def _with_ancestors(path: str) -> list[str]:
    """ "a.b" gives "", "a", "a.b"."""
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _containers(paths: Mapping[str, int]) -> set[str]:
    return {_with_ancestors(path)[-2] for path in paths if path}


def _place(path: str, one: Mapping[str, int], two: Mapping[str, int], containers: set[str]) -> str:
    """The path under which a comparison counts the FLOPs of ``path``."""
    around = ""
    for ancestor in _with_ancestors(path):
        if ancestor not in one or ancestor not in two:
            return ancestor if around in containers else around
        around = ancestor
    return path


def _ratio(before: int, after: int) -> str:
    return f"{after / before:.3g}x" if before else "-"
