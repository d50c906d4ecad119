"""Reports: what they count, print and give to JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxexpand
from fxexpand import Chain, expand, fuse, report
from fxexpand.reporting.rows import Report, Row
from tests.networks import ConvNet, Language


def test_the_table_names_every_site_with_its_figures() -> None:
    big = expand(Language(), select={"*": Chain(depth=2, width=1), "mix": None})
    found = report(big)
    text = str(found)
    assert text.splitlines()[0] == found.summary == "expand: 6 expanded, 2 left"
    assert "no weight of a linear map: used by add" in text and "not selected" in text
    assert "Chain(depth=2, width=1" in text and "shared by tokens.weight, head.weight" in text
    row = next(row for row in found.rows if row.site == "tokens.weight")
    assert row.params_before == 88 and row.params_after == 8 * 11 + 8 * 8
    assert row.error is not None and row.error < 1e-6
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["action"] == "left"
    fused = report(fuse(big, scope="expanded"))
    assert fused.summary == "fuse: 6 fused"
    assert {r.params_after for r in fused.rows if r.site == "tokens.weight"} == {88}


def test_a_report_travels_with_copies_and_is_missing_where_nothing_was_done() -> None:
    import copy

    big = expand(ConvNet())
    assert report(copy.deepcopy(big)) == report(big)
    with pytest.raises(fxexpand.FxExpandError, match=r"Sequential: has no report. Call fxexpand.expand"):
        report(nn.Sequential())


def test_messages_are_sentences() -> None:
    row = Row("layer1.conv2", "Conv2d 64->64 k3 p1", "refused", "zero padding follows a bias.")
    assert row.message == "layer1.conv2 (Conv2d 64->64 k3 p1): not changed: zero padding follows a bias."
    empty = Report("fuse", ())
    assert str(empty) == "fuse: no site" and not empty.refusals and empty.worst_error is None


def test_the_probe_sees_a_tenth_of_a_percent() -> None:
    from fxexpand.kernel.modules import kernel_of
    from fxexpand.running.verify import block_error

    for layer in (nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)):
        layer = layer.double()
        block = Chain().build(kernel_of(layer))
        assert block_error(block, kernel_of(layer)) < 1e-12
        with torch.no_grad():
            block[1].weight.mul_(1.001)  # type: ignore[operator]
        assert 5e-4 < block_error(block, kernel_of(layer)) < 2e-3


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 7), lambda: nn.Conv2d(3, 7, 3, padding=1)])
def test_the_probe_looks_at_every_channel(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of one channel, of two and of all; the last channel and the bias count like the first."""
    from fxexpand.kernel.modules import kernel_of
    from fxexpand.running import verify

    layer: Any = make()
    block: Any = Chain().build(kernel_of(layer))
    for piece in (1, 11, 2**20):
        monkeypatch.setattr(verify, "PIECE", piece)
        assert verify.block_error(block, kernel_of(layer)) < 1e-6
        for wrong in (block[-1].weight, block[-1].bias):
            for channel in (0, -1):
                with torch.no_grad():
                    wrong[channel] += 1.0
                    assert verify.block_error(block, kernel_of(layer)) > 1e-2
                    wrong[channel] -= 1.0
