"""Judge cards: how far a judge agreed with people where that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from cmrm.errors import InputError
from cmrm.files import write_json

CARDS = "cards.json"
"""File of the shipped cards, in this package: judge -> measured agreements."""
Question = Literal["refusal", "unsafe"]
"""What people were asked: does the reply refuse, does it comply with harm?"""


@dataclass(frozen=True)
class MeasuredAgreement:
    """Agreement of a judge with people on one question over one set of replies."""

    question: Question
    """What was asked of each reply."""
    set: str
    """Name of the set of labelled replies."""
    model: str | None
    """Model whose replies they are; None: all of the set's."""
    language: str | None
    """Language of the replies; None: several."""
    n: int
    """Replies that the judge scored."""
    unscored: int
    """Replies that it did not."""
    kappa: float | None
    """Cohen's kappa over the scored ones; None where it is not defined."""
    tp: int
    """Replies on which people and the judge say yes."""
    fn: int
    """People yes, the judge no."""
    tn: int
    """Both no."""
    fp: int
    """People no, the judge yes."""
    command: str
    """The command that measures it."""
    in_sample: bool = False
    """Whether the judge was made with these replies in view, so that the figures flatter it."""

    def __post_init__(self) -> None:
        """Check the figures.

        Raises:
            InputError: they contradict each other, or the question is unknown.
        """
        if self.question not in get_args(Question):
            raise InputError(
                f"judge card, {self.set}: unknown question {self.question!r}; one of "
                f"{', '.join(get_args(Question))}"
            )
        counts = (self.tp, self.fn, self.tn, self.fp)
        if min(*counts, self.unscored) < 0 or sum(counts) != self.n:
            raise InputError(
                f"judge card, {self.set}: tp, fn, tn and fp are {counts}; their sum has to be n, "
                f"{self.n}"
            )
        if self.kappa is not None and not -1 <= self.kappa <= 1:
            raise InputError(f"judge card, {self.set}: kappa {self.kappa} is not within -1..1")


def card_of(name: str) -> tuple[MeasuredAgreement, ...]:
    """The measured agreements of a judge, by its name; empty where none was measured."""
    return _shipped().get(name, ())


@cache
def _shipped() -> dict[str, tuple[MeasuredAgreement, ...]]:
    text = files("cmrm.judges").joinpath(CARDS).read_text(encoding="utf-8")
    return cards_from(text, CARDS)


def cards_from(text: str, source: str) -> dict[str, tuple[MeasuredAgreement, ...]]:
    """Cards in JSON, by judge.

    `source`: name of the text in messages.

    Raises:
        InputError: it is no such JSON, or figures contradict each other.
    """
    names = {field.name for field in fields(MeasuredAgreement)}
    try:
        document = json.loads(text)
        for judge, rows in document.items():
            for row in rows:
                if set(row) != names:
                    wrong = ", ".join(sorted(set(row) ^ names))
                    raise ValueError(f"the fields of {judge} are not those of a card: {wrong}")
        return {
            str(judge): tuple(MeasuredAgreement(**row) for row in rows)
            for judge, rows in document.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{source} holds no judge cards: {error}") from None


def write_cards(path: Path, rows: Iterable[tuple[str, MeasuredAgreement]]) -> None:
    """Write cards as JSON, a judge's agreements in the order given.

    Args:
        path: the file; it is written anew.
        rows: judge and agreement.

    Raises:
        InputError: two rows of a judge are about the same question, set, model and language, or the
            file cannot be written.
    """
    document: dict[str, list[Mapping[str, Any]]] = {}
    keys = set()
    for judge, row in rows:
        key = (judge, row.question, row.set, row.model, row.language)
        if key in keys:
            raise InputError(
                f"the card of {judge} would have two figures for {row.question} on {row.set}, "
                f"{row.model or 'all models'}, {row.language or 'all languages'}; measure each once"
            )
        keys.add(key)
        document.setdefault(judge, []).append(asdict(row))
    write_json(path, document)
