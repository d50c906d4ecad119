"""Reads the nodes of a graph as affine steps, by the table of operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxexpand.errors import InexactError
from fxexpand.kernel.algebra import Kernel
from fxexpand.kernel.modules import convolution, norm_kernel
from fxexpand.passes.affine.aliasing import dtype_of, fresh
from fxexpand.passes.affine.constants import Constants, Factor, factor_of
from fxexpand.passes.affine.maps import Map, Place, after, scaling, shifting
from fxexpand.passes.affine.shapes import ONE, Shapes, place_after, recorded
from fxexpand.passes.affine.steps import (
    Affine,
    Concat,
    Identity,
    Layout,
    MultiOutput,
    Select,
    Step,
    Sum,
    averaging,
    padding,
)
from fxexpand.passes.operators.layers import (
    BLOCKS,
    GLOBAL_POOLS,
    PADS,
    POOLS,
    computes_weight,
    is_layer,
    is_norm,
    module_map,
    passes_on,
    pool_call,
)
from fxexpand.passes.operators.table import (
    NORMS_OF_THREE,
    Call,
    call_of,
    part_sizes,
    picked,
    rows_of,
    tuple_of,
)
from fxexpand.recipes import Branches
from fxexpand.recipes.structure import LastDimBatchNorm
from fxexpand.tracing.edit import ModuleUses, tensor_at, works_in_place
from fxexpand.tracing.graphs import hooked


class Reader:
    """Reads the nodes of a graph; see ``step``.

    Attributes:
        dtypes: by node that was read: those of the layer's weight, and of the constants it takes that decide
            on the dtype of its result: neither a number or a tensor without dimensions, nor those of a norm.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.uses = ModuleUses(graph_module)
        self.constants = Constants(graph_module)
        self.shapes = Shapes(graph_module)
        self.dtypes: dict[fx.Node, frozenset[torch.dtype]] = {}
        held = (*graph_module.parameters(), *graph_module.buffers())
        self._mixed = len({tensor.dtype for tensor in held if tensor.is_floating_point()}) > 1

    def read(self, node: fx.Node) -> list[str]:
        """The names of the parameters and buffers that a function or a method reads."""
        if node.op == "call_module":
            return []
        read = [each for each in node.all_input_nodes if each in self.constants]
        return [name for each in read for name in self.constants.sources(each)]

    def tensors(self, node: fx.Node) -> list[Tensor]:
        """The parameters and buffers that a node holds or reads."""
        if node.op == "call_module":
            module = self.graph_module.get_submodule(str(node.target))
            return [*module.parameters(), *module.buffers()]
        return [tensor_at(self.graph_module, name) for name in self.read(node)]

    def step(self, node: fx.Node) -> Step | None:
        """What the node does; None where that is nothing affine.

        Raises: InexactError: it is an affine operator that cannot be folded, and why.
        """
        if node in self.constants:
            return None
        if node.op == "call_module":
            given = [*node.args, *node.kwargs.values()]
            if len(given) != 1 or not isinstance(given[0], fx.Node):
                return None
            return self._module(node, self.graph_module.get_submodule(str(node.target)), given[0])
        call = call_of(node)
        if call is None:
            return None
        found = self._call(node, call)
        if found is not None and works_in_place(self.graph_module, node):
            self._require_private(node)
        if isinstance(found, Affine | Sum):
            if call.name != "batch_norm":
                read = [each for each in node.all_input_nodes if each in self.constants]
                self.dtypes[node] = self._deciding(read)
            self._require_dtype(node, found)
        return found

    def _deciding(self, constants: Sequence[fx.Node]) -> frozenset[torch.dtype]:
        found = (self.constants.dtype(each) for each in constants if len(self.constants.shape(each)))
        return frozenset(dtype for dtype in found if dtype.is_floating_point)

    def _require_dtype(self, node: fx.Node, step: Affine | Sum) -> None:
        """A merged layer wants its own dtype: an image of bytes that is scaled first must stay apart."""
        now = dtype_of(node)
        for value in [step.operand] if isinstance(step, Affine) else [term for term, _ in step.terms]:
            before = dtype_of(value)
            if (known := None not in (before, now)) and before != now:
                raise InexactError(f"it turns {before} into {now}.".replace("torch.", ""))
            has_macs = isinstance(step, Affine) and step.has_macs
            if self._mixed and self.dtypes.get(node) and not known and not has_macs:
                raise InexactError("whether it changes the dtype is not known. Trace with example_inputs.")

    def _require_private(self, node: fx.Node) -> None:
        """A value that is written into must have been read by nobody who may look at it again."""
        target = node.args[0] if node.args else None
        earlier = (
            [user for user in target.users if user is not node] if isinstance(target, fx.Node) else [node]
        )
        if not all(fresh(self.graph_module, user) for user in earlier) or not fresh(
            self.graph_module, target
        ):
            raise InexactError("it writes into a value that is read elsewhere.")

    def _module(self, node: fx.Node, module: nn.Module, x: fx.Node) -> Step | None:
        if passes_on(module):
            return Identity(x) if self.uses.blocker(module) is None else None
        has_macs = is_layer(module) or isinstance(module, Branches)
        if has_macs or is_norm(module) or isinstance(module, BLOCKS):
            blocker = self.uses.blocker(module)
            if blocker is not None:
                raise InexactError(blocker)
            computed = has_macs and computes_weight(module)
            rank = self._rank_of_norm(module, x) if is_norm(module) else None
            if has_macs:
                matrices = (held for held in module.parameters() if held.ndim > 1)  # no norm inside
                self.dtypes[node] = frozenset(held.dtype for held in matrices)
            return Affine(x, module_map(module, rank), has_macs, computed)
        if hooked(module):
            return None
        if type(module) in POOLS:
            return self._pool(pool_call(module, x))
        if type(module) in GLOBAL_POOLS:
            return averaging(x, type(module).__name__)
        if isinstance(module, nn.Flatten):
            return self._view(node, x, Call("flatten", {}))
        if type(module) in PADS:
            held: Any = module
            return padding(x, held.padding, getattr(held, "value", 0.0))
        return None

    def _rank_of_norm(self, module: nn.Module, x: fx.Node) -> int | None:
        if isinstance(module, LastDimBatchNorm):
            return 0
        if type(module) not in (nn.BatchNorm1d, nn.SyncBatchNorm):
            return None
        ndim = self.shapes.ndim(x)
        if ndim is None:
            raise InexactError(
                "whether its channels are the last dimension or the one before is not known, so it is not "
                "merged. Trace with example_inputs."
            )
        return ndim - 2

    def _call(self, node: fx.Node, call: Call) -> Step | None:
        x = call.arguments.get("input")
        if call.name in ("add", "sub", "mul", "div", "neg"):
            return self._arithmetic(call)
        if call.name in ("mean", "sum") and isinstance(x, fx.Node):
            return self._reduced(call, x)
        if call.name == "cat":
            return self._stacked(call)
        if call.name == "stack":
            return MultiOutput() if self._summed(node) else None
        if not isinstance(x, fx.Node) or x in self.constants:
            return None
        if call.name in ("linear", "matmul", "addmm") or call.name.startswith("conv"):
            return self._weighted(call, x)
        if call.name in NORMS_OF_THREE:
            return MultiOutput()
        if call.name == "batch_norm":
            return self._norm(call, x)
        if call.name.startswith("avg_pool"):
            return self._pool(call)
        if call.name.startswith("adaptive_avg_pool"):
            return averaging(x, call.name)
        if call.name in ("pad", "constant_pad_nd"):
            if call.get("mode", "constant") != "constant":
                return None
            return padding(x, call["pad"], call.get("value"))
        if call.name.endswith(("dropout", "dropout1d", "dropout2d", "dropout3d")):
            return Identity(x) if call.get("training", True) is False else None
        if call.name in ("split", "chunk"):
            return MultiOutput()
        if call.name in ("detach", "contiguous", "clone", "alias"):
            return Identity(x)
        if call.name in ("flatten", "reshape", "reshape_as", "permute", "transpose"):
            return self._view(node, x, call)
        if call.name in ("narrow", "index_select", "slice", "getitem"):
            return self._picked(call, x)
        return None

    def _arithmetic(self, call: Call) -> Step | None:
        one, two, alpha = call["input"], call.get("other"), call.get("alpha", 1)
        if call.name == "neg":
            return Affine(one, scaling(-1.0, None, None)) if isinstance(one, fx.Node) else None
        if not isinstance(alpha, int | float):
            return None
        if call.name in ("mul", "div"):
            if self._varies(one) and not self._varies(two):
                return self._scaled(one, two, call.name == "div")
            swapped = call.name == "mul" and self._varies(two) and not self._varies(one)
            return self._scaled(two, one) if swapped else None
        signs = (1.0, float(alpha) if call.name == "add" else -float(alpha))
        terms: list[tuple[fx.Node, Map]] = []
        constants = []
        for value, sign in zip((one, two), signs, strict=True):
            if self._varies(value):
                terms.append((value, scaling(sign, None, None)))
            else:
                constants.append((value, sign))
        if len(terms) == 2:
            return Sum(tuple(terms)) if terms[0][0] is not terms[1][0] else self._doubled(terms)
        if len(terms) != 1 or len(constants) != 1:
            return None
        (value, term), (constant, sign) = terms[0], constants[0]
        found = self._factor(value, constant, sign)
        return None if found is None else Affine(value, after(shifting(*found), term))

    def _doubled(self, terms: Sequence[tuple[fx.Node, Map]]) -> Step:
        """``x + x`` and ``x - x``."""
        factors = [float(term.at(Place(1, 0, torch.device("cpu"))).weight) for _, term in terms]
        return Affine(terms[0][0], scaling(sum(factors), None, None))

    def _scaled(self, value: fx.Node, factor: Any, inverse: bool = False) -> Step | None:
        found = self._factor(value, factor, 1.0, inverse)
        return None if found is None else Affine(value, scaling(*found))

    def _factor(self, value: fx.Node, constant: Any, sign: float, inverse: bool = False) -> Factor | None:
        """What ``value`` is scaled with or shifted by, and stays of the same shape."""
        found = factor_of(self.constants, constant, sign, inverse)
        if found is None or not isinstance(constant, fx.Node):
            return found
        shape, example, dims = self.shapes.of(value), recorded(value), len(self.constants.shape(constant))
        _, channels, rank = found
        if shape is not None and len(shape) < dims:
            raise InexactError(f"it makes {dims} dimensions of {len(shape)}.")
        if channels is not None and rank is not None:
            single = shape is not None and shape[-1 - rank] == ONE
            if single or (example is not None and example[-1 - rank] == 1):
                raise InexactError(f"it makes {channels} channels of one.")
        return found

    def _varies(self, value: object) -> bool:
        return isinstance(value, fx.Node) and value not in self.constants

    def _weighted(self, call: Call, x: fx.Node) -> Step | None:
        product = call.name in ("matmul", "addmm")
        weight, bias = call.get("other" if product else "weight"), call.get("bias")
        if weight not in self.constants or not (bias is None or bias in self.constants):
            return None
        matrix = product or call.name == "linear"
        if matrix and len(self.constants.shape(weight)) != 2:
            return None
        if not self.constants.dtype(weight).is_floating_point:
            return None
        if not all(self.constants.wide(each) for each in (weight, bias) if each is not None):
            raise InexactError("its weight is cast to another dtype on the way, and float64 would not show.")
        bias_shape = None if bias is None else self.constants.shape(bias)
        if bias_shape is not None and any(size != 1 for size in bias_shape[:-1]):
            return None  # another one for each row

        def build(values: Tensor, offset: Tensor | None) -> Kernel:
            if matrix:
                values = values.t() if product else values
                return Kernel(values, None if offset is None else offset.reshape(-1).expand(len(values)))
            return convolution(call.name, values, offset, call.arguments)

        meta = partial(torch.empty, dtype=torch.float64, device="meta")
        shape = build(meta(self.constants.shape(weight)), None if bias_shape is None else meta(bias_shape))

        def leaf(place: Place) -> Kernel:
            if place.device.type == "meta":
                return shape
            value = self.constants.value(weight).to(place.device)
            return build(value, None if bias is None else self.constants.value(bias).to(place.device))

        computed = weight.op != "get_attr"
        return Affine(x, Map(shape.rank, shape.in_channels, shape.out_channels, leaf), True, computed)

    def _norm(self, call: Call, x: fx.Node) -> Step | None:
        if call.get("training", False) is not False:
            raise InexactError(
                "a BatchNorm in training mode uses the statistics of the batch. Call eval() first."
            )
        ndim = self.shapes.ndim(x)
        names = [call.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
        if ndim is None or None in names[:2] or not all(n is None or n in self.constants for n in names):
            return None
        eps, rank = call.get("eps", 1e-5), ndim - 2
        channels = self.constants.shape(names[0])[0]

        def leaf(place: Place) -> Kernel:
            if place.device.type == "meta":
                ones = torch.empty(channels, dtype=torch.float64, device="meta")
                return norm_kernel(ones, ones, None, None, eps, rank, torch.float64)
            mean, variance, gamma, beta = (
                None if name is None else self.constants.value(name).to(place.device) for name in names
            )
            assert mean is not None and variance is not None
            return norm_kernel(mean, variance, gamma, beta, eps, rank, torch.float64)

        return Affine(x, Map(rank, channels, channels, leaf))

    def _pool(self, call: Call) -> Step | None:
        """A convolution with 1 / k² everywhere, or a weighted average that a pointwise map commutes with."""
        x, rank = call["input"], int(call.name[-2])
        size = tuple_of(call["kernel_size"], rank)
        stride = tuple_of(call.get("stride") or call["kernel_size"], rank)
        around = tuple_of(call.get("padding", 0), rank)
        if size is None or stride is None or around is None or call.get("divisor_override") is not None:
            return None
        counted = call.get("count_include_pad", True) is True or not any(around)
        if call.get("ceil_mode", False) or not counted:
            # Every output is an average of what it reads.
            averages = not any(around) or not counted
            option = "count_include_pad=False" if not counted else "ceil_mode=True"
            note = f"an average over windows that are cut at the border ({option}) is no kernel."
            if not averages:
                raise InexactError(note)
            return averaging(x, call.name, note)

        def leaf(place: Place) -> Kernel:
            weight = torch.full(
                (place.channels, 1, *size), 1 / math.prod(size), dtype=torch.float64, device=place.device
            )
            sides = tuple((p, p) for p in around)
            return Kernel(weight, None, stride=stride, padding=sides, groups=place.channels)

        return Affine(x, Map(rank, None, None, leaf), averages=not any(around))

    def _view(self, node: fx.Node, x: fx.Node, call: Call) -> Step | None:
        before, now = self.shapes.of(x), self.shapes.of(node)
        if before is None or now is None:
            return None
        place: Callable[[int], int | None] = partial(place_after, before, now)
        turns = call.name in ("transpose", "permute")
        if turns:
            dims = list(range(len(before)))
            if call.name == "transpose":
                one, two = call["dim0"], call["dim1"]
                dims[one], dims[two] = dims[two], dims[one]
            else:
                dims = [dim % len(before) for dim in call["dims"]]
            place = dims.index

        def moves(rank: int) -> int | None:
            at = None if rank >= len(before) else place(len(before) - 1 - rank)
            return None if at is None else len(now) - 1 - at

        like = call.get("other")
        return Layout(x, moves, keeps_order=not turns, like=like if isinstance(like, fx.Node) else None)

    def _reduced(self, call: Call, x: fx.Node) -> Step | None:
        """The sum or mean of stacked values, and the mean over positions."""
        if not call.given("input", "dim", "keepdim"):
            return None
        dims, keep = call.get("dim"), call.get("keepdim", False)
        parts = self._summed(x)
        if parts is not None and len(x.users) == 1:
            factor = 1.0 / len(parts) if call.name == "mean" else 1.0
            return Sum(tuple((part, scaling(factor, None, None)) for part in parts))
        ndim = self.shapes.ndim(x)
        listed = [dims] if isinstance(dims, int) else dims
        if call.name != "mean" or ndim is None or not isinstance(listed, list | tuple):
            return None
        gone = sorted(dim % ndim for dim in listed)

        def moves(rank: int) -> int | None:
            at = ndim - 1 - rank
            if at in gone or at < 0:
                return None
            return rank if keep else rank - sum(dim > at for dim in gone)

        return Layout(x, moves, averages=True)

    def _summed(self, stack: fx.Node) -> list[fx.Node] | None:
        """The values that are stacked to be summed or averaged, and for nothing else."""
        made, user = call_of(stack), next(iter(stack.users), None)
        taken = None if user is None else call_of(user)
        if made is None or made.name != "stack" or taken is None or taken.name not in ("mean", "sum"):
            return None
        ndim, at, dims = self.shapes.ndim(stack), made.get("dim", 0), taken.get("dim")
        listed = [dims] if isinstance(dims, int) else dims
        if not isinstance(listed, list | tuple) or len(listed) != 1 or taken.get("keepdim", False):
            return None
        same = at == listed[0] or (ndim is not None and at % ndim == listed[0] % ndim)
        parts = list(made["tensors"])
        return parts if same and len(stack.users) == 1 and all(self._varies(part) for part in parts) else None

    def _stacked(self, call: Call) -> Step | None:
        parts, dim = call["tensors"], call.get("dim", 0)
        if not isinstance(parts, list | tuple) or not all(self._varies(part) for part in parts):
            return None
        ndim = self.shapes.ndim(parts[0])
        if not isinstance(dim, int) or (dim >= 0 and ndim is None) or len(parts) < 2:
            return None
        return Concat(tuple(parts), -1 - dim if dim < 0 else (ndim or 0) - 1 - dim)

    def _picked(self, call: Call, x: fx.Node) -> Step | None:
        """Some channels of a value."""
        ndim, cut, dim = self.shapes.ndim(x), None, call.get("dim", 0)
        if call.name == "getitem":
            index, parts = call["index"], call_of(x)
            if parts is not None and parts.name in ("split", "chunk") and isinstance(index, int):
                return self._part(parts, index)
            if parts is not None and parts.name in NORMS_OF_THREE and index == 0:
                return self._norm(parts, parts["input"]) if self._varies(parts["input"]) else None
            found = picked(index, ndim)
            if found is None:
                return None
            dim, cut = found
        elif call.name == "narrow":
            ends = (call["start"], call["length"])
            cut = slice(ends[0], ends[0] + ends[1]) if all(isinstance(e, int) for e in ends) else None
        elif call.name == "slice":
            cut = slice(call.get("start"), call.get("end"), call.get("step"))
        elif call["index"] in self.constants:
            cut = [int(i) for i in self.constants.value(call["index"])]
        if cut is None or not isinstance(dim, int) or (dim >= 0 and ndim is None):
            return None
        return Select(
            x, lambda channels: rows_of(cut, channels), -1 - dim if dim < 0 else (ndim or 0) - 1 - dim
        )

    def _part(self, parts: Call, index: int) -> Step | None:
        x, dim = parts["input"], parts.get("dim", 0)
        ndim = self.shapes.ndim(x) if isinstance(x, fx.Node) else None
        if not self._varies(x) or not isinstance(dim, int) or (dim >= 0 and ndim is None):
            return None

        def rows(channels: int) -> list[int] | None:
            sizes = part_sizes(parts, channels)
            if sizes is None:
                return None
            start = sum(sizes[: index % len(sizes)])
            return list(range(start, start + sizes[index % len(sizes)]))

        return Select(x, rows, -1 - dim if dim < 0 else (ndim or 0) - 1 - dim)
