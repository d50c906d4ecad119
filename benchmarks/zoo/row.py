"""One architecture: expand it, train it, fold it back, fuse it, and measure whether each step is exact.

All of it in float64, where rounding hides nothing: what is not equal to 1e-10 is wrong. The few networks that
are written for float32 alone are measured in that, against the tolerance of ``fxexpand.verify``.
"""

from __future__ import annotations

import copy
import math
import random
import re
import time
from collections import Counter
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from benchmarks.fusing.operators import operators
from benchmarks.journey import elsewhere, settled, train, training_state
from benchmarks.zoo.cases import Case
from benchmarks.zoo.models import Entry
from fxexpand import Chain, count_flops, expand, fuse, report
from fxexpand.errors import FxExpandError
from fxexpand.running.evaluation import evaluating
from fxexpand.running.inputs import ExampleInputs, move
from fxexpand.running.inputs import copy as copy_inputs
from fxexpand.running.outputs import outputs_of, tensors_of, worst_error
from fxexpand.running.verify import rounded_to, tolerance
from fxexpand.tracing.graphs import regions

RECIPE = Chain(depth=2, width=1)
LIMIT = 1e-10  # of relative errors in float64
# Modules whose weights of two or more dimensions are linear maps.
LINEAR = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)


def measure(entry: Entry) -> dict[str, Any]:
    """The row of one architecture.

    ``weights`` counts parameters, shared ones once; ``nodes``, ``params`` and ``flops`` are those of the
    network before and after fusing all that can be fused.
    """
    started = time.process_time()
    case = entry.case()
    row: dict[str, Any] = {"name": str(entry), "size": case.size, "cut": case.cut}
    model = settled(case.build, case.inputs)
    dtype = _widest(model, case)
    model.to(dtype)
    if dtype != torch.float64:
        row["dtype"] = str(dtype).removeprefix("torch.")
    inputs, training = (move(given, dtype=dtype) for given in (case.inputs, case.training))
    row["traced"] = traced(model)
    weights = linear_weights(model)
    before, trains = outputs_of(model, inputs), _training_state(model, training)
    row["alive"] = _depends(model, inputs, before)
    flops, also = count_flops(model, inputs).total, _also(case, model, inputs)
    classes = [type(module) for module in model.modules()]

    expand(model, RECIPE, inplace=True, example_inputs=inputs)
    found = report(model)
    row["expand_error"] = worst_error(outputs_of(model, inputs), before)
    row["train_error"] = worst_error(_training_state(model, training), trains)
    if row["train_error"] > LIMIT:
        row["train_noise"] = _noise(settled(case.build, case.inputs).to(dtype), training, trains)
    row["also_error"] = worst_error(_also(case, model, inputs), also) if also else 0.0
    row["sites"], row["refused"] = len(found.changed), _counted(found.refusals)
    kept = {id(parameter) for parameter in model.parameters()}
    row["weights"], row["covered"] = len(weights), sum(key not in kept for key in weights)
    reported = {name for refusal in found.refusals for name in (refusal.site, f"{refusal.site}.weight")}
    row["missed"] = sorted(name for key, name in weights.items() if key in kept and name not in reported)[:5]
    del trains, before, also

    row["losses"] = train(model, training)
    trained = outputs_of(model, inputs)
    fuse(model, scope="expanded", inplace=True)
    state = model.state_dict()
    row["same_class"] = [type(module) for module in model.modules()] == classes
    row["same_flops"] = count_flops(model, inputs).total == flops
    del model
    fresh = case.build().to(dtype).eval()
    row["same_state"] = _same_form(fresh, state)
    fresh.load_state_dict(state, strict=True)
    row["round_trip_error"] = worst_error(outputs_of(fresh, inputs), trained)
    del state

    nodes, params = sum(operators(fresh, inputs).values()), _parameters(fresh)
    fused = fuse(fresh, inputs)
    row["fuse_error"] = worst_error(outputs_of(fused, inputs), trained)
    row["not_fused"] = _counted(report(fused).refusals)
    row["nodes"] = [nodes, sum(operators(fused, inputs).values())]
    row["params"] = [params, _parameters(fused)]
    row["flops"] = [flops, count_flops(fused, inputs).total]
    row["seconds"] = round(time.process_time() - started, 1)
    row["failures"] = failures(row, tolerance(dtype, row["sites"]))
    if any("error" in failure for failure in row["failures"]) and rounded_to(fresh, inputs):
        row["narrows"] = True
        row["failures"] = failures(row, torch.finfo(torch.float32).eps)
    return row


