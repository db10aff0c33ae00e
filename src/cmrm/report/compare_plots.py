"""Figures of two runs side by side: two rates a row, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

from cmrm.prompts.text import shortened
from cmrm.report.drawing import FURTHER, Picture, drawn, whisker
from cmrm.report.tables import label

MOST_ROWS = 40
"""Rows of a figure; the table has all."""
SIDES = (("left", "o", FURTHER[4], -0.16), ("right", "s", FURTHER[0], 0.16))
"""Side, mark, colour, offset: told apart by their form too."""


def comparison_pictures(document: Mapping[str, Any]) -> dict[str, Picture]:
    """A figure for each of unsafe rate, over-refusal and accuracy that there is."""
    words = {"unsafe": "unsafe rate", "over_refusal": "over-refusal", "accuracy": "accuracy"}
    figures = {
        f"compare_{figure}": (
            lambda d, figure=figure, text=text: _figure(d, figure, text),
            f"{text} of both runs with 95 % intervals, one row for each defence, set and condition",
        )
        for figure, text in words.items()
    }
    return drawn(figures, document)


def _figure(document: Mapping[str, Any], figure: str, text: str) -> Figure | None:
    rows = [row for row in document["rows"] if row["figure"] == figure]
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    rows = [row for row in rows if row["judge"] == judges[0]][:MOST_ROWS] if judges else []
    if not rows:
        return None
    drawing = Figure(figsize=(8, 1.3 + 0.46 * len(rows)))
    axes = drawing.subplots()
    for side, mark, colour, offset in SIDES:
        for place, row in enumerate(rows):
            rate = row[f"{side}_rate"]
            axes.errorbar(
                100 * rate["rate"], place + offset, xerr=whisker(rate), fmt=mark, color=colour,
                capsize=3, lw=1.2, ms=6, label=document[side]["name"] if not place else None,
            )  # fmt: skip
    for place in range(1, len(rows)):
        axes.axhline(place - 0.5, color=rcParams["grid.color"], lw=0.4)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows])
    axes.invert_yaxis()
    axes.set(
        xlim=(-2, 102),
        ylim=(len(rows) - 0.5, -0.5),
        xlabel=f"{text}, % ({judges[0]}), 95 % Wilson interval",
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return drawing


def _name(row: Mapping[str, Any]) -> str:
    names = dict.fromkeys(label(row[side]) for side in ("left", "right"))
    return shortened(f"{' / '.join(names)}, {row['set']}, {label(row['condition'])}", 60)
