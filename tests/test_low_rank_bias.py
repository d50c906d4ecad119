"""The experiments in small: batched networks against networks one by one, and what must come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import evidence
from benchmarks.low_rank_bias import (
    end_to_end_rule,
    initialisation,
    landscape,
    nonlinearities,
    optimisers,
    program,
    targets,
    teachers,
    training_spectra,
)
from benchmarks.low_rank_bias.networks import Networks, descend, draw, draw_low_rank, teacher
from fxexpand.lowrank.features import kernel_rank
from fxexpand.lowrank.measures import numerical_rank, spectral_entropy

DEPTHS = (1, 2, 5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers_of(networks: Networks, place: int) -> list[Tensor]:
    """The layers of one network, first applied first."""
    depth = networks.depths[place // networks.draws]
    count = len(networks.depths) * networks.draws
    return [layer[place - (count - len(layer))] for layer in networks.layers[:depth]]


def test_the_batch_holds_the_networks_one_by_one() -> None:
    networks = draw(DEPTHS, 3, 4, seeded())
    x = torch.randn(9, 4, 6)
    product, outputs = networks.product(), networks.outputs(x, torch.tanh)
    for place in range(9):
        whole, y = torch.eye(4), x[place]
        layers = layers_of(networks, place)
        for number, layer in enumerate(layers):
            whole = layer @ whole
            y = layer @ y
            y = torch.tanh(y) if number < len(layers) - 1 else y
        torch.testing.assert_close(product[place], whole)
        torch.testing.assert_close(outputs[place], y)
    assert networks.of(product).shape == (3, 3, 4, 4)


def test_training_in_a_batch_is_training_one_by_one() -> None:
    wanted = torch.randn(4, 4)
    batch = draw(DEPTHS, 2, 4, seeded())
    alone = [
        Networks((DEPTHS[place // 2],), 1, [layer.clone()[None] for layer in layers_of(batch, place)])
        for place in range(6)
    ]

    def loss(networks: Networks) -> Tensor:
        return (networks.product() - wanted).square().mean((-2, -1))

    for make in (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, 0.01),
    ):
        for networks in (batch, *alone):
            assert list(descend(networks, loss, make, 4)) == [1, 2, 3, 4]
            for layer in networks.layers:
                layer.grad = None
    found = batch.product().detach()
    single = torch.cat([network.product().detach() for network in alone])
    torch.testing.assert_close(found, single)
    assert float((found - draw(DEPTHS, 2, 4, seeded()).product()).abs().max()) > 0.05


def test_a_low_rank_start_has_one_rank_at_every_depth() -> None:
    networks = draw_low_rank((1, 4, 8), 60, 16, seeded(), factors=8)
    deep = draw((8,), 60, 16, seeded(1))
    ranks = networks.of(spectral_entropy(networks.product(), batched=True)).mean(1)
    expected = float(spectral_entropy(deep.product(), batched=True).mean())
    assert ranks.tolist() == pytest.approx([expected] * 3, abs=0.12)


def test_teachers() -> None:
    assert numerical_rank(teacher(3, 16, 5, seeded()), 1e-4, batched=True).tolist() == [5, 5, 5]
    matrices = teacher(40, 32, 32, seeded())
    assert float(matrices.square().sum((-2, -1)).mean() / 32) == pytest.approx(2.0, rel=0.05)


def test_the_figures_of_initialisation_are_met() -> None:
    """Within 0.05 nats and what is left of the spread after 150 draws."""
    networks = draw(targets.DEPTHS_A, 150, 32, seeded(5), dtype=torch.float64)
    x = torch.randn(1, 32, 128, generator=seeded(6), dtype=torch.float64)
    for name, activation in (("linear", lambda v: v), ("relu", torch.relu)):
        features = networks.outputs(x, activation).mT
        found = networks.of(kernel_rank(features, "cosine_distance", measure="entropy", batched=True))
        wanted = targets.INITIALISATION[name, "cosine_distance", 32]
        assert found.mean(1).tolist() == pytest.approx(wanted, abs=0.05 + 0.02)


def test_one_layer_of_width_16_cannot_have_the_figure_of_the_relu_network() -> None:
    networks = draw((1,), 40, 16, seeded(), dtype=torch.float64)
    x = torch.randn(1, 16, 512, generator=seeded(1), dtype=torch.float64)
    found = kernel_rank(networks.outputs(x).mT, "cosine_distance", measure="entropy", batched=True).mean()
    assert float(found) < targets.INITIALISATION["relu", "cosine_distance", 16][0] - initialisation.WITHIN


def test_the_rule_of_arora_holds_to_first_order_and_not_without_its_powers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = []
    for rate in (0.01, 0.005):
        rule, real, _ = end_to_end_rule.both(3, 24, rate, round(0.4 / rate))
        errors.append(float((rule - real).norm() / real.norm()))
    assert errors[0] < 0.01 and errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)
    monkeypatch.setattr(end_to_end_rule, "step", lambda whole, gradient, depth: depth * gradient)
    rule, real, _ = end_to_end_rule.both(3, 24, 0.005, 80)
    assert float((rule - real).norm() / real.norm()) > 0.05


def test_balanced_factors() -> None:
    generator = seeded()
    whole = torch.randn(5, 7, dtype=torch.float64)
    factors = end_to_end_rule.balanced(
        whole, 4, 9, lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    )
    torch.testing.assert_close(end_to_end_rule.product_of(factors), whole)
    for inner, outer in zip(factors, factors[1:], strict=False):  # noqa: RUF007
        torch.testing.assert_close(outer.T @ outer, inner @ inner.T)


def test_every_optimiser_lowers_the_loss() -> None:
    generator = seeded()
    x = torch.randn(32, 20, generator=generator)
    task = optimisers.Task(teacher(1, 32, 8, generator)[0], x @ x.T / 20)
    start = optimisers.start(2, seeded(1))
    first = float(task.loss(optimisers.product(start)))
    assert float(task.loss(optimisers.lbfgs(optimisers.start(2, seeded(1)), task, 50))) < 0.05 * first
    found = float(task.loss(optimisers.search(2, task, seeded(2), 60)))
    assert found < first
    pytest.importorskip("cma")
    assert float(task.loss(optimisers.cma_es(start, task, 25, seed=1))) < 0.9 * first


def test_two_factors_have_less_rank_around_a_point() -> None:
    content = landscape.run(quick=True)
    assert landscape.failures(content) == []
    swapped = {**content, "changes": {"one": content["changes"]["two"], "two": content["changes"]["one"]}}
    assert landscape.failures(swapped) != []


def test_the_published_activations_have_the_values_of_the_figure() -> None:
    content = json.loads((evidence.FOLDER / "results/low_rank_bias/D.json").read_text(encoding="utf-8"))
    gaps = {row[0]: float(row[4]) for row in nonlinearities.table_rows(content)}
    assert gaps.pop("tanh") > max(gaps.values())  # what the next test explains
    assert max(gaps.values()) <= 0.13


def test_the_smaller_the_start_of_tanh_networks_the_lower_their_rank() -> None:
    entropies = []
    for gain in (3**-0.5, nonlinearities.GAIN, 1.5):
        rows = nonlinearities.one_activation("tanh", torch.tanh, gain, draws=3, steps=150)
        entropies.append(sum(rows[nonlinearities.DEPTHS.index(4)]["entropy"]) / 3)
    assert entropies[0] < entropies[1] - 0.05 < entropies[2] - 0.1


def test_claims_that_do_not_hold_are_failures() -> None:
    row = {"network": "relu", "measure": "cosine_distance", "width": 32, "distribution": "normal", "depth": 4}
    assert initialisation.failures({"rows": [{**row, "mean": 1.94, "target": 1.88}]})
    assert not initialisation.failures({"rows": [{**row, "mean": 1.92, "target": 1.88}]})
    flat = [{"optimiser": n, "entropy": [2.0, 2.1]} for n in targets.OPTIMISERS for _ in range(4)]
    flat[1]["entropy"] = [2.2, 2.2]
    assert optimisers.failures({"rows": flat})
    steady = [{"activation": n, "entropy": [2.0]} for n in targets.NONLINEARITIES for _ in range(5)]
    assert len(nonlinearities.failures({"rows": steady})) == 7
    runs = {"plain": {"effective_rank": [[9.0, 5.0]]}, "expanded": {"effective_rank": [[9.0, 6.0]]}}
    assert training_spectra.failures({"runs": runs})
    curve = {"teacher": "full rank", "initialisation": "default", "converged": [[2.0], [2.1]]}
    assert len(teachers.failures({"curves": [{**curve, "test": [[1.0], [0.5]]}]})) == 2
    broken = {"depth": 2, "hidden": 6, "errors": [1e-3, 9e-4]}
    assert end_to_end_rule.failures({"rows": [broken]})


def test_a_run_writes_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["E", "--quick", "--out", str(tmp_path)]) == 0
    assert "two factors" in capsys.readouterr().out
    content = json.loads((tmp_path / "E.json").read_text())
    assert content["version"] == 1 and content["quick"] and (tmp_path / "E.png").stat().st_size > 1000
    content["changes"]["two"] = [-7.0, -7.0]
    (tmp_path / "E.json").write_text(json.dumps(content))
    assert program.main(["E", "--quick", "--out", str(tmp_path)]) == 0
    assert "-7.00" in capsys.readouterr().out  # not run again
    assert program.main(["E", "--quick", "--again", "--out", str(tmp_path)]) == 0
    assert "-7.00" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["Z"])


def test_experiments_run_side_by_side(tmp_path: Path) -> None:
    assert program.main(["E", "G", "--quick", "--jobs", "2", "--out", str(tmp_path)]) == 0
    assert all((tmp_path / f"{key}.json").exists() for key in "EG")


@pytest.mark.parametrize("key", sorted(program.EXPERIMENTS))
def test_the_published_tables_are_those_of_the_saved_results(key: str) -> None:
    content: dict[str, Any] | None = program.known(program.RESULTS, key, quick=False)
    assert content is not None, f"run python -m benchmarks.low_rank_bias {key}"
    assert program.EXPERIMENTS[key].failures(content) == []
    _, _, table = program.text_of(key, content).partition("\n\n")
    assert table in program.README.read_text(encoding="utf-8")
    plots = [path for path in program.RESULTS.glob(f"{key}.*") if path.suffix != ".json"]
    assert len(plots) == 1 and plots[0].stat().st_size < 200_000
    assert evidence.FOLDER in program.RESULTS.parents
