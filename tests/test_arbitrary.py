"""Networks of kinds that no library holds: exact, or refused with the reason."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxexpand
from fxexpand import Chain
from tests.compare import assert_same
from tests.journeys import EXACT, journey, same


class MessagePassing(nn.Module):
    """As in torch-geometric: messages along edges, gathered at their targets."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.message = nn.Linear(2 * features + 3, out)
        self.update = nn.Linear(features, out)
        self.attention = nn.Parameter(torch.randn(1, out))
        self.theta = nn.Parameter(torch.randn(features, out))

    def forward(self, x: Tensor, edges: Tensor, attributes: Tensor) -> Any:
        source, target = edges
        messages = self.message(torch.cat([x[source], x[target], attributes], -1))
        scores = (messages * self.attention).sum(-1).exp()
        total = torch.zeros(len(x), dtype=x.dtype).scatter_add(0, target, scores)
        weighted = messages * (scores / total[target])[:, None]
        gathered = torch.zeros(len(x), messages.shape[-1], dtype=x.dtype).index_add_(0, target, weighted)
        return gathered + self.update(x) + x @ self.theta


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MessagePassing(5, 8), MessagePassing(8, 8)])
        self.norms = nn.ModuleDict({"0": nn.BatchNorm1d(8), "1": nn.BatchNorm1d(8)})
        self.readout = nn.Linear(8, 4)

    def forward(self, x: Tensor, edges: Tensor, attributes: Tensor, batch: Tensor | None = None) -> Any:
        for i, layer in enumerate(self.layers):
            x = F.relu(self.norms[str(i)](layer(x, edges, attributes)))
        if batch is None:
            return self.readout(x)
        size = int(batch.max()) + 1
        pooled = torch.zeros(size, x.shape[1], dtype=x.dtype).index_add_(0, batch, x)
        return self.readout(pooled)


