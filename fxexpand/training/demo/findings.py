"""The figures and proofs of `fxexpand demo`, and the sentences that they support."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any

from fxexpand.deploy.latency import Difference, LatencyReport
from fxexpand.reporting.rows import plain
from fxexpand.reporting.table import short, table
from fxexpand.training.loop import History
from fxexpand.training.options import Schedule

NETWORKS = ("plain", "expanded", "fused")


@dataclass(frozen=True)
class Proof:
    """A claim, its measured value, and whether it holds.

    ``measured`` is compared with ``limit`` (the largest value that still holds); ``absolute`` is the same
    deviation in the units of the outputs, where that makes sense. ``problem`` says what went wrong where
    nothing could be measured.
    """

    claim: str
    measured: float
    limit: float
    absolute: float | None = None
    total: int | None = None  # of how many, where `measured` is a count
    problem: str = ""

    @property
    def holds(self) -> bool:
        """Whether ``measured`` is within ``limit``; a NaN is not."""
        return not self.problem and self.measured <= self.limit

    @property
    def amount(self) -> str:
        """``measured`` as text."""
        if self.total is not None:
            return f"{self.measured:.0f} of {self.total if self.total < 1e5 else short(self.total)}"
        return "-" if math.isnan(self.measured) else f"{self.measured:.1e}"


@dataclass(frozen=True)
class Run:
    """One seed: the same start, the same batches, once plain and once expanded."""

    seed: int
    plain: History
    expanded: History
    proofs: tuple[Proof, ...]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation of a single seed is NaN."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of ``values``, one per seed."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval for the true mean; from minus to plus infinity for a single seed."""
        if self.count < 2:
            return -math.inf, math.inf
        from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn

        half = float(t.ppf((1 + confidence) / 2, self.count - 1)) * self.deviation / math.sqrt(self.count)
        return self.mean - half, self.mean + half

    def excludes_zero(self, confidence: float = 0.95) -> bool:
        """Whether the interval lies on one side of 0."""
        low, high = self.interval(confidence)
        return low > 0.0 or high < 0.0

    def text(self, digits: int = 2, sign: str = "") -> str:
        """``98.45 ± 0.20``; without the deviation for a single seed."""
        mean = f"{self.mean:{sign}.{digits}f}"
        return mean if self.count < 2 else f"{mean} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Findings:
    """Everything the demo measured.

    ``parameters``, ``flops`` (of one image in evaluation mode) and ``batch_flops`` (of a training batch) have
    one entry for each of ``NETWORKS``. ``spectra`` holds the singular values by layer at the end of training
    of the first seed, each divided by the largest. ``skipped`` names the steps left out, and the
    extras that bring them.
    """

    data: str
    sizes: tuple[int, int]
    network: str
    recipe: str
    schedule: Schedule
    full_ranks: Mapping[str, int]
    runs: tuple[Run, ...]
    spectra: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]
    parameters: Mapping[str, int]
    flops: Mapping[str, int]
    batch_flops: Mapping[str, int]
    latency: LatencyReport | None
    skipped: tuple[str, ...]
    files: tuple[str, ...]
    versions: Mapping[str, str]
    device: str
    seconds: float

    def histories(self, network: str) -> list[History]:
        """One per seed; ``fused`` predicts what ``expanded`` does."""
        return [run.plain if network == "plain" else run.expanded for run in self.runs]

    def test_accuracy(self, network: str) -> list[float]:
        """Accuracies after the last epoch, in per cent, one per seed."""
        return [history.test_accuracy[-1] for history in self.histories(network)]

    def final_rank(self, network: str, layer: str) -> list[float]:
        """The effective rank at the end of training, one per seed."""
        return [history.ranks[layer][-1] for history in self.histories(network)]

    @property
    def accuracy_difference(self) -> Spread:
        """Expanded minus plain, in points, paired by seed."""
        return _paired(self.test_accuracy("plain"), self.test_accuracy("expanded"))

    def rank_difference(self, layer: str) -> Spread:
        """Expanded minus plain at the end of training, paired by seed."""
        return _paired(self.final_rank("plain", layer), self.final_rank("expanded", layer))

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """One per claim: counts added up over the seeds, errors the worst of them."""
        return combined([proof for run in self.runs for proof in run.proofs])

    @property
    def failed(self) -> tuple[Proof, ...]:
        """The claims that do not hold."""
        return tuple(proof for proof in self.proofs if not proof.holds)

    @property
    def title(self) -> str:
        """One line: data, sizes, epochs, seeds."""
        train, test = self.sizes
        return (
            f"{self.data}: {train} training and {test} test images, "
            f"{_plural(self.schedule.epochs, 'epoch')}, {_plural(len(self.runs), 'seed')}"
        )

    @property
    def verdict(self) -> tuple[str, ...]:
        """The sentences that the figures support."""
        sentences = [self._rank_verdict(), self._accuracy_verdict()]
        for backend, found in self._backends():
            fused, expanded = (_ratio(found.difference("plain", n, backend)) for n in ("fused", "expanded"))
            sentences.append(f"Latency, {backend}: fused takes {fused} of plain, expanded {expanded}.")
        count = len(self.proofs)
        proofs = f"all {count} hold, on every test image; those of the files for the first seed."
        if self.failed:
            proofs = f"{len(self.failed)} of {count} FAILED: {describe(self.failed)}"
        return (*sentences, f"Proofs: {proofs}")

    def _rank_verdict(self) -> str:
        differences = {layer: self.rank_difference(layer) for layer in self.full_ranks}
        confidence = 1.0 - 0.05 / len(differences)  # Bonferroni: the layers' intervals hold jointly
        lower = [name for name, change in differences.items() if change.mean < 0]
        text = f"Effective rank: lower with expansion in {len(lower)} of {len(differences)} layers at the end"
        if len(self.runs) < 2:
            return f"{text}; one seed cannot tell that from noise."
        sure = [name for name in lower if differences[name].excludes_zero(confidence)]
        higher = [n for n, d in differences.items() if d.mean > 0 and d.excludes_zero(confidence)]
        text += f", beyond the spread of the seeds in {len(sure)}"
        text += f" ({', '.join(sure)})" if sure else ""
        return f"{text}; higher beyond it in {', '.join(higher)}." if higher else f"{text}."

    def _accuracy_verdict(self) -> str:
        change = self.accuracy_difference
        text = f"Test accuracy: expanded minus plain {change.text(2, '+')} points"
        if change.count < 2:
            return f"{text}; one seed cannot tell that from noise."
        low, high = change.interval()
        if not change.excludes_zero():
            meaning = "within noise"
        else:
            meaning = "expansion helped" if change.mean > 0 else "expansion hurt"
        return f"{text} (95 % interval {low:+.2f} to {high:+.2f}): {meaning}."

    def _backends(self) -> Iterator[tuple[str, LatencyReport]]:
        if self.latency is not None:
            for backend in dict.fromkeys(row.backend for row in self.latency.measurements):
                yield backend, self.latency

    def rows(self) -> list[tuple[str, ...]]:
        """The figures: label, one column for each of ``NETWORKS``, and the change by expansion."""
        columns = [Spread.of(self.test_accuracy(name)).text() for name in NETWORKS]
        rows = [("test accuracy, %", *columns, self.accuracy_difference.text(2, "+"))]
        for layer, full in self.full_ranks.items():
            columns = [Spread.of(self.final_rank(name, layer)).text() for name in NETWORKS]
            label = f"eff. rank {layer} of {full}"
            rows.append((label, *columns, self.rank_difference(layer).text(2, "+")))
        before, after = (fmean(h.step_ms for h in self.histories(name)) for name in ("plain", "expanded"))
        rows.append(("ms, training step", f"{before:.2f}", f"{after:.2f}", "-", f"{after / before:.3f}x"))
        for label, counts in (
            ("parameters", self.parameters),
            (f"FLOPs, batch of {self.schedule.batch_size}", self.batch_flops),
            ("FLOPs, one image", self.flops),
        ):
            ratio = f"{counts['fused'] / counts['plain']:.3f}x"
            rows.append((label, *(short(counts[name]) for name in NETWORKS), ratio))
        for backend, found in self._backends():
            medians = [f"{found.measurement(n, backend).median:.3f}" for n in NETWORKS]
            change = found.difference("plain", "fused", backend)
            verdict = "real" if change.real else "noise"
            rows.append((f"ms, {backend}", *medians, f"{change.ratio:.3f}x {verdict}"))
        return rows

    def proof_rows(self) -> list[tuple[str, ...]]:
        """The proofs: claim, measured, absolute, limit, and whether it holds."""
        return [
            (
                proof.claim,
                proof.amount,
                "-" if proof.absolute is None else f"{proof.absolute:.1e}",
                f"{proof.limit:g}",
                "yes" if proof.holds else "NO",
            )
            for proof in self.proofs
        ]

    def __str__(self) -> str:
        proofs = [("proof", "measured", "absolute", "at most", "holds"), *self.proof_rows()]
        figures = table(("", *NETWORKS, "change"), [*self.rows(), ("",) * 5, *proofs])
        notes = [
            "Accuracy and rank: change is expanded - plain, paired by seed; ± is the standard deviation.",
            "Training step: expanded : plain. Below it: fused : plain. Latency is that of one image.",
            "Proofs: relative error of the logits, or how many differ.",
        ]
        skipped = [f"Skipped: {line}" for line in self.skipped]
        paragraphs = [_wrapped(lines) for lines in (notes, self.verdict, skipped) if lines]
        return "\n\n".join([self.title, figures, *paragraphs])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        trained, confidence = ("plain", "expanded"), 1.0 - 0.05 / len(self.full_ranks)
        accuracy: dict[str, Any] = {name: self.test_accuracy(name) for name in trained}
        accuracy["difference"] = _summary(self.accuracy_difference, 0.95)
        ranks = {
            layer: {
                "full": full,
                **{name: self.final_rank(name, layer) for name in trained},
                "difference": _summary(self.rank_difference(layer), confidence),
            }
            for layer, full in self.full_ranks.items()
        }
        left_out = ("sizes", "full_ranks", "runs", "spectra", "latency")
        values = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}
        spectra = {
            layer: dict(zip(NETWORKS, plain(values), strict=False)) for layer, values in self.spectra.items()
        }
        runs = [{**plain(run), "proofs": [_proof(proof) for proof in run.proofs]} for run in self.runs]
        return {
            "title": self.title,
            "verdict": list(self.verdict),
            "train_images": self.sizes[0],
            "test_images": self.sizes[1],
            **values,
            "test_accuracy": accuracy,
            "effective_rank": ranks,
            "proofs": [_proof(proof) for proof in self.proofs],
            "latency": None if self.latency is None else self.latency.to_dict(),
            "spectra": spectra,
            "runs": runs,
        }


