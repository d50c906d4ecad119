"""ONNX files: what onnxruntime computes from them, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand.deploy import export_onnx
from fxexpand.deploy.onnx_files import fingerprint
from fxexpand.deploy.onnx_writing import write_onnx
from fxexpand.errors import FxExpandError, RefusedError, SelectionError, VerificationError
from tests.compare import assert_different, assert_same

onnx = pytest.importorskip("onnx")
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

    def write_another(model: nn.Module, *rest: Any) -> Any:
        assert isinstance(model, Network)
        with torch.no_grad():
            model.conv.weight *= 1.001
        program = write_onnx(model, *rest)
        with torch.no_grad():
            model.conv.weight /= 1.001
        return program

    monkeypatch.setattr("fxexpand.deploy.onnx.write_onnx", write_another)
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
    monkeypatch.setattr("fxexpand.deploy.onnx_writing.SINGLE_FILE_BYTES", 0)
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


def test_fused_first_and_compared_with_the_original(model: Network, tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.one(x) + self.two(x))

    network, x = Branches().eval(), torch.randn(2, 3, 9, 7)
    path = tmp_path / "model.onnx"
    report = export_onnx(network, path, x, fuse=True, compare_with=network, metadata={"owner": "me"})
    assert report.operators == {"Conv": 1, "Relu": 1}
    assert report.operators_before == {"Conv": 2, "Add": 1, "Relu": 1}
    text = str(report)
    assert (
        re.search(r"Conv +2 +1", text) and re.search(r"Add +1 +0", text) and re.search(r"total +4 +2", text)
    )
    assert_same(run(path, x)[0], network(x), rel=1e-5)
    assert isinstance(network.two, nn.Conv2d), "the model was changed"
    held = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert held.items() >= report.metadata.items() and held["owner"] == "me"
    assert held["fxexpand.source"].endswith("Branches") and "1 fused" in held["fxexpand.report"]
    assert "one" in held["fxexpand.changed"] and held["torch.version"] == torch.__version__
    assert held["fxexpand.source_sha256"] == fingerprint(network)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["operators_before"]["Conv"] == 2 and plain["files"] == [str(path)]


def test_the_hash_is_that_of_every_weight(model: Network) -> None:
    first = fingerprint(model)
    assert len(first) == 64 and fingerprint(model) == first
    with torch.no_grad():
        model.head.bias[2] += 1e-6
    second = fingerprint(model)
    assert model.norm.num_batches_tracked is not None
    model.norm.num_batches_tracked += 1
    assert len({first, second, fingerprint(model), fingerprint(model.bfloat16())}) == 4


def test_free_spatial_sizes(model: Network, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = export_onnx(model, path, torch.randn(2, 3, 9, 7), dynamic_spatial=True)
    assert list(report.inputs.values()) == [("batch", 3, "height", "width")]
    x = torch.randn(5, 3, 14, 21)
    assert_same(run(path, x)[0], model(x)["logits"], rel=1e-5)
    square = export_onnx(model, path, torch.randn(2, 3, 8, 8), dynamic_batch=False, dynamic_spatial=True)
    assert list(square.inputs.values()) == [(2, 3, "height", "width")]
    rows, columns = (torch.export.Dim(name, min=1) for name in ("rows", "columns"))  # torch 2.9 asks for it
    given = export_onnx(
        model, path, torch.randn(2, 3, 8, 8), dynamic_shapes={"x": {2: rows, 3: columns}}, verify=False
    )
    assert list(given.inputs.values()) == [(2, 3, "rows", "columns")]
    with pytest.raises(SelectionError, match="no tensor with spatial dimensions"):
        export_onnx(nn.Linear(3, 2).eval(), path, torch.randn(2, 3), dynamic_spatial=True)


def test_a_size_that_is_not_free_is_found_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2)).eval()
    with pytest.raises(FxExpandError, match=r"does not take 2 x 3 x 36 x 36.*dynamic_spatial=False"):
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 4, 4), dynamic_spatial=True)
    assert not list(tmp_path.iterdir())


def test_an_operator_that_onnx_lacks(tmp_path: Path) -> None:
    import onnxscript

    op = onnxscript.opset18

    @torch.library.custom_op("fxexpand_tests::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    @doubled.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.ops.fxexpand_tests.doubled(x) + 1
            return result

    def translated(x: Any) -> Any:
        return op.Add(x, x)

    path, x = tmp_path / "model.onnx", torch.randn(2, 3)
    with pytest.raises(FxExpandError, match=r"no operator for fxexpand_tests.doubled.*translations=.*opset"):
        export_onnx(Model().eval(), path, x)
    assert not list(tmp_path.iterdir())
    report = export_onnx(
        Model().eval(), path, x, translations={torch.ops.fxexpand_tests.doubled.default: translated}
    )
    assert report.error is not None and report.error < 1e-6


def test_files_move_together_or_not_at_all(
    model: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, x = tmp_path / "model.onnx", torch.randn(2, 3, 9, 7)
    report = export_onnx(model, path, x, external_data=True)
    assert [file.name for file in report.files] == ["model.onnx", "model.onnx.data"]
    assert "with model.onnx.data" in str(report)
    assert_same(run(path, x)[0], model(x)["logits"], rel=1e-5)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        model.head.weight *= 2
    replace, moved = os.replace, []

    def full(source: Path, place: Path) -> None:
        moved.append(Path(place).name)
        if Path(place) == path:
            monkeypatch.setattr(os, "replace", replace)
            raise OSError(28, "No space left on device")
        replace(source, place)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(model, path, x, external_data=True)
    assert "model.onnx.data" in moved, "nothing was moved before the failure"
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_breaks_the_standard_is_no_file(model: Network, tmp_path: Path) -> None:
    with pytest.raises(FxExpandError, match=r"no valid ONNX: .*bfloat16.*another dtype"):
        export_onnx(model.bfloat16(), tmp_path / "m.onnx", torch.randn(2, 3, 9, 7).bfloat16(), verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_model_on_the_gpu_is_compared_on_the_cpu(model: Network, tmp_path: Path) -> None:
    report = export_onnx(model.cuda(), tmp_path / "model.onnx", torch.randn(2, 3, 9, 7, device="cuda"))
    assert report.error is not None and report.error <= 1e-5
