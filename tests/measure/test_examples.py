"""Examples: verdicts that changed, with both replies cut."""

from __future__ import annotations

from cmrm.measure.examples import examples_of
from report.samples import cell, questions


def test_the_image_and_each_defence_have_examples() -> None:
    cells = [
        cell("query", "none", "rr"),
        cell("original", "none", "cr"),
        cell("original", "cmrm_dataset", "rr", "c"),
    ]
    examples = examples_of(cells)
    assert [(e["defense"], e["verdicts"]) for e in examples] == [
        ("none", "refused \u2192 complied"),
        ("cmrm_dataset", "complied \u2192 refused"),
    ]
    assert examples[0]["category"] == "drugs"


def test_replies_are_cut() -> None:
    long = "word " * 50
    cells = [cell("query", "none", "r"), cell("original", "none", "c", reply=long)]
    assert examples_of(cells)[0]["after"] == "word word word word word word ..."


def test_categories_take_turns() -> None:
    cells = [cell("query", "none", "rrrrrr"), cell("original", "none", "cccccc")]
    assert [e["category"] for e in examples_of(cells, most=4)] == ["drugs", "fraud"] * 2


def test_each_defence_has_at_most_so_many() -> None:
    cells = [cell("original", "none", "c" * 9)]
    cells += [cell("original", name, "r" * 9) for name in ("ecso", "caption")]
    examples = examples_of(cells, most=3)
    assert [e["defense"] for e in examples] == ["ecso"] * 3 + ["caption"] * 3


def test_there_are_none_without_judges_or_without_a_base() -> None:
    assert examples_of([questions("none", 1, 2)]) == []
    assert examples_of([cell("original", "ecso", "rr")]) == []
    assert examples_of([]) == []
