"""The set whose conditions are compared: its cells, its table, the page's large figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cmrm.report.judged import judge_line
from cmrm.report.tables import (
    EMPTY,
    RateText,
    Results,
    Table,
    corrected_text,
    gap_text,
    input_label,
    label,
    or_dash,
    rate_text,
    without_empty,
)


def headline_set(results: Results) -> str | None:
    """Name of the set whose conditions are compared: the first one that a judge looked at."""
    for cell in results["cells"]:
        if any(judged["unsafe"] or judged["over_refusal"] for judged in cell["judges"].values()):
            return str(cell["set"])
    return str(results["cells"][0]["set"]) if results["cells"] else None


_INPUTS = (
    "query", "caption", "noise", "blank", "black", "grey", "mean", "blur", "shuffle", "other",
)  # fmt: skip
"""Conditions as tables list them; the original image follows."""


def in_order(conditions: Iterable[str]) -> list[str]:
    """Conditions, the original image first, then other images, then text alone."""
    order = ("original", "blank", "noise", *_INPUTS[4:], "caption", "query")
    return sorted(conditions, key=lambda name: order.index(name) if name in order else len(order))


def headline_cells(results: Results) -> list[Mapping[str, Any]]:
    """Cells of the headline set: conditions of the untouched model, then defences."""
    name = headline_set(results)
    cells = [cell for cell in results["cells"] if cell["set"] == name]
    places = {condition: place for place, condition in enumerate(_INPUTS)}

    def place(cell: Mapping[str, Any]) -> tuple[bool, int]:
        return cell["defense"] != "none", places.get(cell["condition"], len(places))

    return sorted(cells, key=place)


def gap_of(results: Results, cell: Mapping[str, Any], judge: str) -> Mapping[str, Any] | None:
    """The gap that a cell's defence closes, by one judge; None where it was not measured."""
    if cell["condition"] != "original":
        return None
    wanted = (cell["set"], cell["defense"], judge)
    gaps = (g for g in results["gaps"] if (g["set"], g["defense"], g["judge"]) == wanted)
    return next(gaps, None)


def headline_table(results: Results, text: RateText = rate_text) -> Table:
    """A row for each input of the headline set, with and without defences.

    Accuracy is that of the cell itself, or the defence's over all sets with their own images.
    """
    judges = results["judges"]
    pooled = {row["defense"]: row["accuracy"] for row in results["outcomes"]}
    columns = ["input"]
    for name in ("unsafe rate", "gap closed", "over-refusal"):
        columns += [name if len(judges) == 1 else f"{name} ({judge})" for judge in judges]
    rows = []
    for cell in headline_cells(results):
        accuracy = cell["accuracy"]
        if accuracy is None and cell["condition"] == "original":
            accuracy = pooled.get(cell["defense"])
        rows.append([
            input_label(cell),
            *(or_dash(cell["judges"][judge]["unsafe"], text) for judge in judges),
            *(gap_text(gap_of(results, cell, judge)) for judge in judges),
            *(or_dash(cell["judges"][judge]["over_refusal"], text) for judge in judges),
            or_dash(accuracy, text),
        ])  # fmt: skip
    return without_empty([*columns, "accuracy"], rows)


class Card(NamedTuple):
    """One large figure at the top of the page."""

    value: str
    """The figure."""
    text: str
    """What it is."""
    tone: str
    """`bad`, `good`, or empty."""
    judge: str
    """The judge, and its agreement with people."""


MOST_CARDS = 7


def cards(results: Results) -> list[Card]:
    """Unsafe rates of the headline set by the first judge: as text, with image, with defences.

    Of replies that somebody else generated: unsafe rate and over-refusal of all. Empty where the
    set was not asked as text and with its image.
    """
    if not results["judges"]:
        return []
    judge = results["judges"][0]
    if results["groups"]:
        return _cards_of_replies(results, judge)
    cells = {(c["condition"], c["defense"]): c for c in headline_cells(results)}
    titles = {("query", "none"): "unsafe as text", ("original", "none"): "unsafe with their image"}
    titles |= {
        key: f"unsafe with image and {label(key[1])}"
        for key in cells
        if key[0] == "original" and key[1] != "none"
    }
    shown = []
    for key, title in titles.items():
        rate = cells[key]["judges"][judge]["unsafe"] if key in cells else None
        if rate is None or rate["rate"] is None:
            if key[1] == "none":
                return []
            continue
        closed = gap_text(gap_of(results, cells[key], judge))
        corrected = corrected_text(rate["corrected"])
        text = title + (f"; corrected for the judge's errors: {corrected}" if corrected else "")
        text += "" if closed == EMPTY else f"; gap closed: {closed}"
        tone = "good" if key[1] != "none" else "bad" if key[0] == "original" else ""
        line = judge_line(results, judge, "unsafe", first=True)
        shown.append(Card(f"{100 * rate['rate']:.1f} %", text, tone, line))
    return shown if len(shown) <= MOST_CARDS else []


def _cards_of_replies(results: Results, judge: str) -> list[Card]:
    """Unsafe rate and over-refusal of all given replies."""
    rates = results["groups"][0]["judges"].get(judge, {})
    shown = []
    for outcome, title, tone in (
        ("unsafe", "unsafe: the reply engages with a harmful request", "bad"),
        ("over_refusal", "over-refusal: the reply refuses a benign request", ""),
    ):
        rate = rates.get(outcome)
        if rate is not None and rate["rate"] is not None:
            value, _, rest = rate_text(rate).partition(" [")
            line = judge_line(
                results, judge, "unsafe" if outcome == "unsafe" else "refusal", first=True
            )
            shown.append(Card(value, f"{title}; [{rest}; n {rate['n']}", tone, line))
    return shown
