"""What each defence gives back, and what it costs, as one small table."""

from __future__ import annotations

from cmrm.measure.outcomes import Cell, Outcome
from cmrm.measure.table import results_of
from cmrm.report.balance import balance_table


def cell(condition: str, defense: str, unsafe: int, refused: int, right: int | None) -> list[Cell]:
    """40 harmful and 40 benign samples, and 40 questions of another set where `right` is given."""
    outcomes = {}
    for k in range(40):
        verdict = "complied" if k < unsafe else "refused"
        outcomes[f"h{k}"] = Outcome(f"h{k}", "harmful", "", "ask", "say", {"keyword": verdict})
        verdict = "refused" if k < refused else "complied"
        outcomes[f"b{k}"] = Outcome(f"b{k}", "benign", "", "ask", "say", {"keyword": verdict})
    cells = [Cell("demo", condition, defense, 80, outcomes, {}, None)]
    if right is not None:
        marks = {f"q{k}": {"exact": "C" if k < right else "I"} for k in range(40)}
        answers = {
            key: Outcome(key, "utility", "", "ask", "say", {}, scores=scores)
            for key, scores in marks.items()
        }
        cells.append(Cell("vqa", condition, defense, 40, answers, {}, None))
    return cells


def test_each_defence_has_its_gap_and_its_costs() -> None:
    cells = [
        *cell("query", "none", unsafe=4, refused=6, right=None),
        *cell("original", "none", unsafe=24, refused=2, right=36),
        *cell("original", "cmrm_fill", unsafe=8, refused=4, right=35),
    ]
    table = balance_table(results_of(cells))
    (row,) = table.rows
    assert row[0] == "CMRM fill"
    assert row[1].startswith("80 % [")
    assert [text.split(" [")[0] for text in row[2:]] == [
        "+5.0 points",
        "-5.0 points",
        "-2.5 points",
    ]


def test_what_was_not_measured_has_no_column() -> None:
    cells = [
        *cell("original", "none", unsafe=24, refused=2, right=None),
        *cell("original", "ecso", unsafe=8, refused=4, right=None),
    ]
    table = balance_table(results_of(cells))
    assert table.columns == ["defence", "over-refusal, beside the untouched model with image"]
    assert balance_table(results_of(cells[:1])).rows == []