def test_a_graph_network_with_message_passing() -> None:
    x, edges = torch.randn(6, 5).double(), torch.randint(6, (2, 14))
    inputs = (x, edges, torch.randn(14, 3).double(), torch.tensor([0, 0, 1, 1, 1, 2]))
    # Two Linears and a matrix per layer, and the readout; the row of attention scores is no matrix.
    journey(GraphNetwork(), inputs, sites=7)


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, channels), nn.GroupNorm(2, out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.embed = nn.Linear(time, 2 * out)
        self.dropout = nn.Dropout(0.1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Any:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.embed(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class SpatialAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.qkv, self.out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Any:
        b, c, *size = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2)).chunk(3, dim=1)
        attention = torch.einsum("bct,bcs->bts", q, k).div(c**0.5).softmax(-1)
        return x + self.out(torch.einsum("bts,bcs->bct", attention, v)).reshape(b, c, *size)


class DiffusionUNet(nn.Module):
    def __init__(self, channels: int = 4, time: int = 6) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        self.label = nn.Embedding(3, time)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList([Residual(channels, 8, time), Residual(8, 8, time)])
        self.shrink = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Residual(8, 8, time), SpatialAttention(8), Residual(8, 8, time)])
        self.grow = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.up = nn.ModuleList([Residual(16, 8, time), Residual(8, channels, time)])
        self.head = nn.Sequential(nn.GroupNorm(2, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))
        self.channels = channels

    def forward(self, x: Tensor, steps: Tensor, *, label: Tensor | None = None) -> dict[str, Tensor]:
        rates = torch.exp(-torch.arange(self.channels // 2, dtype=x.dtype))
        angles = steps[:, None].to(x.dtype) * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        if label is not None:
            time = time + self.label(label)
        h = self.stem(x)
        for block in self.down:
            h = block(h, time)
        skip, h = h, self.shrink(h)
        for part in self.middle:
            h = part(h, time) if isinstance(part, Residual) else part(h)
        h = torch.cat([self.grow(h), skip], dim=1)
        for block in self.up:
            h = block(h, time)
        return {"noise": self.head(h), "time": time}


def test_a_diffusion_u_net() -> None:
    inputs = {
        "x": torch.randn(2, 3, 8, 8).double(),
        "steps": torch.tensor([3, 70]),
        "label": torch.tensor([0, 2]),
    }
    model = DiffusionUNet()
    fused = journey(model, inputs, sites=30)
    del inputs["label"]
    same(fused, model, inputs)  # the argument that may be left out may still be left out


def test_a_gan_generator() -> None:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.ConvTranspose2d(inputs, outputs, 4, stride, stride - 1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(True)]

    last = [nn.ConvTranspose2d(6, 3, 3, 2, 1, output_padding=1), nn.Tanh()]
    model = nn.Sequential(*block(7, 12, 1), *block(12, 8, 2), *block(8, 6, 2), *last)
    fused = journey(model, torch.randn(2, 7, 1, 1).double(), sites=4)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())


def gated(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return F.linear(x, weight, bias) * torch.sigmoid(x.sum())


@cache
def scripted_gate() -> Any:
    """Not an attribute of the network: torch cannot copy scripted functions."""
    return torch.jit.script(gated)


class PartlyScripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.own = nn.Linear(5, 6), nn.Linear(6, 7)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(7, 8), nn.ReLU()))
        self.after = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Any:
        return self.after(self.scripted(scripted_gate()(self.before(x), self.own.weight, self.own.bias)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_scripted_parts_are_refused_and_the_rest_is_not() -> None:
    fused = journey(PartlyScripted(), torch.randn(3, 5).double(), sites=3, refused=1)
    assert fused.get_submodule("after.0").get_parameter("bias").shape == (4,)
    refusals = fxexpand.report(fxexpand.expand(PartlyScripted())).refusals
    assert [(row.site, row.reason) for row in refusals] == [
        ("scripted.0", "TorchScript is compiled. Expand before scripting")
    ]


class ScaledProduct(torch.autograd.Function):
    """x W^T, whose gradient by x is doubled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Any:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight, grad.T @ x


PRODUCT: Any = ScaledProduct.apply


class CustomFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(7, 3)
        self.weight = nn.Parameter(torch.randn(7, 6))

    def forward(self, x: Tensor) -> Any:
        return self.last(PRODUCT(self.first(x), self.weight))


def test_custom_autograd_functions_keep_their_gradient() -> None:
    model, x = CustomFunctions().double(), torch.randn(3, 5).double()
    fused = journey(model, x, sites=3)
    assert set(fused.state_dict()) == set(model.state_dict())  # nothing is merged through it
    big = fxexpand.expand(model, Chain(depth=2, width=1), example_inputs=x)
    gradients = []
    for network in (model, big):
        given = x.clone().requires_grad_()
        network(given).square().sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    assert_same(gradients[1], gradients[0], EXACT)


class Fourier(nn.Module):
    """A layer of a Fourier neural operator: complex weights between real layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.project = nn.Linear(2, 6), nn.Linear(6, 1)
        self.spectral = nn.Parameter(torch.randn(6, 6, 4, dtype=torch.complex128))
        self.mix = nn.Linear(6, 6, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Any:
        h = torch.fft.rfft(self.lift(x).mT)
        h = torch.cat([torch.einsum("bim,iom->bom", h[..., :4], self.spectral), h[..., 4:]], -1)
        h = self.mix(h.mT).mT
        return self.project(torch.fft.irfft(h, n=x.shape[1]).mT)


def test_complex_weights_are_refused_and_the_rest_is_not() -> None:
    model = Fourier()
    big = fxexpand.expand(model, Chain(depth=2, width=1))
    assert {row.site: row.reason for row in fxexpand.report(big).refusals} == {
        "spectral": "complex weights are not supported",
        "mix": "complex weights are not supported",
    }
    model.lift.double(), model.project.double()
    x = torch.randn(2, 10, 2).double()
    big = fxexpand.expand(model, Chain(depth=3, width=1), example_inputs=x)
    assert len(fxexpand.report(big).changed) == 2
    for network in (big, fxexpand.fuse(big, scope="expanded"), fxexpand.fuse(model.eval(), x)):
        same(network, model, x)


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=False)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.whole = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=7, batch_first=True)
        self.lstm = nn.LSTM(8, 5, num_layers=2, bidirectional=True, proj_size=3, batch_first=True)
        self.gru = nn.GRU(6, 4, batch_first=True)
        self.cell = nn.LSTMCell(4, 5)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Any:
        x = self.encoder(x, src_key_padding_mask=mask)
        x = self.whole(x, x)
        x = x + self.cross(x, y[..., :6], y, need_weights=False)[0]
        x, _ = self.gru(self.lstm(x)[0])
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return state[0]


@pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning")
def test_attention_and_recurrence() -> None:
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 2:] = True
    model = Attended()
    for part in model.modules():  # draws of dropout inside fused attention differ between forms
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    x, y = torch.randn(2, 4, 8).double(), torch.randn(2, 3, 7).double()
    journey(model, (x, y), sites=38)
    model.eval()
    big = fxexpand.expand(model, Chain(depth=2, width=1))
    for network in (big, fxexpand.fuse(big)):
        same(network, model, (x, y, mask))
