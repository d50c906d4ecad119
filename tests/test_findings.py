"""Findings: the sentences follow from the figures, whichever way the figures point."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

import pytest

from fxexpand.deploy.latency import Difference, LatencyReport, Measurement
from fxexpand.training.demo.findings import Findings, Proof, Run, Spread, combined
from fxexpand.training.loop import History
from fxexpand.training.options import Schedule


def history(accuracy: float, ranks: dict[str, float]) -> History:
    return History(
        epoch_steps=(4, 8),
        loss=(0.5, 0.1),
        test_accuracy=(90.0, accuracy),
        train_accuracy=100.0,
        rank_steps=(0, 8),
        ranks={name: (9.0, value) for name, value in ranks.items()},
        step_ms=2.0,
    )


def latency(low: float = 0.9, high: float = 1.1) -> LatencyReport:
    names = ("plain", "expanded", "fused")
    pairs = (("plain", "expanded", (2.0, 1.9, 2.1)), ("plain", "fused", (1.0, low, high)))
    return LatencyReport(
        measurements=tuple(Measurement(n, "eager", 0.5, 0.4, 0.6, 7, (0.5, 0.5)) for n in names),
        differences=tuple(Difference(a, b, "eager", *bounds) for a, b, bounds in pairs),
        device="cpu",
        threads=1,
        dtype="float32",
        batch=1,
        shapes=((1, 1, 8, 8),),
        rounds=8,
        confidence=0.95,
        versions={"torch": "2"},
    )


def findings(
    plain: Sequence[float] = (98.0, 98.5, 97.5), expanded: Sequence[float] = (98.4, 98.2, 97.8)
) -> Findings:
    """Made-up figures; the rank of `conv` falls beyond noise, that of `fc` moves both ways."""
    runs = []
    for seed, (a, b) in enumerate(zip(plain, expanded, strict=True)):
        shift = 0.01 * seed
        proofs = (Proof("outputs", 1e-7 * (seed + 1), 5e-5, absolute=1e-6), Proof("class", 0, 0, total=20))
        one = history(a, {"conv": 8.0 + shift, "fc": 7.0})
        two = history(b, {"conv": 6.0 + 2 * shift, "fc": 7.0 - 0.1 + 0.2 * (seed % 2)})
        runs.append(Run(seed, one, two, proofs))
    counts = {"plain": 1000, "expanded": 3000, "fused": 1000}
    return Findings(
        data="made-up images",
        sizes=(30, 20),
        network="two layers",
        recipe="Chain(depth=3, width=2)",
        schedule=Schedule(epochs=2),
        full_ranks={"conv": 9, "fc": 10},
        runs=tuple(runs),
        spectra={"conv": ((1.0, 0.5), (1.0, 0.25)), "fc": ((1.0, 0.9), (1.0, 0.8))},
        parameters=counts,
        flops=counts,
        batch_flops=counts,
        latency=latency(),
        skipped=(),
        files=("report.html",),
        versions={"torch": "2"},
        device="cpu",
        seconds=1.0,
    )


def test_a_spread_is_students() -> None:
    values = [0.4, -0.3, 0.3]
    spread = Spread.of(values)
    assert (spread.mean, spread.deviation) == (fmean(values), stdev(values))
    half = 4.302653 * stdev(values) / math.sqrt(3)  # the published 97.5 % point for 2 degrees of freedom
    assert spread.interval() == pytest.approx((spread.mean - half, spread.mean + half))
    assert spread.text(2, "+") == "+0.13 ± 0.38"
    lone = Spread.of([1.5])
    assert lone.text() == "1.50" and lone.interval() == (-math.inf, math.inf) and not lone.excludes_zero()
    assert Spread.of([1.0, 1.01, 1.02]).excludes_zero() and Spread.of([-1.0, -1.01]).excludes_zero()


@pytest.mark.parametrize(
    ("expanded", "sentence"),
    [
        (
            (98.4, 98.2, 97.8),
            "expanded minus plain +0.13 ± 0.38 points (95 % interval -0.81 to +1.07): within",
        ),
        ((99.0, 99.5, 98.4), ": expansion helped."),
        ((97.0, 97.5, 96.4), ": expansion hurt."),
    ],
)
def test_the_verdict_on_accuracy_follows_the_paired_interval(
    expanded: tuple[float, ...], sentence: str
) -> None:
    assert sentence in findings(expanded=expanded).verdict[1]


def test_the_verdict_on_ranks_counts_what_is_beyond_the_spread() -> None:
    found = findings()
    assert found.verdict[0] == (
        "Effective rank: lower with expansion in 2 of 2 layers at the end, beyond the spread of the seeds in "
        "1 (conv)."
    )
    swapped = replace(found, runs=tuple(replace(r, plain=r.expanded, expanded=r.plain) for r in found.runs))
    assert swapped.verdict[0] == (
        "Effective rank: lower with expansion in 0 of 2 layers at the end, beyond the spread of the seeds in "
        "0; higher beyond it in conv."
    )


def test_the_intervals_of_the_layers_hold_jointly() -> None:
    """A change that 95 % excludes from being noise, but not the 97.5 % that two layers ask for."""
    found = findings()
    changes = (-1.0, -1.6, -2.2)
    runs = tuple(
        replace(run, expanded=history(98.0, {"conv": run.plain.ranks["conv"][-1] + change, "fc": 7.0}))
        for run, change in zip(found.runs, changes, strict=True)
    )
    spread = replace(found, runs=runs).rank_difference("conv")
    assert spread.excludes_zero(0.95) and not spread.excludes_zero(0.975)
    assert (
        "lower with expansion in 1 of 2 layers at the end, beyond the spread of the seeds in 0."
        in (replace(found, runs=runs).verdict[0])
    )


def test_one_seed_proves_nothing_about_training() -> None:
    found = findings(plain=(98.0,), expanded=(99.0,))
    assert found.verdict[0].endswith("2 of 2 layers at the end; one seed cannot tell that from noise.")
    assert found.verdict[1].endswith("+1.00 points; one seed cannot tell that from noise.")
    assert "±" not in str(found).split("Accuracy and rank")[0]
    assert found.to_dict()["test_accuracy"]["difference"]["low"] is None


def test_the_verdict_on_latency_says_what_is_noise() -> None:
    assert findings().verdict[2] == (
        "Latency, eager: fused takes 1.000x [0.900, 1.100] (noise) of plain, expanded 2.000x [1.900, 2.100] "
        "(a real difference)."
    )
    slow = replace(findings(), latency=latency(0.99, 0.999))
    assert "fused takes 1.000x [0.990, 0.999] (a real difference)" in slow.verdict[2]
    assert not any("Latency" in line for line in replace(findings(), latency=None).verdict)


def test_proofs_add_up_over_the_seeds_and_a_failure_is_kept() -> None:
    found = findings()
    outputs, classes = found.proofs
    assert (outputs.measured, outputs.absolute, outputs.amount) == (3e-7, 1e-6, "3.0e-07")
    assert (classes.measured, classes.total, classes.amount) == (0, 60, "0 of 60")
    assert (
        not found.failed
        and found.verdict[-1]
        == "Proofs: all 2 hold, on every test image; those of the files for the first seed."
    )

    middle = replace(found.runs[1], proofs=(Proof("outputs", 6e-5, 5e-5), Proof("class", 2, 0, total=20)))
    bad = replace(found, runs=(found.runs[0], middle, found.runs[2]))
    assert [proof.claim for proof in bad.failed] == ["outputs", "class"]
    assert (
        bad.verdict[-1]
        == "Proofs: 2 of 2 FAILED: outputs: 6.0e-05 is above 5e-05; class: 2 of 60 is above 0."
    )
    assert "NO" in str(bad)

    nothing = combined([Proof("a", 0.0, 1.0), Proof("a", math.nan, 1.0, problem="no file")])[0]
    assert not nothing.holds and nothing.problem == "no file" and nothing.amount == "-"
    assert not combined([Proof("a", 0.0, 1.0), Proof("a", math.nan, 1.0)])[0].holds


def test_the_table_fits_a_terminal_and_the_rows_hold_the_figures() -> None:
    found = replace(findings(), skipped=("the plots: install matplotlib " * 4,))
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    rows = {row[0]: row[1:] for row in found.rows()}
    assert rows["test accuracy, %"] == ("98.00 ± 0.50", "98.13 ± 0.31", "98.13 ± 0.31", "+0.13 ± 0.38")
    assert rows["eff. rank conv of 9"][3] == "-1.99 ± 0.01"
    assert rows["parameters"] == ("1.00 k", "3.00 k", "1.00 k", "1.000x")
    assert rows["ms, eager"] == ("0.500", "0.500", "0.500", "1.000x noise")
    for label, cells in rows.items():
        assert any(line.split() == f"{label} {' '.join(cells)}".split() for line in text.splitlines()), label


def test_the_dictionary_is_json_even_when_a_proof_could_not_be_measured() -> None:
    found = findings()
    broken = Proof("file", math.nan, 5e-5, problem="cannot be read")
    first = replace(found.runs[0], proofs=(*found.runs[0].proofs, broken))
    values = replace(found, runs=(first, *found.runs[1:])).to_dict()
    read = json.loads(json.dumps(values, allow_nan=False))
    assert read == values
    assert read["proofs"][-1]["measured"] is None and read["proofs"][-1]["holds"] is False
    assert read["effective_rank"]["conv"]["difference"]["mean"] == pytest.approx(-1.99)
    assert len(read["runs"]) == 3 and read["runs"][2]["expanded"]["test_accuracy"][-1] == 97.8
