"""ONNX files: what onnxruntime computes from them, and what a failure leaves behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxexpand import export
from fxexpand.errors import FxExpandError, RefusedError, SelectionError, VerificationError
from fxexpand.export import export_onnx
from tests.compare import assert_different, assert_same

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Network(nn.Module):
    """Two inputs, a dict of outputs, statistics that are not the default, height != width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        for name, tensor in self.norm.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else 0.1))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        hidden = torch.relu(self.norm(self.conv(x)))
        logits = self.head(hidden.mean((2, 3)))
        return {"logits": logits if scale is None else logits * scale, "hidden": hidden}


@pytest.fixture
def model() -> Network:
    return Network().eval()


def run(path: Path, *values: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


@pytest.mark.parametrize("batch", [1, 4])
def test_the_file_computes_the_model_at_any_batch_size(
    model: Network, tmp_path: Path, batch: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export_onnx(model, path, torch.randn(batch, 3, 9, 7))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr().out == ""
    for size in (1, 2, 7):
        x = torch.randn(size, 3, 9, 7)
        logits, hidden = run(path, x)
        expected = model.double()(x.double())
        model.float()
        assert_same(logits, expected["logits"].float(), rel=1e-5)
        assert_same(hidden, expected["hidden"].float(), rel=1e-5)
        assert_different(logits * 1.001, expected["logits"], rel=5e-4)
    assert report.path == path and report.size == path.stat().st_size
    assert report.batch_sizes == ((1, 2, 3) if batch == 1 else (1, 4, 5))
    assert report.error is not None and report.tolerance is not None
    assert report.error <= 1e-6 < report.tolerance == 1e-4
    (shape,) = report.inputs.values()
    assert shape == ("batch", 3, 9, 7)
    assert [shape[0] for shape in report.outputs.values()] == ["batch", "batch"]
    assert report.operators["Conv"] == report.operators["Gemm"] == report.operators["Relu"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "Conv" in str(report) and "batch x 3 x 9 x 7" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["operators"] == dict(report.operators)


def test_keyword_arguments_and_a_fixed_batch(model: Network, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    x, scale = torch.randn(2, 3, 9, 7), torch.randn(2, 1)
    free = export_onnx(model, path, {"x": x, "scale": scale})
    assert free.inputs == {"x": ("batch", 3, 9, 7), "scale": ("batch", 1)}
    assert_same(run(path, x, scale)[0], model(x, scale)["logits"], rel=1e-5)
    fixed = export_onnx(model, path, (x, scale), dynamic_batch=False, opset=20)
    assert fixed.inputs == {"x": (2, 3, 9, 7), "scale": (2, 1)}
    assert fixed.batch_sizes == () and fixed.error is not None and fixed.opset == 20
    assert_same(run(path, x, scale)[0], model(x, scale)["logits"], rel=1e-5)


def test_without_verification_nothing_is_claimed(
    model: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 9, 7), verify=False)
    assert report.error is None and report.tolerance is None
    assert "not compared" in str(report)
    with pytest.raises(FxExpandError, match=r"onnxruntime is not installed.*fxexpand\[onnx\]"):
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 9, 7))


@pytest.mark.parametrize("part", ["", "norm"])
def test_training_mode_is_refused_by_name(model: Network, tmp_path: Path, part: str) -> None:
    model.get_submodule(part).training = True
    with pytest.raises(
        RefusedError, match=r"(Network|norm \(BatchNorm2d\)): in training mode.*model\.eval\(\)"
    ):
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 9, 7))
    assert not list(tmp_path.iterdir())


def test_a_kernel_off_by_a_tenth_of_a_percent_is_caught_and_the_old_file_stays(
    model: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an older file")
    write = export._write

    def write_another(model: nn.Module, *rest: object) -> None:
        assert isinstance(model, Network)
        with torch.no_grad():
            model.conv.weight *= 1.001
        write(model, *rest)  # type: ignore[arg-type]
        with torch.no_grad():
            model.conv.weight /= 1.001

    monkeypatch.setattr(export, "_write", write_another)
    with pytest.raises(
        VerificationError, match=r"relative error 0\.00\d+ at batch size 1 .* Nothing was written"
    ):
        export_onnx(model, path, torch.randn(2, 3, 9, 7))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"an older file"


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 3, 2) * 2


def test_a_model_with_a_fixed_batch_says_what_to_do(tmp_path: Path) -> None:
    model = FixedBatch().eval()
    with pytest.raises(Exception) as caught:
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 6))
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "dynamic_batch=False" in text
    assert not list(tmp_path.iterdir())
    export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 6), dynamic_batch=False)


def test_large_weights_go_to_a_second_file(
    model: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SINGLE_FILE_BYTES", 0)
    path = tmp_path / "model.onnx"
    x = torch.randn(3, 3, 9, 7)
    report = export_onnx(model, path, x)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert report.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert_same(run(path, x)[0], model(x)["logits"], rel=1e-5)


def test_other_errors(model: Network, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="does not exist"):
        export_onnx(model, tmp_path / "no" / "model.onnx", torch.randn(2, 3, 9, 7))
    with pytest.raises(SelectionError, match="no tensor with a batch dimension"):
        export_onnx(nn.Identity().eval(), tmp_path / "model.onnx", torch.tensor(1.0))


@pytest.mark.gpu
def test_a_model_on_the_gpu_is_compared_on_the_cpu(model: Network, tmp_path: Path) -> None:
    report = export_onnx(model.cuda(), tmp_path / "model.onnx", torch.randn(2, 3, 9, 7, device="cuda"))
    assert report.error is not None and report.error <= 1e-5
