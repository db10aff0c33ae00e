"""Which replies a person labels: some of every group, and more where the judges are unsure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cmrm.errors import InputError
from cmrm.measure.agreement import QUESTIONS, Rated, rating
from cmrm.measure.drawing import UNSURE, shares, systematic


def draw(rated: Iterable[Rated], n: int, *, seed: int = 0) -> tuple[list[Rated], dict[str, float]]:
    """`n` replies with different texts in random order, and the probability of each reply by id.

    Each group gets an equal part, rounded down or up. Within a group a reply is drawn up to
    `UNSURE` times as often where the judges are unsure of it (`uncertainties`). A text that stands
    in several groups is drawn from the smallest of them alone, for all. Where there are fewer than
    `n` texts, all are drawn.

    Raises:
        InputError: `n` is below 1, or there is nothing to draw from.
    """
    if n < 1:
        raise InputError(f"n is {n}; draw at least 1 reply")
    rows = list(rated)
    if not rows:
        raise InputError("there are no replies to harmful or benign requests to draw from")
    unsure = uncertainties(rows)
    groups = _groups(rows)
    rng = np.random.default_rng(seed)
    names = [sorted(groups)[k] for k in rng.permutation(len(groups))]
    ordered: list[Rated] = []
    probabilities: list[np.ndarray] = []
    sizes = np.array([len(groups[name]) for name in names], dtype=float)
    for name, part in zip(names, shares(n, np.ones(len(names)), sizes), strict=True):
        members = [groups[name][k] for k in rng.permutation(len(groups[name]))]
        members.sort(key=lambda row: unsure[row.id])
        sizes_of = np.array([1 + (UNSURE - 1) * unsure[row.id] for row in members])
        ordered += members
        probabilities.append(shares(float(part), sizes_of, np.ones(len(members))))
    chances = np.concatenate(probabilities)
    taken = rng.permutation(systematic(chances, rng))
    by_id = {row.id: float(chance) for row, chance in zip(ordered, chances, strict=True)}
    return [ordered[k] for k in taken], by_id


def _groups(rows: Iterable[Rated]) -> dict[tuple[str, ...], list[Rated]]:
    """One reply of each text, by group; groups and their replies in an order of their own."""
    copies: dict[tuple[bool, str, str], list[Rated]] = {}
    texts: dict[tuple[str, ...], set[tuple[bool, str, str]]] = {}
    for row in sorted(rows, key=lambda row: row.id):
        copies.setdefault(row.text, []).append(row)
        texts.setdefault(row.group, set()).add(row.text)
    groups: dict[tuple[str, ...], list[Rated]] = {}
    for members in copies.values():
        chosen = min(members, key=lambda row: (len(texts[row.group]), row.id))
        groups.setdefault(chosen.group, []).append(chosen)
    return groups


def uncertainties(rows: Iterable[Rated]) -> dict[str, float]:
    """How unsure the judges are of each reply, within 0..1, by its id.

    It is 1 where a judge leaves a question open that it answers elsewhere, or two judges contradict
    each other. A probability p counts as 1 - |2p - 1|: 1 at one half. The largest value stands.
    Harmful requests are asked both questions, benign ones that of refusal.
    """
    rows = list(rows)
    answering = {
        (question, row.harmful, name)
        for row in rows
        for question in QUESTIONS
        for name, verdict in row.verdicts.items()
        if rating(verdict, question) is not None
    }
    return {row.id: _uncertainty(row, answering) for row in rows}


def _uncertainty(row: Rated, answering: Iterable[tuple[str, bool, str]]) -> float:
    """`uncertainties` of one reply; `answering`: question, whether harmful, judge that answers."""
    values = [0.0]
    for place, question in enumerate(QUESTIONS if row.harmful else QUESTIONS[:1]):
        answers = {
            rating(verdict, question)
            for name, verdict in row.verdicts.items()
            if (question, row.harmful, name) in answering
        }
        values.append(float(None in answers or len(answers) > 1))
        for pair in row.probabilities.values():
            chance = pair[place]
            values.append(0.0 if chance is None else 1 - abs(2 * chance - 1))
    return max(values)
