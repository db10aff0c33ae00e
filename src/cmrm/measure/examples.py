"""Requests whose verdict an image or a defence changed, with both replies, all cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from cmrm.measure.outcomes import Cell, Kind, Outcome, judges_of
from cmrm.measure.texts import first_words

MOST = 12
"""Examples of each defence at most."""
_KINDS: tuple[Kind, ...] = ("harmful", "benign")


def examples_of(cells: Sequence[Cell], *, most: int = MOST) -> list[dict[str, Any]]:
    """Examples by defence, in the form of `measure.schema.Example`, at most `most` of each.

    A defence is shown beside the untouched model under the same condition. The untouched model
    itself (`none`) is shown with the image beside the same request as text. Verdicts are those of
    the first judge; categories take turns.
    """
    judges = judges_of(cells)
    if not judges:
        return []
    by_key = {cell.key: cell for cell in cells}
    changes: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell.defense != "none":
            base = by_key.get((cell.set, cell.condition, "none"))
        else:
            base = by_key.get((cell.set, "query", "none")) if cell.condition == "original" else None
        if base is not None:
            changes.setdefault(cell.defense, []).extend(_changes(base, cell, judges[0]))
    return [
        example
        for defense in sorted(changes, key=lambda name: name != "none")
        for example in _in_turn(changes[defense])[:most]
    ]


def _changes(base: Cell, cell: Cell, judge: str) -> Iterable[dict[str, Any]]:
    for after in cell.of_kind(*_KINDS):
        before = base.outcomes.get(after.sample_id)
        if before is not None and before.verdict(judge) is not after.verdict(judge):
            yield _example(cell, before, after, judge)


def _example(cell: Cell, before: Outcome, after: Outcome, judge: str) -> dict[str, Any]:
    return {
        "set": cell.set,
        "kind": after.kind,
        "category": after.category,
        "request": first_words(after.request),
        "defense": cell.defense,
        "before": first_words(before.reply),
        "after": first_words(after.reply),
        "verdicts": f"{before.verdict(judge).value} \u2192 {after.verdict(judge).value}",
    }


def _in_turn(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of each set and category, then the second of each, and so on."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for example in examples:
        groups.setdefault((example["set"], example["category"]), []).append(example)
    return [example for turn in zip_longest(*groups.values()) for example in turn if example]
