"""What each defence gives back, and what it costs, beside the untouched model: one small table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmrm.report.headline import gap_of, headline_cells
from cmrm.report.tables import EMPTY, Results, Table, gap_text, label, without_empty

COLUMNS = (
    "defence",
    "gap closed",
    "over-refusal, beside the untouched model with image",
    "over-refusal, beside it as text",
    "accuracy, beside it with image",
)


def balance_table(results: Results) -> Table:
    """A row for each defence of the headline set, by the first judge: paired differences in points
    with 95 % intervals. Accuracy is that of the first set with right answers."""
    if not results["judges"]:
        return Table([], [])
    judge = results["judges"][0]
    rows = []
    for cell in headline_cells(results):
        name = cell["defense"]
        if cell["condition"] != "original" or name == "none":
            continue
        refused = {"set": cell["set"], "outcome": "over_refusal", "judge": judge}
        wanted = [
            {**refused, "baseline": "untouched"},
            {**refused, "baseline": "text"},
            {"outcome": "accuracy", "baseline": "untouched"},
        ]
        place = {"defense": name, "condition": "original"}
        differences = [points_text(_first(results, {**place, **some})) for some in wanted]
        rows.append([label(name), gap_text(gap_of(results, cell, judge)), *differences])
    return without_empty(COLUMNS, rows) if rows else Table([], [])


def points_text(row: Mapping[str, Any] | None) -> str:
    """`+2.5 points [0.8, 4.7]`: a paired difference; a dash without one."""
    if row is None:
        return EMPTY
    value, low, high = (100 * row[name] for name in ("difference", "low", "high"))
    return f"{value:+.1f} points [{low:.1f}, {high:.1f}]"


def _first(results: Results, wanted: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first comparison with these values."""
    return next(
        (
            row
            for row in results["comparisons"]
            if all(row.get(name, "untouched") == value for name, value in wanted.items())
        ),
        None,
    )
