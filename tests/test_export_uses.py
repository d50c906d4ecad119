"""Exports as they are used: arguments of every form, a model that writes to them, opsets, clear errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxexpand.deploy import check_int8, export_onnx
from fxexpand.errors import FxExpandError, SelectionError
from tests.compare import assert_same
from tests.networks import Writer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Batch(nn.Module):
    """Takes a dict, as loops of trainers pass it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, scale: Tensor, batch: dict[str, Tensor]) -> Tensor:
        result: Tensor = self.linear(batch["x"]) * scale - batch["y"]
        return result


class OnlyBatch(Batch):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(torch.ones(()), batch)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_that_writes_to_its_input_is_compared_on_what_was_given(
    dynamic: bool, tmp_path: Path
) -> None:
    """The session reads the memory of the example inputs: a model must not write there before it."""
    x = torch.randn(2, 8)
    before = x.clone()
    found = export_onnx(Writer(8, 4).eval(), tmp_path / "model.onnx", x, dynamic_batch=dynamic)
    assert found.error is not None and found.error < 1e-5
    [result] = check_int8({"writer": Writer(8, 4).eval()}, [x]).results
    assert result.float_error < 1e-5
    assert torch.equal(x, before)


def test_a_dict_may_be_the_last_argument(tmp_path: Path) -> None:
    """torch.onnx takes such a dict for the keywords."""
    batch = {"x": torch.randn(3, 8), "y": torch.randn(3, 4)}
    one = export_onnx(OnlyBatch().eval(), tmp_path / "one.onnx", (batch,))
    two = export_onnx(Batch().eval(), tmp_path / "two.onnx", (torch.ones(3, 1), batch))
    assert one.batch_sizes == two.batch_sizes == (1, 3, 4)
    assert list(one.inputs.values()) == [("batch", 8), ("batch", 4)]


