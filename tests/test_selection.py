"""``select`` in all its forms, and what a wrong one says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from fxexpand import Chain, RefusedError, SelectionError, expand, report
from tests.networks import ConvNet

NAMES = {"stem", "depthwise", "pointwise", "dilated", "up", "head"}


def expanded(select: Any) -> set[str]:
    return {row.site for row in report(expand(ConvNet(), Chain(depth=2, width=1), select=select)).changed}


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (None, NAMES),
        ("*", NAMES),
        ("head", {"head"}),
        ("*wise", {"depthwise", "pointwise"}),
        ("re:(up|head)", {"up", "head"}),
        (re.compile("d.*"), {"depthwise", "dilated"}),
        (["stem", re.compile("up")], {"stem", "up"}),
        (lambda name, module: isinstance(module, nn.Linear), {"head"}),
        ({"*": Chain(), "head": None, "re:.*wise": None}, {"stem", "dilated", "up"}),
        ({"head": None, "*": Chain()}, NAMES),
        ([], set()),
    ],
)
def test_forms(select: Any, names: set[str]) -> None:
    assert expanded(select) == names


def test_a_module_stands_for_all_below_it() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(ConvNet(), nn.Linear(4, 4)), "tail": nn.Linear(2, 2)})
    rows = report(expand(model, Chain(depth=2, width=1), select="body.0")).rows
    assert {row.site for row in rows if row.action == "expanded"} == {f"body.0.{name}" for name in NAMES}
    assert {row.reason for row in rows if row.action == "left"} == {"not selected"}


def test_a_tied_weight_is_selected_by_any_of_its_names() -> None:
    def model() -> Any:
        made: Any = nn.ModuleDict({"one": nn.Linear(4, 4), "mid": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
        made["two"].weight = made["one"].weight
        return made

    for select, names in (("two", {"one.weight"}), ({"*": Chain(), "two": None}, {"mid"}), ("mid", {"mid"})):
        assert {row.site for row in report(expand(model(), select=select)).changed} == names
    table = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    table["head"].weight = table["table"].weight
    (row,) = report(expand(table, select="head")).changed
    assert row.site == "table.weight"


def test_a_mapping_brings_recipes() -> None:
    big: Any = expand(ConvNet(), select={"*": Chain(depth=2, width=1), "head": Chain(depth=5)})
    assert len(big.head.expansion) == 5 and len(big.stem.expansion) == 2


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ("haed", r"'haed' matches no site. The sites are: stem, "),
        (["head", "re:x+"], r"'re:x\+' matches no site"),
        ("re:(", "no regular expression"),
        ({"head": 3}, r"select\['head'\]=3: give a recipe, or None to leave"),
        ([3], "3 is no pattern"),
        (3, "give a predicate"),
    ],
)
def test_errors_say_what_to_do(select: Any, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        expand(ConvNet(), select=select)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "zeros"}, "init='zeros': choose from preserve"),
        ({"form": "fast"}, "form='fast': choose from auto"),
        ({"recipe": "chain"}, r"give a recipe, as in recipe=Chain\(depth=3"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        expand(ConvNet(), **options)


def test_strict_counts_selected_sites_only() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(4, 3, sparse=True))
    with pytest.raises(RefusedError, match=r"^1\.weight \(Embedding 4x3\): not changed: sparse gradients"):
        expand(model, strict=True)
    expand(model, strict=True, select="0")
