"""The label vocabulary: `harmful` and `benign`, and the words that other tools use for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cmrm.errors import InputError
from cmrm.prompts.sample import Sample
from cmrm.prompts.text import shortened

LABELS = ("harmful", "benign")
"""The labels that rates are made from."""
_WORDS = {"unsafe": "harmful", "safe": "benign", "harmless": "benign"} | dict(
    zip(LABELS, LABELS, strict=True)
)


def folded_label(word: str) -> str:
    """`harmful` for harmful or unsafe, `benign` for benign, safe or harmless; else the word itself.

    Case and white space around the word do not matter.
    """
    return _WORDS.get(word.strip().casefold(), word)


def checked_label(label: str | None) -> str | None:
    """A constant label, folded; None for None.

    Raises:
        InputError: it is neither harmful nor benign.
    """
    folded = None if label is None else folded_label(label)
    if folded is not None and folded not in LABELS:
        raise InputError(f"label is {shortened(label)!r}; one of {', '.join(LABELS)}")
    return folded


def with_label(samples: Iterable[Sample], label: str | None) -> list[Sample]:
    """The samples; `label` is given to those that are labelled neither harmful nor benign.

    Raises:
        InputError: `label` is neither.
    """
    constant = checked_label(label)
    return [
        sample if constant is None or sample.label in LABELS else replace(sample, label=constant)
        for sample in samples
    ]
