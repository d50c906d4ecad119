"""Random inputs for the models of the transformers library in ``benchmarks.transformers_configs``."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = dict[str, Any]

VOCABULARY = 96
LENGTH = 11


def tokens(length: int = LENGTH, *, batch: int = 2, low: int = 5, high: int = VOCABULARY) -> Tensor:
    """Random token ids above the special ones."""
    return torch.randint(low, high, (batch, length))


def text(**more: Any) -> Inputs:
    """Tokens, with the end of the second row masked."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": tokens(), "attention_mask": mask, **more}


def causal() -> Inputs:
    """Tokens, with the start of the second row masked, as generation wants it."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def whole() -> Inputs:
    """Tokens, with a mask that hides none of them."""
    return plain() | {"attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}


def plain() -> Inputs:
    """Tokens alone."""
    return {"input_ids": tokens()}


def pairs() -> Inputs:
    """Tokens for an encoder and for a decoder."""
    return text(decoder_input_ids=tokens(7))


def image(size: int = 32, channels: int = 3) -> Inputs:
    """Random pixels."""
    return {"pixel_values": torch.randn(2, channels, size, size)}


def image_and_text() -> Inputs:
    """Pixels and tokens."""
    return image() | text()


def wave() -> Inputs:
    """A random sound."""
    return {"input_values": torch.randn(2, 800)}


def whisper() -> Inputs:
    """A spectrogram, and tokens for the decoder."""
    return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": tokens(6)}


def llava() -> Inputs:
    """Tokens, some of which stand for the patches of an image."""
    ids = tokens(24, high=VOCABULARY - 1)
    ids[:, 2:18] = VOCABULARY - 1  # one token per patch of the image
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | image()


def sam() -> Inputs:
    """An image and points in it."""
    return image(64) | {"input_points": torch.rand(2, 1, 3, 2) * 60}


def video() -> Inputs:
    """Three frames."""
    return {"pixel_values": torch.randn(2, 3, 3, 32, 32)}


def masked_image() -> Inputs:
    """Pixels, and the noise that says which patches are hidden."""
    return image() | {"noise": torch.rand(2, 16)}