def test_an_opset_is_written_or_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where torch cannot convert to an opset, it logs a traceback and writes another."""
    path = tmp_path / "model.onnx"
    assert export_onnx(nn.Linear(8, 4).eval(), path, torch.randn(2, 8), opset=17).opset == 17
    kept = path.read_bytes()
    with pytest.raises(SelectionError, match=r"opset=99: torch can write this model as \d+, but not"):
        export_onnx(nn.Linear(8, 4).eval(), path, torch.randn(2, 8), opset=99)
    assert path.read_bytes() == kept and [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert "Traceback" not in capfd.readouterr().err


def test_what_onnxruntime_has_no_kernels_for_is_said(tmp_path: Path) -> None:
    model, x = nn.Linear(8, 4).bfloat16().eval(), torch.randn(2, 8).bfloat16()
    with pytest.raises(FxExpandError, match=r"model.onnx: onnxruntime cannot run it: .*verify=False"):
        export_onnx(model, tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())
    found = export_onnx(model, tmp_path / "model.onnx", x, verify=False)
    assert found.path.exists()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=r"is a folder\. Name a file in it"):
        export_onnx(nn.Linear(8, 4).eval(), tmp_path, torch.randn(2, 8))


def test_an_empty_batch_is_refused(tmp_path: Path) -> None:
    for dynamic in (True, False):
        with pytest.raises(SelectionError, match="an empty batch"):
            export_onnx(nn.Linear(3, 2).eval(), tmp_path / "m.onnx", torch.randn(0, 3), dynamic_batch=dynamic)
    assert not list(tmp_path.iterdir())


def test_what_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    link, real = tmp_path / "link.onnx", tmp_path / "data" / "real.onnx"
    link.symlink_to(real)
    report = export_onnx(nn.Linear(3, 2).eval(), link, torch.randn(2, 3), external_data=True)
    assert link.is_symlink() and report.path == real
    assert {file.name for file in real.parent.iterdir()} == {"real.onnx", "real.onnx.data"}


def test_the_weights_of_the_file_that_is_replaced_go_with_it(tmp_path: Path) -> None:
    model, x, path = nn.Linear(64, 32).eval(), torch.randn(2, 64), tmp_path / "m.onnx"
    export_onnx(model, path, x, external_data=True)
    assert (tmp_path / "m.onnx.data").stat().st_size >= 64 * 32 * 4
    export_onnx(model, path, x, external_data=False)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    onnx.checker.check_model(str(path), full_check=True)
    (tmp_path / "m.onnx.data").write_text("of somebody else")  # m.onnx holds its weights itself
    export_onnx(model, path, x, external_data=False)
    assert (tmp_path / "m.onnx.data").read_text() == "of somebody else"
    path.write_text("no ONNX")
    export_onnx(model, path, x, external_data=False)
    assert (tmp_path / "m.onnx.data").read_text() == "of somebody else"


class Returns(nn.Module):
    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.of = nn.Linear(3, 2), of

    def forward(self, x: Tensor) -> Any:
        return self.of(self.linear(x))


@pytest.mark.parametrize(
    ("of", "named"),
    [
        (lambda y: (y, 5), "an int"),
        (lambda y: {"y": y, "name": "scores"}, "a str"),
        (lambda y: (y, y.shape[0]), "an int"),
        (lambda y: (y, {1: SimpleNamespace(cache=y)}), "a SimpleNamespace"),
        (lambda y: None, "no tensor"),
        (lambda y: (), "no tensor"),
    ],
)
def test_an_output_that_is_no_tensor_is_named(
    of: Any, named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FxExpandError, match=f"Returns: returns {named}.*tensors"):
        export_onnx(Returns(of).eval(), tmp_path / "m.onnx", torch.randn(2, 3))
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
    found = export_onnx(Returns(lambda y: (y, None)).eval(), tmp_path / "m.onnx", torch.randn(2, 3))
    assert len(found.outputs) == 1


def test_a_path_with_a_space_and_letters_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "größe 1"
    folder.mkdir()
    model, x = nn.Linear(8, 4).eval(), torch.randn(2, 8)
    export_onnx(model, folder / "a b.onnx", x, external_data=True)
    assert sorted(file.name for file in folder.iterdir()) == ["a b.onnx", "a b.onnx.data"]
    program = onnx.load(str(folder / "a b.onnx"))
    weights = [onnx.numpy_helper.to_array(each) for each in program.graph.initializer]
    assert any(each.shape == (4, 8) for each in weights)
    matrix = next(torch.from_numpy(each.copy()) for each in weights if each.shape == (4, 8))
    assert_same(matrix, model.weight.detach(), 0.0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, factor: float = 1.0, *, plain: bool = True
    ) -> dict[str, Tensor]:
        y = self.conv(x) * factor
        return {"y": y if bias is None else y + bias}


@pytest.mark.skipif(not hasattr(torch.onnx.ONNXProgram, "rename_axes"), reason="this torch cannot rename")
@pytest.mark.parametrize(
    "inputs",
    [
        {"x": torch.randn(2, 3, 9, 7), "factor": 2.0},
        {"bias": torch.randn(2, 4, 1, 1), "x": torch.randn(2, 3, 9, 7), "plain": False},
        (torch.randn(2, 3, 9, 7), None, 3.0),
    ],
    ids=["number", "flag", "none"],
)
def test_dimensions_have_their_names_beside_arguments_that_are_no_tensors(
    inputs: Any, tmp_path: Path
) -> None:
    found = export_onnx(Scaled().eval(), tmp_path / "model.onnx", inputs)
    assert found.inputs["x"] == ("batch", 3, 9, 7)
    [shape] = found.outputs.values()
    assert shape == ("batch", 4, 7, 5)
    if isinstance(inputs, tuple):
        free = export_onnx(Scaled().eval(), tmp_path / "free.onnx", inputs, dynamic_spatial=True)
        assert free.inputs["x"] == ("batch", 3, "height", "width")
