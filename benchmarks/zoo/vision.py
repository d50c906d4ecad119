"""Every network of torchvision with inputs of its kind: images, clips, pairs, images with targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import SIZES
from benchmarks.zoo.cases import CLASSES, Case, fitted, images, shortened
from fxexpand.running.inputs import ExampleInputs

# Proposals and detections of a random network are noise: a few will do.
FEW = {
    "rpn_pre_nms_top_n_train": 64,
    "rpn_pre_nms_top_n_test": 64,
    "rpn_post_nms_top_n_train": 16,
    "rpn_post_nms_top_n_test": 16,
    "box_detections_per_img": 4,
    "box_batch_size_per_image": 16,
}
# (frames, pixels) of a clip, where the default does not do: S3D pools over 2 x 7 x 7 cells at an eighth of
# the frames and a thirty-second of the pixels; MViT has positions of one size.
CLIPS = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}
HIDDEN = 128  # in place of 4096 in the classifiers of AlexNet and VGG


def vision(name: str) -> Case:
    """The construction and the call of a network of ``torchvision.models.list_models()``."""
    from torchvision import models

    builder = models.get_model_builder(name)
    kind = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    make = {
        "detection": _detector,
        "segmentation": _segmenter,
        "video": _video,
        "optical_flow": _flow,
    }.get(kind, _classifier)
    return make(name, partial(builder, weights=None))


def _classifier(name: str, builder: Callable[..., nn.Module]) -> Case:
    options: dict[str, Any] = {"num_classes": CLASSES}
    if name.startswith("quantized_"):
        options["quantize"] = False
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    sizes = (*SIZES, 224, 299)
    return fitted(
        partial(_narrow, builder), [options], lambda side: images(2, 3, side, side), sizes, "image_size"
    )


def _narrow(builder: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """AlexNet and VGG with few hidden units in the classifier, which has 100 M parameters otherwise."""
    model = builder(**options)
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Sequential):
        return model
    layers = {i: module for i, module in enumerate(classifier) if isinstance(module, nn.Linear)}
    if len(layers) == 3:
        first, _, last = layers.values()
        widths = (first.in_features, HIDDEN, HIDDEN, last.out_features)
        for place, taken, given in zip(layers, widths[:-1], widths[1:], strict=True):
            classifier[place] = nn.Linear(taken, given)
    return model


def _segmenter(name: str, builder: Callable[..., nn.Module]) -> Case:
    options: dict[str, Any] = {"weights_backbone": None, "num_classes": CLASSES}
    if not name.startswith("lraspp"):
        options["aux_loss"] = True
    return fitted(builder, [options], lambda side: images(2, 3, side, side), SIZES, "image_size")


def _video(name: str, builder: Callable[..., nn.Module]) -> Case:
    frames, side = CLIPS.get(name, (4, 64))
    build = partial(builder, num_classes=CLASSES)
    return shortened(build, lambda: images(2, 3, frames, side, side), f"{frames} x {side}")


def _flow(name: str, builder: Callable[..., nn.Module]) -> Case:
    side = 128  # an eighth of it is pooled three times

    def pair() -> ExampleInputs:
        one, two = images(2, 2, 3, side, side)
        return {"image1": one, "image2": two, "num_flow_updates": 2}

    return shortened(builder, pair, str(side))


def _detector(name: str, builder: Callable[..., nn.Module]) -> Case:
    options: dict[str, Any] = {"weights_backbone": None, "num_classes": CLASSES}
    if "rcnn" in name:
        options |= FEW
    if name.startswith("keypoint"):
        options["num_classes"] = 2
    elif not name.startswith("ssd"):  # those resize to the size they are built for
        options |= {"detections_per_img": 4} if "rcnn" not in name else {}
    if not name.startswith("ssd"):
        options |= {"min_size": 64, "max_size": 96}
    build = partial(builder, **options)
    pictures = [torch.sigmoid(picture) for picture in (images(3, 64, 96), images(3, 80, 64))]
    targets = [_target(picture, name) for picture in pictures]
    return Case(build, (pictures,), (pictures, targets), "64 x 96" if "min_size" in options else "300")


def _target(picture: Tensor, name: str) -> dict[str, Tensor]:
    """Two objects: boxes, classes and, where they are asked for, masks or keypoints."""
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 12.0, 60.0, 60.0]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    if name.startswith("mask"):
        masks = torch.zeros(2, *picture.shape[-2:], dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        found["masks"] = masks
    if name.startswith("keypoint"):
        corner, extent = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
        places = corner + extent * torch.linspace(0.1, 0.9, 17)[None, :, None]
        found["keypoints"] = torch.cat([places, torch.ones(2, 17, 1)], -1)
    return found
