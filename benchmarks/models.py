"""The networks that the benchmarks run on, by name, and how they are built small enough to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fxexpand.running.inputs import ExampleInputs, call

# One of each family, in a small variant.
TIMM = [
    "bat_resnext26ts",
    "beit_base_patch16_224",
    "botnet26t_256",
    "caformer_s18",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "coatnet_0_rw_224",
    "convit_tiny",
    "convmixer_768_32",
    "convnext_atto",
    "crossvit_9_240",
    "cs3darknet_s",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla34",
    "dm_nfnet_f0",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "hardcorenas_a",
    "hgnet_tiny",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "inception_next_atto",
    "lcnet_050",
    "legacy_seresnet18",
    "levit_128s",
    "mambaout_femto",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobileone_s0",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nest_tiny",
    "nextvit_small",
    "pit_ti_224",
    "pvt_v2_b0",
    "regnetx_002",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m0_9",
    "res2net50_14w_8s",
    "resnest14d",
    "resnetv2_50",
    "rexnet_100",
    "selecsls42",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s1",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "tiny_vit_5m_224",
    "tnt_s_patch16_224",
    "tresnet_m",
    "twins_pcpvt_small",
    "vgg11",
    "visformer_tiny",
    "vit_relpos_small_patch16_224",
    "vit_tiny_patch16_224",
    "vitamin_small_224",
    "volo_d1_224",
    "vovnet39a",
    "wide_resnet50_2",
    "xception41",
    "xcit_nano_12_p16_224",
]

SIZES = (64, 96, 128, 160)  # tried in this order before the network's own
# Built for 456 pixels, it ends in maps of 2 x 2 at 64: normalised by the statistics of so few values, it is
# 8e-3 off in float32 before any surgery (1e-4 at 96).
AT_LEAST = {"torchvision:efficientnet_b5": 96}


# All 32 encoder layers, expanded and in float64, take more than 23 GB; they are alike.
ENCODER_LAYERS = {"torchvision:vit_h_14": 8}


@dataclass(frozen=True)
class Network:
    """A network of a library, and the arguments it is built with."""

    library: str
    name: str

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    def build(self, size: int | None = None) -> nn.Module:
        """With random weights; ``size`` goes to those that are built for one image size."""
        options: dict[str, Any] = {}
        if self.library == "timm":
            import timm

            if size is not None:
                options["img_size"] = size
            model: nn.Module = timm.create_model(self.name, **options)
            return model
        import torchvision

        builder = torchvision.models.get_model_builder(self.name)
        if size is not None:
            options["image_size"] = size
        if self.name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        model = builder(weights=None, **options)
        layers = ENCODER_LAYERS.get(str(self))
        if layers is not None:
            encoder: Any = model.encoder
            encoder.layers = encoder.layers[:layers]
        return model

    def parameters(self) -> int:
        """The number of parameters."""
        if self.library == "torchvision":
            import torchvision

            weights: Any = torchvision.models.get_model_weights(self.name)
            return int(next(iter(weights)).meta["num_params"])
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())

    def smallest(self) -> tuple[int, int | None]:
        """(image size, size to build with or None): the smallest at which it runs, on the meta device."""
        for size in SIZES:
            if size < AT_LEAST.get(str(self), 0):
                continue
            for built in (None, size):
                if runs(partial(self.build, built), partial(torch.empty, 2, 3, size, size)):
                    return size, built
        return self._own_size(), None

    def _own_size(self) -> int:
        if self.library == "timm":
            import timm

            shape = timm.get_pretrained_cfg(self.name)
            return int(shape.input_size[-1]) if shape is not None else 224
        return 299 if self.name == "inception_v3" else 224


def runs(build: Callable[[], nn.Module], inputs: Callable[[], ExampleInputs], device: str = "meta") -> bool:
    """Whether a network takes such inputs in training mode; on the meta device if it can be built there."""
    try:
        with torch.device(device), torch.no_grad():
            call(build().train(), inputs())
    except NotImplementedError:  # a constructor that reads the values of tensors
        return device == "meta" and runs(build, inputs, "cpu")
    except Exception:  # whatever a library raises at a size that it does not take
        return False
    return True


def torchvision_networks() -> list[Network]:
    """Every classification network of torchvision."""
    import torchvision

    return [
        Network("torchvision", name) for name in torchvision.models.list_models(module=torchvision.models)
    ]


def timm_networks() -> list[Network]:
    """One network of each of many timm families."""
    import timm

    known = set(timm.list_models())
    return [Network("timm", name) for name in TIMM if name in known]
