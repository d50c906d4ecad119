"""Sessions of onnxruntime: which provider runs, and what happens where it is not there."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fxexpand.deploy.sessions import open_session
from fxexpand.errors import FxExpandError


def runtime(available: list[str], loaded: list[str]) -> tuple[types.ModuleType, list[list[Any]]]:
    """A stand-in for onnxruntime that has some providers, and loads some of them."""
    asked: list[list[Any]] = []

    class Options(types.SimpleNamespace):
        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries = {**getattr(self, "entries", {}), key: value}

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            asked.append(providers)
            # Sessions that run in turns would otherwise take the cores from each other.
            assert options.entries["session.force_spinning_stop"] == "1"

        def get_providers(self) -> list[str]:
            return loaded

    module: Any = types.ModuleType("onnxruntime")
    module.SessionOptions = Options
    module.get_available_providers = lambda: available
    module.InferenceSession = Session
    return module, asked


TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"


def test_providers_are_asked_for_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    module, asked = runtime([TENSORRT, CUDA, CPU], [TENSORRT, CUDA, CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    open_session(Path("m.onnx"), "cuda:1", tensorrt=True)
    open_session(Path("m.onnx"), "cpu", threads=2)
    assert asked == [[(TENSORRT, {"device_id": 1}), (CUDA, {"device_id": 1}), CPU], [CPU]]


def test_a_provider_that_does_not_load_is_no_silent_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = runtime([CUDA, CPU], [CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    with pytest.raises(FxExpandError, match="cannot load CUDAExecutionProvider"):
        open_session(Path("m.onnx"), "cuda")


@pytest.mark.parametrize(
    ("device", "tensorrt", "message"),
    [
        ("cuda", False, "built without CUDA. Run pip install onnxruntime-gpu"),
        ("cuda", True, "built without Tensorrt"),
        ("cpu", True, "needs a CUDA device, not cpu"),
        ("mps", False, "no provider for mps"),
    ],
)
def test_what_is_missing_is_said(
    device: str, tensorrt: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = runtime([CPU], [CPU])
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    with pytest.raises(FxExpandError, match=message):
        open_session(Path("m.onnx"), device, tensorrt=tensorrt)
