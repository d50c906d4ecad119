"""The interface of recipes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from fxexpand.kernel.algebra import Kernel

Init: TypeAlias = Literal["preserve", "matched", "kaiming"]
INITS: tuple[Init, ...] = get_args(Init)


class Recipe(ABC):
    """A rule that turns a kernel into a trainable block of stock modules. Recipes are frozen dataclasses."""

    @abstractmethod
    def build(
        self, kernel: Kernel, *, init: Init = "preserve", generator: torch.Generator | None = None
    ) -> nn.Sequential:
        """The training-time block that replaces ``kernel``.

        Args:
            kernel: the kernel to replace; its bias, if any, goes onto the last factor.
            init: ``"preserve"``: the block computes the same map (in evaluation mode, if it has BatchNorm);
                ``"matched"``: random factors whose product has the kernel's Frobenius norm; ``"kaiming"``:
                random factors as in the recipe's paper.
            generator: source of every random draw; None takes torch's global one. Draws are made on the
                device of the generator, so that a seed gives the same numbers for every device.

        Returns:
            A block with the kernel's dtype and device, which ``fold`` folds. On the meta device it has shapes
            only.

        Raises:
            InexactError: the recipe cannot represent the kernel; the message is the reason.
        """

    @property
    def needs_activations(self) -> bool:
        """Whether the block must run on activations, as it has a BatchNorm; no weight can replace it then."""
        return False
