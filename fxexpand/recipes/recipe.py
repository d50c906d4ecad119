"""What every recipe provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from fxexpand.kernel.algebra import Kernel

Init: TypeAlias = Literal["preserve", "matched", "kaiming"]
INITS: tuple[Init, ...] = get_args(Init)


class Recipe(ABC):
    """How one kernel becomes a trainable block of stock modules; subclasses are frozen dataclasses."""

    @abstractmethod
    def build(
        self, kernel: Kernel, *, init: Init = "preserve", generator: torch.Generator | None = None
    ) -> nn.Sequential:
        """The training-time block in place of ``kernel``.

        Args:
            kernel: what to replace; its bias, if any, goes onto the last factor.
            init: ``"preserve"``: the block computes what the kernel did (in eval mode, where it holds
                BatchNorm); ``"matched"``: random factors whose product has the kernel's Frobenius norm;
                ``"kaiming"``: random factors as in the recipe's paper.
            generator: of every random draw; None takes torch's global one. Draws are made on the generator's
                device, so that a seed means the same on every device.

        Returns:
            A block with the kernel's dtype and device, which folds by ``fold``. On the meta device it has
            shapes only.

        Raises:
            InexactError: the recipe cannot represent the kernel; the message is the reason.
        """

    @property
    def needs_activations(self) -> bool:
        """Whether the block must see activations (it holds BatchNorm), so that no weight stands for it."""
        return False
