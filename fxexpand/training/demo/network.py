"""The network of the demo, and of every example that needs a small one: ``fxexpand.demo:Digits``."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Digits(nn.Module):
    """Three convolutions with BatchNorm and two Linear layers: ``(batch, 1, 8, 8)`` to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(64)
        self.fc1 = nn.Linear(64 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.conv1(x)))
        x = functional.max_pool2d(functional.relu(self.norm2(self.conv2(x))), 2)
        x = functional.max_pool2d(functional.relu(self.norm3(self.conv3(x))), 2)
        logits: Tensor = self.fc2(functional.relu(self.fc1(x.flatten(1))))
        return logits


NETWORK = (
    "three 3x3 convolutions (1 to 32 to 64 to 64 channels, each with BatchNorm and ReLU, two of them with "
    "2x2 max-pooling) and two Linear layers (256 to 64 to 10)"
)
