"""Which architectures there are, and in which order a sweep takes them."""

from __future__ import annotations

import fnmatch
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache

from benchmarks.evidence import FOLDER
from benchmarks.zoo.models import LIBRARIES, Entry

SIZES = FOLDER / "timm_sizes.json"  # parameters by name: to build all 1371 takes minutes

# A spread over files of timm and kinds of network, of which each takes seconds.
QUICK = {
    "timm": (
        *("cait_xxs24_224", "coat_lite_tiny", "convit_tiny", "convnext_atto", "crossvit_9_240"),
        *("cs3darknet_s", "dla46x_c", "edgenext_xx_small", "efficientformerv2_s0", "efficientvit_b0"),
        *("efficientvit_m0", "fasternet_t0", "fastvit_t8", "ghostnet_050", "hardcorenas_a", "iformer_t"),
        *("lcnet_050", "levit_128s", "mobilenetv3_small_050", "mobilevit_xxs", "pvt_v2_b0", "regnetx_002"),
        *("repghostnet_050", "repvit_m0_9", "rexnet_100", "shvit_s1", "starnet_s1", "swiftformer_xs"),
        *(
            "xcit_nano_12_p16_224",
            "test_byobnet",
            "test_nfnet",
            "test_resnet",
            "test_vit",
            "test_coatnet",
            "vit_tiny_patch16_224",
        ),
    ),
    "torchvision": (
        *("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf"),
        *("resnet18", "lraspp_mobilenet_v3_large", "quantized_mobilenet_v2", "raft_small"),
        *("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large", "swin_t"),
    ),
    "transformers": (
        *("albert", "bert", "convnext", "deberta_v2", "detr", "gpt2", "llama", "mixtral", "segformer"),
        *("swin", "t5", "vit", "wav2vec2", "whisper"),
    ),
}


def quick() -> list[Entry]:
    """Sixty architectures, those of them that are installed."""
    return [entry for library, names in QUICK.items() for entry in in_order(library) if entry.name in names]


@cache
def in_order(library: str) -> tuple[Entry, ...]:
    """All architectures of a library.

    Those of timm by rank within their file, so that the smallest of every file come first, then the second.
    """
    if library == "timm":
        return tuple(Entry(library, name) for name in _timm())
    if library == "torchvision":
        from torchvision import models

        return tuple(Entry(library, name) for name in models.list_models())
    from benchmarks.zoo import transformers_models

    return tuple(Entry(library, name) for name in transformers_models.names())


def chosen(patterns: Sequence[str]) -> list[Entry]:
    """The architectures whose ``library``, ``library:name`` or ``name`` a pattern matches, in their order.

    Raises: LookupError: a pattern that matches none.
    """
    found: dict[Entry, None] = {}
    for pattern in patterns:
        library = pattern.partition(":")[0]
        libraries = (library,) if library in LIBRARIES else LIBRARIES  # each takes seconds to import
        known = (entry for name in libraries for entry in in_order(name))
        matching = [entry for entry in known if _matches(entry, pattern)]
        if not matching:
            raise LookupError(
                f"{pattern}: no architecture has that name. Give {', '.join(LIBRARIES)}, or a name or "
                "glob such as timm:vit_*."
            )
        found.update(dict.fromkeys(matching))
    return list(found)


def _matches(entry: Entry, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for text in (entry.library, str(entry), entry.name))


def file_of(name: str) -> str:
    """The file of timm that defines an architecture."""
    from timm.models import _registry

    file: str = _registry._model_to_module[name]
    return file


def _timm() -> Iterator[str]:
    import timm

    sizes = json.loads(SIZES.read_text(encoding="utf-8"))
    files: dict[str, list[str]] = defaultdict(list)
    for name in sorted(timm.list_models(), key=lambda name: (sizes.get(name, 0), name)):
        files[file_of(name)].append(name)
    ranked = [(rank, sizes.get(n, 0), n) for names in files.values() for rank, n in enumerate(names)]
    return (name for *_, name in sorted(ranked))