def failures(row: dict[str, Any], limit: float = LIMIT) -> list[str]:
    """The conditions that do not hold; empty for a good row."""
    errors = {
        what: row[key]
        for what, key in {
            "expand": "expand_error",
            "methods other than forward after expand": "also_error",
            "round trip": "round_trip_error",
            "fuse": "fuse_error",
        }.items()
    }
    checks = {
        "outputs do not depend on the inputs": row["alive"],
        f"neither changed nor refused: {', '.join(row['missed'])}": not row["missed"],
        "training": all(math.isfinite(loss) for loss in row["losses"]),
        "round trip: classes differ": row["same_class"],
        "round trip: state dict differs": row["same_state"],
        "round trip: FLOPs differ": row["same_flops"],
        "fuse: more FLOPs": row["flops"][1] <= row["flops"][0],
        "fuse: more operators": row["nodes"][1] <= row["nodes"][0],
    }
    found = [name for name, holds in checks.items() if not holds]
    error, noise = row["train_error"], row.get("train_noise", 0.0)
    if not error <= max(limit, 10 * noise):
        errors["training mode after expand"] = error
    return found + [f"{what}: error {error:.0e}" for what, error in errors.items() if not error <= limit]


def _noise(model: nn.Module, inputs: ExampleInputs, expected: list[torch.Tensor]) -> float:
    """The change of outputs in training mode when each weight changes by its last bit.

    A BatchNorm over the two values of a batch whose difference is tiny divides rounding by it.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                signs = torch.randint(-1, 2, weight.shape, generator=generator)
                weight.mul_(1 + torch.finfo(weight.dtype).eps * signs.to(weight.dtype))
    return worst_error(_training_state(model, inputs), expected)


def _widest(model: nn.Module, case: Case) -> torch.dtype:
    """float64; float32 for a network that makes or demands tensors of it, and then cannot be widened."""
    wide = copy.deepcopy(model).double()
    try:
        outputs_of(wide, move(case.inputs, dtype=torch.float64))
        if case.training is not case.inputs:
            _training_state(wide, move(case.training, dtype=torch.float64))
    except (RuntimeError, TypeError) as error:
        if re.search(r"dtype|scalar type|float type", str(error)):
            return torch.float32
        raise
    return torch.float64


def traced(model: nn.Module) -> str:
    """``whole``: one graph for both modes; ``by mode``: one for each; else how many regions have a graph."""
    found = regions(model)
    if any(name == "" for name, _ in found.graphs):
        return "whole"
    if "differs between train and eval" in found.failures.get("", ""):
        return "by mode"
    return f"{len(found.graphs)} regions"


def linear_weights(model: nn.Module) -> dict[int, str]:
    """The weights of linear maps in layers of torch and their subclasses: name by identity.

    A subclass may hold gains beside its weight, one per channel, in as many dimensions.
    """
    return {
        id(parameter): f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, LINEAR)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and "weight" in name
    }


def _also(case: Case, model: nn.Module, inputs: ExampleInputs) -> list[torch.Tensor]:
    """The result of another method than forward: features of a backbone, tokens of a language model."""
    with evaluating(model):
        return tensors_of(case.also(model, copy_inputs(inputs))) if case.also is not None else []


def _training_state(model: nn.Module, inputs: ExampleInputs) -> list[torch.Tensor]:
    random.seed(0)  # some networks drop layers by it,
    numpy.random.seed(0)  # others draw masks from here
    return training_state(model, inputs)


def _depends(model: nn.Module, inputs: ExampleInputs, outputs: list[torch.Tensor]) -> bool:
    try:
        return worst_error(outputs_of(model, elsewhere(inputs)), outputs) > 1e-6
    except FxExpandError:  # other shapes: other detections
        return True


def _same_form(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = model.state_dict()
    return {k: (v.shape, v.dtype) for k, v in own.items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }


def _parameters(model: nn.Module) -> int:
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def _counted(refusals: Any) -> dict[str, int]:
    """The number of times that each reason occurs, the most frequent first; its numbers are left out."""
    reasons = Counter(re.sub(r"\d+", "#", refusal.reason)[:120] for refusal in refusals)
    return dict(reasons.most_common(4))
