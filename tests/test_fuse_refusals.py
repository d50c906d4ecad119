"""A site that cannot be fused is refused with its reason, and never stops the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxexpand
from fxexpand import Chain, RefusedError, fuse, report
from fxexpand.kernel import Kernel
from fxexpand.layers.expanded import Expanded
from fxexpand.passes import Fuse
from fxexpand.tracing import trace
from tests.compare import assert_same
from tests.networks import perturb


def two_sites() -> Any:
    first = (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    model = nn.Sequential(*first, nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return perturb(model.double().eval())


@pytest.mark.parametrize(
    "name", ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_site_with_nan_stays_and_the_other_is_fused(name: str, value: float) -> None:
    model, x = two_sites(), torch.randn(2, 3, 8, 7, dtype=torch.float64)
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] = value
    for small in (fuse(model), Fuse()(trace(model)).graph_module):
        assert isinstance(small.get_submodule("1"), nn.BatchNorm2d)
        assert not isinstance(getattr(small, "4", None), nn.BatchNorm2d)
        with torch.no_grad():
            assert torch.allclose(small(x), model(x), equal_nan=True)
    path, _, attribute = name.partition(".")
    (row,) = [row for row in report(fuse(model)).refusals if row.site == path]
    assert row.reason.startswith(f"its {attribute} holds NaN or Inf")
    with pytest.raises(RefusedError, match=rf"^{path} \(.*{attribute} holds NaN or Inf"):
        fuse(model, strict=True)


def test_nan_in_all_outputs_does_not_hide_the_reason() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Softmax(-1)).eval()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    small = fuse(model, torch.randn(2, 3))
    assert [(row.site, row.reason) for row in report(small).refusals] == [
        ("0", "its weight holds NaN or Inf. Load a sound checkpoint")
    ]


@pytest.mark.parametrize("verify", [True, False])
def test_a_kernel_beyond_float16_is_refused(verify: bool) -> None:
    model = two_sites().float()
    with torch.no_grad():  # the channel hardly varies, so that its shift is divided by almost nothing
        model[0].weight.mul_(1e-3)
        model[1].bias.fill_(1.0)
        model[3].weight[0] = 300 / 45
        model[4].running_mean[0], model[4].running_var[0] = 300.0, 1e-6
    model.half()
    x = torch.rand(2, 3, 8, 7).half()
    assert bool(torch.isfinite(model(x)).all())
    small = fuse(model, x, verify=verify)
    assert not isinstance(small[1], nn.BatchNorm2d) and isinstance(small[4], nn.BatchNorm2d)
    assert {row.reason for row in report(small).refusals} == {
        "the bias of one kernel would not be finite in torch.float16"
    }
    with pytest.raises(RefusedError, match="would not be finite"):
        fuse(model, x, strict=True)


def test_a_probe_that_fails_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> float:
        raise RuntimeError("not implemented for 'Double'\nmore")

    monkeypatch.setattr("fxexpand.passes.fusions.fold_error", failing)
    model = two_sites()
    assert {row.reason for row in report(fuse(model)).refusals} == {
        "it cannot be checked: not implemented for 'Double'"
    }


def test_rounding_is_a_reason_to_refuse_and_a_wrong_law_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rounding(before: nn.Module, after: nn.Module, kernel: Kernel, *_: object) -> float:
        return 0.5 * (kernel.out_channels == 5 and kernel.weight.dtype == torch.float16)

    monkeypatch.setattr("fxexpand.passes.fusions.fold_error", rounding)
    small = fuse(two_sites().half())
    assert [row.site for row in report(small).changed] == ["3"]
    assert {row.site for row in report(small).refusals} == {"0", "1"}
    monkeypatch.setattr("fxexpand.passes.fusions.fold_error", lambda *_: 0.5)
    with pytest.raises(fxexpand.VerificationError, match=r"^0: the rewritten site differs by a relative"):
        fuse(two_sites().half())


def test_an_expansion_with_nan_stays_and_the_others_are_folded() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 5), nn.Embedding(7, 5), nn.Linear(5, 3)).double()
    big = fxexpand.expand(model, Chain())
    with torch.no_grad():
        big[0].expansion[1].weight.fill_(float("nan"))
        big[1].parametrizations["weight"].original1.fill_(float("inf"))
    small = fuse(big, scope="expanded")
    assert isinstance(small[0], Expanded) and type(small[2]) is nn.Linear
    assert_same(small[2].weight, model[2].weight, 1e-10)
    assert {row.site: row.reason.partition(". ")[0] for row in report(small).refusals} == {
        "0": "its factor 1.weight holds NaN or Inf",
        "1.weight": "its factor original1 holds NaN or Inf",
    }
    with pytest.raises(RefusedError, match="holds NaN or Inf"):
        fuse(big, scope="expanded", strict=True)
    with pytest.raises(RefusedError, match="holds NaN or Inf"):
        fxexpand.fused_state_dict(big)
