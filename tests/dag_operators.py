"""Random networks: the operators they are drawn from, and the two functions that draw one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.dags import Builder, Choose, Dag, IdlePath

CONV: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
CONV_TRANSPOSE: dict[int, type[nn.ConvTranspose1d | nn.ConvTranspose2d]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
}
POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d}


def _idle(b: Builder, i: int) -> int | None:
    """What does nothing in evaluation mode."""
    kind = b.choose(7)
    if kind < 4:
        drop = nn.Dropout2d(0.3) if b.values[i].ndim == 4 else nn.Dropout(0.3)
        return b.call([nn.Identity(), drop, IdlePath(), nn.AlphaDropout(0.2)][kind], i)
    if kind == 4:
        return b.step("{0}.detach()", lambda _, x: x.detach(), i)
    if kind == 5:
        return b.step("{0}.contiguous()", lambda _, x: x.contiguous(), i)
    return b.step("{0}.to(float64)", lambda _, x: x.to(torch.float64), i)


def _scalar(b: Builder, i: int) -> int | None:
    c = b.number()
    forms: list[tuple[str, Callable[..., Any]]] = [
        (f"{{0}} * {c}", lambda _, x: x * c),
        (f"{c} * {{0}}", lambda _, x: c * x),
        (f"{{0}} / {c}", lambda _, x: x / c),
        (f"{{0}} + {c}", lambda _, x: x + c),
        (f"{c} - {{0}}", lambda _, x: c - x),
        ("-{0}", lambda _, x: -x),
        ("torch.neg({0})", lambda _, x: torch.neg(x)),
        (f"torch.sub({{0}}, {c}, alpha=2)", lambda _, x: torch.sub(x, c, alpha=2)),
        (f"{{0}}.mul({c})", lambda _, x: x.mul(c)),
        (f"torch.div({{0}}, {c})", lambda _, x: torch.div(x, c)),
    ]
    if _writable(b, i):
        forms += [
            (f"{{0}}.mul_({c})", lambda _, x: x.mul_(c)),
            (f"{{0}}.add_({c})", lambda _, x: x.add_(c)),
            (f"{{0}}.div_({c})", lambda _, x: x.div_(c)),
        ]
    return b.step(*b.pick(forms), i)


def _writable(b: Builder, i: int) -> bool:
    """Whether steps may write into a value: not into the input of the network, nor a view of it."""
    return b.values[i].untyped_storage().data_ptr() != b.values[0].untyped_storage().data_ptr()


def _channelwise(b: Builder, i: int) -> int | None:
    """A constant for each channel; now and then for each position."""
    x = b.values[i]
    name = b.constant(b.normal(*x.shape[1:])) if b.chance(8) else b.per_channel(x)
    forms: list[tuple[str, Callable[..., Any]]] = [
        (f"{{0}} * {name}", lambda net, x: x * getattr(net, name)),
        (f"{name} * {{0}}", lambda net, x: getattr(net, name) * x),
        (f"{{0}} + {name}", lambda net, x: x + getattr(net, name)),
        (f"{{0}} / {name}", lambda net, x: x / getattr(net, name)),
        (f"{name} - {{0}}", lambda net, x: getattr(net, name) - x),
    ]
    if _writable(b, i):
        forms.append((f"{{0}}.mul_({name})", lambda net, x: x.mul_(getattr(net, name))))
    return b.step(*b.pick(forms), i)


def _divisors(b: Builder, inp: int, out: int) -> int:
    return b.pick([1, 1, math.gcd(inp, out)])


def _conv(b: Builder, i: int) -> int | None:
    x = b.values[i]
    rank = x.ndim - 2
    if rank < 1:
        return _linear(b, i)
    inp, out = x.shape[1], b.pick([1 + b.choose(6), x.shape[1], 2 * x.shape[1]])
    groups, bias = _divisors(b, inp, out), b.chance(2)
    kernel, stride = b.each(rank, (1, 3, 2)), b.each(rank, (1, 1, 2))
    dilation = b.each(rank, (1, 1, 2))
    padding: Any = b.each(rank, (0, 1, 1, 2))
    if b.chance(6):
        weight = b.constant(b.normal(out, inp // groups, *kernel) / math.sqrt(inp * math.prod(kernel)))
        offset = b.constant(b.normal(out)) if bias else None
        convolve: Callable[..., Tensor] = F.conv1d if rank == 1 else F.conv2d
        return b.step(
            f"F.conv{rank}d({{0}}, {weight}, {offset}, {stride}, {padding}, {dilation}, {groups})",
            lambda net, x: convolve(
                x, getattr(net, weight), offset and getattr(net, offset), stride, padding, dilation, groups
            ),
            i,
        )
    if b.chance(5):
        stride, padding = (1,) * rank, "same"
    mode = b.pick(["zeros"] * 5 + ["reflect", "replicate", "circular"])
    built: Any = CONV[rank]  # its arguments are tuples as long as the rank
    return b.call(built(inp, out, kernel, stride, padding, dilation, groups, bias, mode), i)


def _conv_transpose(b: Builder, i: int) -> int | None:
    x = b.values[i]
    rank = x.ndim - 2
    if rank < 1:
        return None
    inp, out = x.shape[1], 1 + b.choose(5)
    stride, dilation = b.each(rank, (1, 2)), b.each(rank, (1, 1, 2))
    extra = tuple(b.choose(max(s, d)) for s, d in zip(stride, dilation, strict=True))
    built: Any = CONV_TRANSPOSE[rank]
    padding, groups = b.each(rank, (0, 1)), _divisors(b, inp, out)
    kernel = b.each(rank, (2, 3, 1))
    return b.call(built(inp, out, kernel, stride, padding, extra, groups, b.chance(2), dilation), i)


def _linear(b: Builder, i: int) -> int | None:
    inp, out = b.values[i].shape[-1], 1 + b.choose(6)
    kind = b.choose(8)
    if kind < 5:
        return b.call(nn.Linear(inp, out, bias=b.chance(2)), i)
    one = b.constant(b.normal(out, inp) / math.sqrt(inp))
    if kind == 5:
        return b.step(f"{{0}} @ {one}.T", lambda net, x: x @ getattr(net, one).T, i)
    if kind == 6:
        offset = b.constant(b.normal(out))
        return b.step(
            f"F.linear({{0}}, {one}, {offset})",
            lambda net, x: F.linear(x, getattr(net, one), getattr(net, offset)),
            i,
        )
    two = b.constant(b.normal(out, inp) / math.sqrt(inp))
    return b.step(
        f"F.linear({{0}}, {one} + 2 * {two})",
        lambda net, x: F.linear(x, getattr(net, one) + 2 * getattr(net, two)),
        i,
    )


def _norm(b: Builder, i: int) -> int | None:
    x = b.values[i]
    channels, kind = x.shape[1], b.choose(10)
    if kind < 8:
        built = nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d
        return b.call(built(channels, affine=not b.chance(3), eps=b.pick([1e-5, 1e-3])), i)
    if kind == 8:
        return b.call(nn.LayerNorm(x.shape[-1]), i)
    mean, variance = b.constant(b.normal(channels)), b.constant(0.5 + b.normal(channels).abs())
    return b.step(
        f"F.batch_norm({{0}}, {mean}, {variance})",
        lambda net, x: F.batch_norm(x, getattr(net, mean), getattr(net, variance), eps=1e-3),
        i,
    )


def _add(b: Builder, i: int) -> int | None:
    """A sum or a difference of two values of one shape."""
    x = b.values[i]
    others = [j for j, value in b.values.items() if value.shape == x.shape and j != i]
    if not others:
        return None
    return _sum_of_two(b, i, b.pick(others))


def _sum_of_two(b: Builder, i: int, j: int) -> int | None:
    def plus(_: Any, x: Any, y: Any) -> Any:
        x += y
        return x

    c = b.number()
    forms: list[tuple[str, Callable[..., Any]]] = [
        ("{0} + {1}", lambda _, x, y: x + y),
        ("{0} - {1}", lambda _, x, y: x - y),
        (f"torch.add({{0}}, {{1}}, alpha={c})", lambda _, x, y: torch.add(x, y, alpha=c)),
        (f"torch.sub({{0}}, {{1}}, alpha={c})", lambda _, x, y: torch.sub(x, y, alpha=c)),
        ("{0}.add({1})", lambda _, x, y: x.add(y)),
        (f"({{0}} + {{1}}) / {c}", lambda _, x, y: (x + y) / c),
        ("torch.stack(({0}, {1})).mean(0)", lambda _, x, y: torch.stack((x, y)).mean(0)),
        (
            "torch.stack(({0}, {1}), dim=1).sum(dim=1)",
            lambda _, x, y: torch.stack((x, y), dim=1).sum(dim=1),
        ),
    ]
    if _writable(b, i):
        forms += [("{0} += {1}", plus), ("{0}.sub_({1})", lambda _, x, y: x.sub_(y))]
    return b.step(*b.pick(forms), i, j)


def _branches(b: Builder, i: int) -> int | None:
    """Maps of one value with the same geometry, summed or stacked on the channels."""
    x = b.values[i]
    rank, inp = x.ndim - 2, x.shape[1]
    out, k, s = b.pick([inp, 1 + b.choose(4)]), b.pick([3, 1, 5]), b.pick([1, 1, 2])
    ends: list[int] = []
    for _ in range(2 + b.choose(3)):
        end: int | None = i
        kind = b.choose(7) if rank else 0
        built: Any = CONV.get(rank)
        if not rank:
            end = b.call(nn.Linear(x.shape[-1], out, bias=b.chance(2)), i)
        elif kind < 2:
            groups = _divisors(b, inp, out)
            end = b.call(built(inp, out, k, s, k // 2, groups=groups, bias=b.chance(2)), i)
        elif kind == 2:
            end = b.call(built(inp, out, 1, s, bias=b.chance(2)), i)
        elif kind == 3:
            end = b.call(built(inp, out, 3, s, 2, dilation=2, bias=b.chance(2)), i)
        elif kind == 4:
            end = b.call(built(inp, out, 1, bias=False), i)
            end = None if end is None else b.call(built(out, out, k, s, k // 2), end)
        elif kind == 5:
            end = _average(b, i, 3, s, 1)
        if end is not None and b.chance(2):
            end = _norm(b, end)
        if end is not None and (not ends or b.values[ends[0]].shape == b.values[end].shape):
            ends.append(end)
    if len(set(ends)) < 2:
        return None
    if b.chance(5):
        names = ", ".join(f"{{{n}}}" for n in range(len(ends)))
        return b.step(f"torch.cat(({names}), dim=1)", lambda _, *xs: torch.cat(xs, dim=1), *ends)
    total: int | None = ends[0]
    for end in ends[1:]:
        if total is not None and end != total:
            total = _sum_of_two(b, total, end)
    return total


def _average(b: Builder, i: int, k: int, s: int, p: int) -> int | None:
    rank, ceil, count = b.values[i].ndim - 2, b.chance(4), not b.chance(3)
    if b.chance(2):
        built: Any = nn.AvgPool1d if rank == 1 else nn.AvgPool2d
        return b.call(built(k, s, p, ceil, count), i)
    return b.step(
        f"F.avg_pool{rank}d({{0}}, {k}, {s}, {p}, {ceil}, {count})",
        lambda _, x: POOL[rank](x, k, s, p, ceil, count),
        i,
    )


def _pool(b: Builder, i: int) -> int | None:
    if b.values[i].ndim < 3:
        return None
    k = b.pick([2, 3])
    return _average(b, i, k, b.pick([1, k, 2]), b.choose(2))


def _pad(b: Builder, i: int) -> int | None:
    """Zeros on some sides, mostly; other values, other modes and crops now and then."""
    x = b.values[i]
    rank = x.ndim - 2
    sides = [b.pick([0, 1, 1, 2]) for _ in range(2 * rank)]
    kind = b.choose(8)
    if not rank or not any(sides):
        return None
    if kind < 2:
        built: Any = (nn.ConstantPad1d if rank == 1 else nn.ConstantPad2d) if kind else None
        built = built or (nn.ZeroPad1d if rank == 1 else nn.ZeroPad2d)
        return b.call(built(tuple(sides), 0.0) if kind else built(tuple(sides)), i)
    if kind == 5:
        return b.step(f"F.pad({{0}}, {sides}, 'replicate')", lambda _, x: F.pad(x, sides, "replicate"), i)
    value = 0.7 if kind == 6 else 0.0
    if kind == 7:
        sides[0] = -1
    if kind == 4:
        sides += [0, 1]  # channels
    return b.step(f"F.pad({{0}}, {sides}, value={value})", lambda _, x: F.pad(x, sides, value=value), i)


def _cat(b: Builder, i: int) -> int | None:
    x = b.values[i]
    fits = [j for j, v in b.values.items() if v.ndim == x.ndim and (v[:, 0].shape == x[:, 0].shape)]
    j = b.pick(fits)
    return b.step("torch.cat([{0}, {1}], 1)", lambda _, x, y: torch.cat([x, y], 1), i, j)


def _part(b: Builder, i: int) -> int | None:
    """Some of the channels, or all of them in parts."""
    channels, kind = b.values[i].shape[1], b.choose(6)
    if kind == 0:
        count = -(-channels // -(-channels // 2))
        return b.step("{0}.chunk(2, 1)", lambda _, x: x.chunk(2, 1), i, outputs=count)
    if kind == 1 and channels > 1:
        sizes = [1, channels - 1]
        return b.step(f"torch.split({{0}}, {sizes}, dim=1)", lambda _, x: x.split(sizes, dim=1), i, outputs=2)
    if kind == 2:
        order = [(3 * n + 1) % channels for n in range(max(1, channels - 1))]
        return b.step(f"{{0}}[:, {order}]", lambda _, x: x[:, order], i)
    if kind == 3:
        start = b.choose(channels)
        return b.step(f"{{0}}[:, {start}:]", lambda _, x: x[:, start:], i)
    if kind == 4:
        return b.step("{0}[:, ::2]", lambda _, x: x[:, ::2], i)
    return b.step("{0}.narrow(1, 0, 1)", lambda _, x: x.narrow(1, 0, 1), i)


def _reshape(b: Builder, i: int) -> int | None:
    """Another layout, as in front of a Linear."""
    rank, kind = b.values[i].ndim - 2, b.choose(6)
    if rank == 0:
        return b.step("{0}.unsqueeze(-1)", lambda _, x: x.unsqueeze(-1), i)
    if kind == 0:
        return b.step("{0}.flatten(1)", lambda _, x: x.flatten(1), i)
    if kind == 1:
        dims = tuple(range(2, 2 + rank))
        return b.step(f"{{0}}.mean({dims})", lambda _, x: x.mean(dims), i)
    if kind == 2:
        order = (0, *range(2, 2 + rank), 1)
        return b.step(f"{{0}}.permute{order}", lambda _, x: x.permute(order), i)
    if kind == 3:
        return b.step("{0}.transpose(1, -1)", lambda _, x: x.transpose(1, -1), i)
    if kind == 4:
        return b.step("{0}.flatten(2).transpose(1, 2)", lambda _, x: x.flatten(2).transpose(1, 2), i)
    return b.step("{0}.reshape({0}.shape[0], -1)", lambda _, x: x.reshape(x.shape[0], -1), i)


def _activation(b: Builder, i: int) -> int | None:
    kind = b.choose(5)
    if kind == 0:
        return b.step("torch.tanh({0})", lambda _, x: torch.tanh(x), i)
    if kind == 1:
        return b.step("F.relu({0})", lambda _, x: F.relu(x), i)
    return b.call(nn.ReLU(inplace=kind == 3 and _writable(b, i)), i)


def _again(b: Builder, i: int) -> int | None:
    """A second call of a module."""
    names = list(b.network._modules)
    if not names:
        return None
    name = b.pick(names)
    return b.step(f"{name}({{0}})", lambda net, x: net.get_submodule(name)(x), i)


# By weight; the first is the simplest.
OPERATORS: list[Callable[[Builder, int], int | None]] = [
    _idle,
    *[_scalar] * 2,
    *[_conv] * 5,
    *[_norm] * 4,
    *[_linear] * 2,
    *[_channelwise] * 2,
    *[_add] * 3,
    *[_branches] * 5,
    *[_activation] * 2,
    _conv_transpose,
    _pool,
    _pad,
    _cat,
    _part,
    _reshape,
    _again,
]


def random_dag(choose: Choose, steps: int = 14) -> tuple[Dag, Tensor]:
    """A network of some operators, and an input, in float64 and in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what modules draw before their weights are filled
        builder = Builder(choose)
        for _ in range(1 + choose(steps)):
            operator = builder.pick(OPERATORS)
            operator(builder, builder.source())
        return builder.finish()


def seeded_dag(seed: int, steps: int = 14) -> tuple[Dag, Tensor]:
    """The network of a seed."""
    return random_dag(random.Random(seed).randrange, steps)
