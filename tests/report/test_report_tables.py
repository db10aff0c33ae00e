"""Texts and rows of the report's tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmrm.report import categories, headline, tables
from report.samples import (
    cell,
    demo_results,
    evaluation_results,
    replies_results,
    results,
)

RATE = {
    "rate": 0.125, "low": 0.0712, "high": 0.2093, "n": 72, "unscored": 0, "lowest": 0.125,
    "highest": 0.125,
}  # fmt: skip
PARTLY = {**RATE, "unscored": 3, "lowest": 0.12, "highest": 0.16}
NONE = {
    **RATE,
    "rate": None,
    "low": None,
    "high": None,
    "n": 0,
    "unscored": 4,
    "lowest": 0,
    "highest": 1,
}


def test_a_rate_has_its_interval() -> None:
    assert tables.rate_text(RATE) == "12.5 % [7.1, 20.9]"
    assert tables.short_rate(RATE) == "12.5 [7-21]"


def test_unscored_replies_come_with_worst_case_bounds() -> None:
    assert tables.rate_text(PARTLY) == "12.5 % [7.1, 20.9], 3 unscored: 12.0 to 16.0 %"
    assert tables.short_rate(PARTLY) == "12.5 [7-21] +3 (12-16)"


def test_a_rate_of_nothing_is_no_number() -> None:
    assert tables.rate_text(NONE) == tables.short_rate(NONE) == "unscored (4)"
    assert tables.rate_text({**NONE, "unscored": 0}) == "-"


def test_the_gap_closed_has_its_interval() -> None:
    assert tables.gap_text({"value": 0.91, "low": 0.8, "high": 1.03}) == "91 % [80, 103]"
    assert tables.gap_text({"value": None, "low": None, "high": None}) == "-"
    assert tables.gap_text(None) == "-"


def test_the_headline_goes_from_text_to_image_to_defences() -> None:
    table = headline.headline_table(demo_results())
    assert [row[0] for row in table.rows] == [
        "query alone",
        "caption + query",
        "original image",
        "original image + CMRM dataset level",
    ]
    assert table.columns == ["input", "unsafe rate", "gap closed", "over-refusal", "accuracy"]


def test_accuracy_in_the_headline_is_of_the_images_own_questions() -> None:
    accuracy = [row[-1].split(" ")[0] for row in headline.headline_table(demo_results()).rows]
    assert accuracy == ["-", "-", "90.0", "80.0"]


def test_several_judges_have_a_column_each() -> None:
    columns = headline.headline_table(evaluation_results()).columns
    assert columns[1:3] == ["unsafe rate (ensemble)", "unsafe rate (keyword)"]


def test_columns_without_a_figure_are_left_out() -> None:
    plain = results([cell("query", "none", "rc")], "diagnosis")
    assert headline.headline_table(plain).columns == ["input", "unsafe rate"]


def test_cards_show_the_first_judges_rates_and_the_gap() -> None:
    values = [(card.value, card.tone) for card in headline.cards(demo_results())]
    assert values == [("10.0 %", ""), ("60.0 %", "bad"), ("10.0 %", "good")]
    assert "gap closed: 100 % [" in headline.cards(demo_results())[2].text


def test_no_cards_where_text_and_image_were_not_both_measured() -> None:
    assert headline.cards(results([cell("original", "none", "rc")])) == []
    assert (
        headline.cards(results([cell("query", "none", "uu"), cell("original", "none", "rc")])) == []
    )


def test_a_category_without_a_scored_reply_is_not_0_percent() -> None:
    """`u`: unscored. Drugs are the even replies, fraud the odd ones."""
    cells = [cell("query", "none", "rrrr"), cell("original", "none", "urur")]
    table = categories.category_table(results(cells))
    assert table.columns == ["category", "query alone", "original image"]
    assert table.rows == [
        ["drugs", "0 % of 2", "not scored (2)"],
        ["fraud", "0 % of 2", "0 % of 2"],
    ]


def test_the_share_of_a_category_leaves_unscored_replies_out() -> None:
    assert categories.unsafe_share({"complied": 1, "refused": 3, "unscored": 4}) == 0.25
    assert categories.unsafe_share({"unsafe": 1, "safe": 1}) == 0.5
    assert categories.unsafe_share({"unscored": 4}) is None
    assert categories.unsafe_share({}) is categories.unsafe_share(None) is None


def test_the_headline_set_wins_among_sets_with_as_many_categories() -> None:
    cells = [
        cell("original", "none", "rc", name="first"),
        cell("original", "none", "rcrc", name="second"),
    ]
    assert {c["set"] for c in categories.category_cells(results(cells))} == {"first"}


def test_missing_samples_are_counted() -> None:
    short = cell("original", "none", "rc")
    short.expected = 5
    assert tables.cell_table(results([short])).rows[0][-1] == "2 of 5"


def test_tables_of_an_evaluation() -> None:
    whole = evaluation_results()
    assert len(tables.outcome_table(whole).rows) == 4
    assert "1 unscored" in tables.outcome_table(whole).rows[0][2]
    assert tables.cost_table(whole).rows == [["none", "1", "80", "23", "0.5", "0.0", "-"]]
    agreement = tables.agreement_rows(whole["agreement"]["refusal"])
    assert agreement.rows[0][2] == "0.800 [0.60, 1.00] by construction"
    assert tables.gap_table(whole).rows[0][:3] == ["ecso", "ours", "ensemble"]
    difference = tables.comparison_table(whole).rows[0][5]
    assert difference.startswith("-55.6 points [")


def test_groups_of_given_replies() -> None:
    columns, rows = tables.group_table(replies_results(), tables.short_rate)
    assert columns == [
        "replies", "harmful requests", "benign requests", "unsafe rate (small)",
        "unsafe rate (keyword)", "over-refusal (small)", "over-refusal (keyword)",
    ]  # fmt: skip
    assert rows[0][:4] == ["all replies", "6", "3", "20.0 [4-62] +1 (17-33)"]
    assert rows[1][:3] == ["model m0", "2", "1"]


def test_reasons_and_agreement_of_given_replies() -> None:
    assert tables.reason_table(replies_results()).rows == [["small", "a reason", "1"]]
    first, second = tables.agreement_lines(replies_results())
    assert first.startswith("agreement of small and keyword on refusal: kappa ")
    assert second.endswith("n 5, 1 unscored")


def test_published_figures_stand_beside_the_runs() -> None:
    target: dict[str, Any] = {
        "set": "s", "condition": "original", "defense": "none", "figure": "over_refusal",
        "published": 5.0, "measured": 6.0, "low": 4.0, "high": 8.0, "n": 9, "inside": True,
    }  # fmt: skip
    rows = tables.target_rows([target, {**target, "measured": None}]).rows
    assert rows[0][3:] == ["over-refusal", "5.00", "6.00 [4.0, 8.0], n 9", "yes"]
    assert rows[1][3:] == ["over-refusal", "5.00", "not measured", "-"]


def test_conditions_have_one_order() -> None:
    names = ["query", "mine", "blur", "blank", "original", "caption"]
    assert headline.in_order(names) == ["original", "blank", "blur", "caption", "query", "mine"]


def test_markdown() -> None:
    table = tables.Table(["a", "b"], [["1", "2"]])
    assert tables.markdown(table) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@given(st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 1)), min_size=2, max_size=6))
def test_cells_are_sorted_by_their_number(numbers: list[float]) -> None:
    cells = [f"{number} % [x]" for number in numbers]
    ordered = sorted(cells, key=tables.sort_key)
    assert [float(text.split(" ")[0]) for text in ordered] == sorted(numbers)


@pytest.mark.parametrize("name", ["query", "original", "blur", "cmrm_dataset", "mine@x"])
def test_every_name_has_words(name: str) -> None:
    assert tables.label(name)