def combined(proofs: Sequence[Proof]) -> tuple[Proof, ...]:
    """One proof per claim: counts added up, errors the worst, NaN and the first problem kept."""
    by_claim: dict[str, list[Proof]] = {}
    for proof in proofs:
        by_claim.setdefault(proof.claim, []).append(proof)
    result = []
    for claim, group in by_claim.items():
        values = [proof.measured for proof in group]
        totals = [proof.total for proof in group if proof.total is not None]
        worst = math.nan if any(map(math.isnan, values)) else max(values)
        limit = min(proof.limit for proof in group)
        absolute = max((p.absolute for p in group if p.absolute is not None), default=None)
        problem = next((proof.problem for proof in group if proof.problem), "")
        measured, total = (sum(values), sum(totals)) if totals else (worst, None)
        result.append(Proof(claim, measured, limit, absolute, total, problem))
    return tuple(result)


def describe(failed: Sequence[Proof]) -> str:
    """The failed proofs in one line."""
    return "; ".join(f"{p.claim}: {p.problem or f'{p.amount} is above {p.limit:g}'}" for p in failed) + "."


def _wrapped(lines: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="  ") for line in lines)


def _paired(plain: Sequence[float], expanded: Sequence[float]) -> Spread:
    return Spread.of([after - before for before, after in zip(plain, expanded, strict=True)])


def _ratio(difference: Difference) -> str:
    verdict = "a real difference" if difference.real else "noise"
    return f"{difference.ratio:.3f}x [{difference.low:.3f}, {difference.high:.3f}] ({verdict})"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _summary(spread: Spread, confidence: float) -> dict[str, Any]:
    """JSON has no NaN and no infinity: None stands for what one seed cannot give."""
    low, high = spread.interval(confidence)
    known = spread.count > 1
    return {
        "mean": spread.mean,
        "deviation": spread.deviation if known else None,
        "low": low if known else None,
        "high": high if known else None,
        "confidence": confidence,
    }


def _proof(proof: Proof) -> dict[str, Any]:
    measured = proof.measured if math.isfinite(proof.measured) else None
    return {**plain(proof), "measured": measured, "holds": proof.holds}
