"""Options that configurations of one family in the transformers library share, small ones.

Widths differ from one another where the architecture allows, so that a transposed weight shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.zoo.transformers_inputs import VOCABULARY, Inputs


@dataclass(frozen=True)
class Entry:
    """The construction of a model.

    Attributes:
        model, config: names of classes in transformers.
        options: of the configuration.
        inputs: makes the keyword arguments of the forward.
        nested: sub-configurations, by the option that takes each: a class name and its options.
    """

    model: str
    config: str
    options: Inputs
    inputs: Callable[[], Inputs]
    nested: tuple[tuple[str, str, Inputs], ...] = ()


def bert(**more: Any) -> Inputs:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    } | more


def llama(**more: Any) -> Inputs:
    return bert(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)


def vit(**more: Any) -> Inputs:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    } | more


def bart(**more: Any) -> Inputs:
    return {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": 40,
    } | more


def detr(**more: Any) -> Inputs:
    return {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
    } | more


def rwkv() -> Inputs:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "context_length": 40,
    }


def resnet(**more: Any) -> Inputs:
    return {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]} | more


CLIP_TEXT = bert(projection_dim=24, bos_token_id=1, eos_token_id=VOCABULARY - 1, pad_token_id=0)
CLIP_VISION = vit(projection_dim=24)
