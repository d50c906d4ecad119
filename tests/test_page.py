"""The page: whole, self-contained, escaped, and with the figures it was given."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fxexpand.training.demo import page, plots
from tests.test_findings import findings

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects tags, attributes, text, ids and references; notes an element that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def rendered() -> str:
    return page.html(findings())


def test_the_page_is_whole_and_needs_nothing_else(rendered: str) -> None:
    reader = read(rendered)
    assert "http:" not in rendered and "https:" not in rendered
    assert not {"script", "link", "img", "iframe", "object", "metadata"} & set(reader.tags)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", rendered) and "@import" not in rendered
    references = [value for name, value in reader.attributes if name.endswith("href")]
    assert references and all(value.startswith("#") for value in references)


def test_every_reference_in_the_plots_is_defined_once(rendered: str) -> None:
    reader = read(rendered)
    ids = [value for name, value in reader.attributes if name == "id"]
    used = {value[1:] for name, value in reader.attributes if name.endswith("href")}
    used |= set(re.findall(r"url\(#([\w-]+)\)", rendered))
    assert used <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_page_holds_the_figures_the_verdict_and_the_plots(rendered: str) -> None:
    reader = read(rendered)
    assert reader.tags.count("svg") == 4
    found = findings()
    for wanted in (*found.verdict, found.title, *(cell for row in found.rows() for cell in row)):
        assert wanted in reader.text, wanted
    assert "The band is the range over the seeds." in rendered


def test_names_are_escaped_and_a_failed_proof_stands_out() -> None:
    found = findings()
    bad = replace(found.runs[0].proofs[0], claim="x<y>", measured=1.0, problem="a < b")
    runs = (replace(found.runs[0], proofs=(bad,)), *found.runs[1:])
    text = page.html(replace(found, data="<b>&", runs=runs))
    read(text)
    assert "<y>" not in text and "x&lt;y&gt;</td>" in text
    assert "<b>" not in text and "&lt;b&gt;&amp;" in text
    assert 'class="failed">NO<' in text and "a &lt; b" in text


def test_without_matplotlib_the_page_has_no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    text = page.html(replace(findings(), skipped=("no plots",)))
    reader = read(text)
    assert "svg" not in reader.tags and "no plots" in reader.text and "Singular values" not in text


def test_one_seed_and_no_latency_make_a_page_too() -> None:
    found = findings(plain=(98.0,), expanded=(98.2,))
    text = page.html(replace(found, latency=None))
    assert read(text).tags.count("svg") == 3
    assert "The band" not in text


def test_the_lines_are_the_means_and_the_band_the_range() -> None:
    found = findings()
    figure = plots.ranks(found)
    panel: Any = figure.axes[0]
    lines = {line.get_label(): line.get_ydata() for line in panel.lines}
    assert list(lines["plain"]) == pytest.approx([9.0, 8.01])
    assert list(lines["expanded"]) == pytest.approx([9.0, 6.02])
    band = panel.collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((6.0, 9.0))
    assert panel.get_title(loc="left") == "conv (full rank 9)"


def test_the_bars_are_the_medians(tmp_path: Path) -> None:
    figure = plots.latency(findings())
    assert figure is not None
    bars: Any = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [0.5, 0.5, 0.5]
    figure.savefig(tmp_path / "latency.png")  # draws without a screen
    assert plots.latency(replace(findings(), latency=None)) is None
