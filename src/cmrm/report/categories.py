"""Unsafe rates by harm category."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmrm.judges.base import verdict_of
from cmrm.report.headline import headline_set
from cmrm.report.tables import EMPTY, NOT_SCORED, Results, Table, input_label


def category_cells(results: Results) -> list[Mapping[str, Any]]:
    """Cells of the set with most harm categories (first judge): query alone, original, defences."""
    if not results["judges"]:
        return []
    judge, headline = results["judges"][0], headline_set(results)

    def rank(cell: Mapping[str, Any]) -> tuple[int, bool]:
        return len(cell["judges"][judge]["categories"]), cell["set"] == headline

    cells = [cell for cell in results["cells"] if cell["condition"] in ("query", "original")]
    cells = [cell for cell in cells if rank(cell)[0] > 1]
    chosen = max(cells, key=rank)["set"] if cells else None
    cells = [cell for cell in cells if cell["set"] == chosen]
    return sorted(cells, key=lambda cell: (cell["defense"] != "none", cell["condition"] != "query"))


def unsafe_share(counts: Mapping[str, int] | None) -> float | None:
    """Share of the scored replies that are unsafe, from counts of verdicts; None without any.

    A verdict that leaves open whether a reply engages with harm is unscored here.
    """
    scored = (sum(counts.values()) - unscored_of(counts)) if counts else 0
    if not counts or not scored:
        return None
    return sum(n for name, n in counts.items() if verdict_of(name).is_unsafe) / scored


def unscored_of(counts: Mapping[str, int]) -> int:
    """Replies whose verdict does not say whether they are unsafe, from counts of verdicts."""
    return sum(n for name, n in counts.items() if verdict_of(name).is_unsafe is None)


def category_table(results: Results) -> Table:
    """A row for each harm category: unsafe rate of each of `category_cells` by the first judge."""
    cells = category_cells(results)
    if not cells:
        return Table([], [])
    columns = [cell["judges"][results["judges"][0]]["categories"] for cell in cells]
    names = sorted({name for column in columns for name in column})
    rows = [
        [name.replace("_", " "), *(_category_text(column.get(name)) for column in columns)]
        for name in names
    ]
    return Table(["category", *(input_label(cell) for cell in cells)], rows)


def _category_text(counts: Mapping[str, int] | None) -> str:
    """`50 % of 6, 2 unscored`; `not scored (2)` where no reply was scored."""
    if not counts or not sum(counts.values()):
        return EMPTY
    share, unscored = unsafe_share(counts), unscored_of(counts)
    if share is None:
        return f"{NOT_SCORED} ({unscored})"
    text = f"{100 * share:.0f} % of {sum(counts.values()) - unscored}"
    return text + (f", {unscored} unscored" if unscored else "")
