"""The architectures of timm, torchvision and transformers, each built small enough to be checked in seconds.

Small means: the smallest image size that a network takes, 16 classes, and of long runs of equal blocks a few
where the network is large. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.models import SIZES
from benchmarks.zoo.cases import CLASSES, Case, fitted, images

LIBRARIES = ("timm", "torchvision", "transformers")


@dataclass(frozen=True)
class Entry:
    """An architecture by name."""

    library: str
    name: str

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    def case(self) -> Case:
        """How it is built and called.

        Raises: RuntimeError: no input size is known that it takes.
        """
        if self.library == "timm":
            return _timm(self.name)
        if self.library == "torchvision":
            from benchmarks.zoo.vision import vision

            return vision(self.name)
        from benchmarks.zoo import transformers_models

        model, inputs = transformers_models.build(self.name)
        also = _generated if transformers_models.generates(model) else None
        return Case(partial(_transformer, self.name), inputs, inputs, also=also)


def _timm(name: str) -> Case:
    import timm

    config = timm.get_pretrained_cfg(name)
    channels, own = (
        (int(config.input_size[0]), int(config.input_size[-1])) if config is not None else (3, 224)
    )
    case = fitted(
        partial(timm.create_model, name),
        [{"num_classes": CLASSES}, {}],
        lambda side: images(2, channels, side, side),
        (*(size for size in SIZES if size < own), own),
        "img_size",
    )
    return replace(case, also=_features)


def _features(model: Any, inputs: Any) -> Any:
    return model.forward_features(inputs)


def _transformer(name: str) -> nn.Module:
    from benchmarks.zoo import transformers_models

    return transformers_models.build(name)[0]


def _generated(model: nn.Module, inputs: Any) -> Tensor:
    from benchmarks.zoo import transformers_models

    return transformers_models.generate(model, inputs)
