"""Small networks with every kind of site, and what tests do to them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def perturb(model: nn.Module) -> nn.Module:
    """Give every normalisation statistics and weights that are not the default."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


def train_steps(model: nn.Module, x: Any, steps: int = 3, lr: float = 1e-2) -> list[float]:
    """A few SGD steps towards zero outputs; the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.5)
    losses = []
    was_training = model.training
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.train(was_training)
    return losses


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[type]]:
    """Everything that must not change when a call fails."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return state, [type(module) for module in model.modules()]


def assert_untouched(model: nn.Module, before: tuple[dict[str, Tensor], list[type]]) -> None:
    """Bit-identical to the snapshot."""
    state, types = before
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(
        torch.equal(
            now[name],
            tensor,
        )
        or now[name].isnan().any()
        for name, tensor in state.items()
    )
    assert [type(module) for module in model.modules()] == types


def fresh(model: Any) -> Any:
    """A deep copy, to compare with."""
    return copy.deepcopy(model)


class ConvNet(nn.Module):
    """Strides, groups, dilation, asymmetric kernels and sizes, norms, a pooled head."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=bias)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.dilated = nn.Conv2d(12, 6, 3, padding="same", dilation=2, padding_mode="circular")
        self.up = nn.ConvTranspose2d(6, 5, 3, stride=2, output_padding=1, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.pointwise(self.depthwise(x)))
        x = torch.tanh(self.up(torch.relu(self.dilated(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Language(nn.Module):
    """Embedding tied to the head, attention, a recurrent layer and plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True, bidirectional=False)
        self.mix = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.heads = nn.Parameter(torch.randn(2, 4, 8) * 0.3)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.recurrent(x)[0]
        x = x + torch.tanh(F.linear(x, self.mix)) + (x.unsqueeze(1) @ self.heads.mT @ self.heads).mean(1)
        logits: Tensor = self.head(self.norm(x))
        return logits


class StandardisedConv2d(nn.Conv2d):
    """A layer with its own forward: the weight is standardised at every call."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
        result: Tensor = self._conv_forward(x, flat.reshape(self.weight.shape), self.bias)
        return result


class Writer(nn.Module):
    """Writes to its input before it reads it: whoever shares that memory sees another one."""

    def __init__(self, inner: int = 64, outer: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x.mul_(2.0))
        return result
