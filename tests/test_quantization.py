"""int8: ranges against sums done by hand, and what onnxruntime's quantiser makes of two networks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from fxexpand import Chain, expand, factorize, fuse
from fxexpand.deploy.quantization import check_int8, weight_ranges
from fxexpand.errors import SelectionError, UnusableWeightError
from tests.networks import perturb


def network() -> nn.Sequential:
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5))
    model = nn.Sequential(*layers)
    perturb(model)
    return model.eval()


def test_ranges_by_hand() -> None:
    layer = nn.Linear(2, 3, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[1.0, 0.5], [127.0, 10.0], [2.0, 1.0]]))
    found = weight_ranges(layer).rows[""][0]
    assert found is not None
    assert found.largest == 127.0 and found.spread == 127.0 / 2.0
    # One scale of 1 per tensor: 0.5 becomes 0. Per channel the steps are 1/127, 1 and 2/127.
    assert found.error_tensor == pytest.approx((0.5**2 / 1.25 / 3) ** 0.5)
    squares = [(0.5 - 64 / 127) ** 2 / 1.25, 0.0, (1.0 - 64 * 2 / 127) ** 2 / 5.0]
    assert found.error_channel == pytest.approx((sum(squares) / 3) ** 0.5)


def test_transposed_layers_have_their_outputs_second() -> None:
    layer = nn.ConvTranspose1d(4, 6, 2, groups=2, bias=False)  # weight: (4, 3, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[0:2, 1] = 3.0  # the second output of the first group
    found = weight_ranges(layer).rows[""][0]
    assert found is not None
    assert found.spread == 3.0 and found.error_channel == pytest.approx(0.0, abs=1e-12)
    assert found.error_tensor > 1e-3
    silent = nn.Linear(3, 2)
    nn.init.zeros_(silent.weight)
    nothing = weight_ranges(silent).rows[""][0]
    assert nothing is not None and nothing.error_tensor == nothing.error_channel == 0.0


def test_fusing_a_norm_of_unlike_channels_widens_the_range() -> None:
    model = network()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    norm.running_var[3] = 1e-6
    report = weight_ranges(model, fuse(model))
    before, after = report.rows["0"]
    assert before is not None and after is not None
    assert after.spread > 50 * before.spread and after.error_tensor > 5 * before.error_tensor
    assert after.error_channel < 2 * before.error_channel
    assert report.widened == ("0",)
    same = report.rows["4"]
    assert same[0] == same[1]
    text = str(report)
    assert "1 layers lose" in text and "spread'" in text
    assert json.loads(json.dumps(report.to_dict()))["layers"]["0"]["after"]["spread"] == after.spread
    alone = weight_ranges(model)
    assert alone.rows["0"][1] is None and alone.widened == () and " - " in str(alone)


@pytest.mark.slow
def test_int8_of_two_forms(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    model = network()
    inputs: list[Tensor] = [torch.randn(4, 3, 5, 5) for _ in range(4)]
    models = {"plain": model, "fused": fuse(model)}
    fine = check_int8(models, inputs, samples=[torch.randn(8, 3, 5, 5)])
    coarse = check_int8({"fused": models["fused"]}, inputs, per_channel=False)
    assert [each.model for each in fine.results] == ["plain", "fused"]
    for each in (*fine.results, *coarse.results):
        assert 1e-4 < each.error < 0.5 and each.float_error < 1e-5
        assert 0.0 <= each.agreement <= 1.0
    assert coarse.results[0].size < fine.results[1].size, "a scale per channel takes more room"
    assert (fine.calibration, fine.samples, coarse.samples) == (4, 1, 4)
    text = str(fine)
    assert "one scale per channel, calibrated on 4 inputs" in text and "same class" in text
    assert json.loads(json.dumps(fine.to_dict()))["results"][0]["model"] == "plain"
    assert capfd.readouterr().out == ""


def test_batches_of_a_loader_and_of_one_shape() -> None:
    """A loader is iterated, not indexed; a file that is exported once takes one shape."""
    model, images = {"one": network()}, torch.randn(5, 3, 5, 5)
    found = check_int8(model, (part for part in torch.split(images, 2)))
    assert (found.calibration, found.samples) == (3, 3)
    assert found == check_int8(model, torch.split(images, 2))
    with pytest.raises(SelectionError, match="inputs of batchx3x5x5 and of batchx3x5x6; only the batch may"):
        check_int8(model, [images, torch.randn(2, 3, 5, 6)])
    with pytest.raises(SelectionError, match="only the batch may differ"):
        check_int8(model, [images], samples=[torch.randn(2, 3, 6, 5)])


def test_no_inputs_is_an_error() -> None:
    with pytest.raises(SelectionError, match="no inputs"):
        check_int8({"a": network()}, [])
    with pytest.raises(SelectionError, match="no inputs"):
        check_int8({"a": network()}, [torch.randn(1, 3, 5, 5)], samples=[])


def test_an_expanded_layer_counts_by_its_effective_weight_and_a_factored_one_by_its_factors() -> None:
    model = network()
    expanded = expand(model, Chain(depth=2, batch_norm=True)).train()
    assert list(weight_ranges(expanded).rows) == ["0", "4"] and expanded.training
    for name, (before, _) in weight_ranges(model).rows.items():
        after = weight_ranges(expand(model)).rows[name][0]
        assert before is not None and after is not None
        assert after.largest == pytest.approx(before.largest, rel=1e-5)
    assert list(weight_ranges(factorize(model, rank=2)).rows) == ["0.0", "0.1", "4.0", "4.1"]
    assert list(weight_ranges(expand(nn.Linear(3, 2))).rows) == [""]


def test_a_weight_without_a_range_is_named() -> None:
    model = network()
    nn.init.constant_(model.get_parameter("4.weight"), float("nan"))
    with pytest.raises(UnusableWeightError, match=r"4\.weight \(Linear\): holds NaN"):
        weight_ranges(model)
    with pytest.raises(UnusableWeightError, match=r"0\.weight \(Conv2d\): is on the meta device"):
        weight_ranges(network().to("meta"))


@pytest.mark.slow
def test_outputs_that_are_all_zero_have_an_error() -> None:
    pytest.importorskip("onnxruntime")
    layer = nn.Linear(4, 3, bias=False).eval()
    nn.init.zeros_(layer.weight)
    found = check_int8({"zero": layer}, [torch.randn(2, 4)])
    assert found.results[0].error == found.results[0].float_error == 0.0
    assert "nan" not in str(found)
