"""The plots of the demo's report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fxexpand.deploy.latency.plots import latency_bars
from fxexpand.reporting.figures import COLOURS, new_panels, styled, svg
from fxexpand.training.demo.findings import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINED = ("plain", "expanded")


def ranks(findings: Findings) -> Figure:
    """Effective rank over training steps, one panel per layer: mean, and the range over the seeds."""

    def draw(panel: Axes, layer: str) -> None:
        for network in TRAINED:
            histories = findings.histories(network)
            values = [history.ranks[layer] for history in histories]
            _line_with_range(panel, histories[0].rank_steps, values, network)
        panel.set_title(f"{layer} (full rank {findings.full_ranks[layer]})", loc="left")
        panel.margins(x=0.02)

    return _by_layer(list(findings.full_ranks), draw, "training step", "effective rank")


def spectra(findings: Findings) -> Figure:
    """Singular values at the end of training, largest first, one panel per layer."""

    def draw(panel: Axes, layer: str) -> None:
        for network, values in zip(TRAINED, findings.spectra[layer], strict=True):
            positions = range(1, len(values) + 1)
            marker = "o" if len(values) <= 16 else ""
            panel.plot(positions, values, color=COLOURS[network], label=network, marker=marker, markersize=3)
        panel.set_title(layer, loc="left")
        panel.set_ylim(bottom=0.0, top=1.05)

    return _by_layer(list(findings.spectra), draw, "index", "singular value / largest")


def accuracy(findings: Findings) -> Figure:
    """Test accuracy and training loss by epoch: mean, and the range over the seeds."""
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = new_panels(2, height=3.0, columns=2)
    late: list[float] = []
    for network in TRAINED:
        histories = findings.histories(network)
        epochs = range(1, len(histories[0].loss) + 1)
        _line_with_range(left, epochs, [history.test_accuracy for history in histories], network)
        _line_with_range(right, epochs, [history.loss for history in histories], network)
        late += [value for each in histories for value in each.test_accuracy[len(epochs) // 4 :]]
    left.set_ylim(min(late) - 0.5, min(100.2, max(late) + 0.5))
    left.set_title("test accuracy, %", loc="left")
    right.set_title("training loss", loc="left")
    right.set_yscale("log")
    for panel in (left, right):
        panel.set_xlabel("epoch")
        panel.margins(x=0.02)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(loc="lower right")
    return figure


def latency(findings: Findings) -> Figure | None:
    """Median latency of one image with its interval; None where nothing was measured."""
    return None if findings.latency is None else latency_bars(findings.latency)


def all_plots(findings: Findings) -> dict[str, str]:
    """Every plot of the report as SVG, by what it shows.

    Raises: FxExpandError: matplotlib is not installed.
    """
    with styled():
        figures = {draw.__name__: draw(findings) for draw in (ranks, accuracy, spectra, latency)}
        return {name: svg(figure, name) for name, figure in figures.items() if figure is not None}


def _by_layer(layers: Sequence[str], draw: Callable[[Axes, str], None], x: str, y: str) -> Figure:
    """A panel per layer; the legend is in the first free panel, or else in the first one."""
    figure, panels = new_panels(len(layers), height=2.5)
    for panel, layer in zip(panels, layers, strict=False):
        draw(panel, layer)
        panel.set_xlabel(x)
    panels[0].set_ylabel(y)
    free = panels[len(layers) :]
    handles, labels = panels[0].get_legend_handles_labels()
    (free or panels)[0].legend(handles, labels, loc="center left" if free else "best", fontsize=10)
    return figure


def _line_with_range(panel: Axes, x: Sequence[int], values: Sequence[Sequence[float]], network: str) -> None:
    columns = list(zip(*values, strict=True))
    mean = [sum(column) / len(column) for column in columns]
    panel.plot(x, mean, color=COLOURS[network], label=network)
    if len(values) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        panel.fill_between(x, low, high, color=COLOURS[network], alpha=0.18, linewidth=0)
