"""The language of a text, by its letters and its most common words.

A judge of text leaves the languages that it was not measured on unscored. A text of few words is
taken for English unless one of them belongs to another language. `words.json` lists the words.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from cmrm.judges.base import EMPTY
from cmrm.judges.normalise import normalise

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Letters of scripts that put no blanks between words (Thai, Lao, Burmese, Khmer, kana, Han), as
the inside of a character class."""

_WORD = re.compile(rf"[{UNSPACED}]|[^\W\d_{UNSPACED}]+(?:['-][^\W\d_{UNSPACED}]+)*")
_FEW = 5
"""Words from which on a text must hold common English words."""
_DIFFERENT = 2
"""Different ones among them, at least."""
_SHARE = 1 / 12
"""Share of them among its words, at least. English replies hold a third and more."""
_LONGEST = 40
"""Letters of a word at most."""
_APOSTROPHES = 3
"""Apostrophes in a word at most."""


@cache
def _common(kind: str) -> frozenset[str]:
    """Common words: `english`, or `in_names`, foreign ones that English names hold too."""
    return frozenset(_tables()[kind].split())


@cache
def _others() -> dict[str, frozenset[str]]:
    """Language -> its common words."""
    return {name: frozenset(words.split()) for name, words in _tables()["others"].items()}


@cache
def _tables() -> Any:
    return json.loads(files("cmrm.judges").joinpath("words.json").read_text(encoding="utf-8"))


MEASURED = ("English", "Arabic", "Chinese", "French", "German", "Spanish")
"""Languages that the judge `small` was measured on; Chinese in simplified characters."""


ENGAGEMENT = ("English", "French")
"""Languages of which at least 10 replies were labelled unsafe, so that `small` may say that a reply
does not engage. Of the other measured ones it may say that a reply engages, and never that it does
not."""


@dataclass(frozen=True)
class MeasuredText:
    """A reply as the judge `small` reads it."""

    text: str
    """Normalised."""
    language: str | None
    """Its language; None where it is not known."""
    reason: str | None
    """Why it cannot be judged, on one line; None where it can."""


@dataclass(frozen=True)
class Look:
    """What a text looks like."""

    language: str | None
    """Its language; None where it is not known."""
    reason: str | None
    """Why it is not taken for English, on one line; None for English."""


def english_text(reply: str) -> tuple[str, str | None]:
    """A reply normalised for a judge of English, and why it cannot judge it (None where it can)."""
    text = normalise(reply)
    return text, _nothing(reply, text) or not_english(text)


def measured_text(reply: str) -> MeasuredText:
    """A reply normalised for a judge of the languages in `MEASURED`."""
    text = normalise(reply)
    reason = _nothing(reply, text)
    if reason is not None:
        return MeasuredText(text, None, reason)
    look = look_at(text)
    if look.language in MEASURED:
        return MeasuredText(text, look.language, None)
    reason = f"not a language that the judge was measured on: {look.reason}"
    return MeasuredText(text, look.language, reason)


def _nothing(reply: str, text: str) -> str | None:
    """Why a reply that is normalised to `text` has nothing to judge, or None where it has."""
    if text:
        return None
    return "the reply holds only thinking or markup" if reply.strip() else EMPTY


def not_english(text: str) -> str | None:
    """Why `text` (normalised) is not taken for English, or None where it is."""
    return look_at(text).reason


def look_at(text: str) -> Look:
    """The language of `text` (normalised).

    Digits alone are taken for an English answer, punctuation and emoji alone are not.
    """
    words = _WORD.findall(text)
    if not words:
        if any(map(str.isdigit, text)):
            return Look("English", None)
        return Look(None, "not English, it holds no word")
    script = _other_script(words)
    if script is not None:
        return Look(
            _language_of_script(script, text),
            f"not English, most of it is in {script} letters",
        )
    if any(map(_endless, words)):
        return Look(None, "not English, a word has no end")
    lower = [word.lower() for word in words]
    english = sum(word in _common("english") for word in lower)
    language, count = _nearest(words, lower)
    if count > english:
        return Look(language, f"not English, its words look {language}")
    different = len(_common("english").intersection(lower))
    if len(words) >= _FEW and (english < _SHARE * len(words) or different < _DIFFERENT):
        return Look(None, "not English, it holds hardly any common English word")
    return Look("English", None)


_KANA = re.compile("[\u3040-\u30ff]")
_NOT_ARABIC = re.compile("[\u067e\u0686\u0698\u06af\u06a9\u06cc\u0679\u0688\u06d2\u06c1\u06be]")
"""Letters of Persian and Urdu that Arabic does not use."""
_FOREIGN = 1 / 30
"""Share of them in a text from which on it is not taken for Arabic."""
_TRADITIONAL = re.compile(
    "[\u9019\u500b\u5011\u70ba\u8207\u6703\u5c0d\u7121\u8aaa\u8acb\u61c9\u8a72\u4f86\u6642\u5f8c\u904e\u9084\u6c92\u5716\u9ede]"
)
_SIMPLIFIED = re.compile(
    "[\u8fd9\u4e2a\u4eec\u4e3a\u4e0e\u4f1a\u5bf9\u65e0\u8bf4\u8bf7\u5e94\u8be5\u6765\u65f6\u540e\u8fc7\u8fd8\u6ca1\u56fe\u70b9]"
)


def _language_of_script(script: str, text: str) -> str | None:
    """The language that a text in other than Latin letters is in; None where it is not known."""
    if script == "Chinese":
        if _KANA.search(text) or len(_TRADITIONAL.findall(text)) > len(_SIMPLIFIED.findall(text)):
            return None
        return "Chinese"
    arabic = script == "Arabic" and len(_NOT_ARABIC.findall(text)) < _FOREIGN * len(text)
    return "Arabic" if arabic else None


def _endless(word: str) -> bool:
    """Whether a word is a loop of the model, such as "SorryI'mSorryI'mSorry" without end."""
    return word.count("'") > _APOSTROPHES or max(map(len, word.split("-"))) > _LONGEST


def is_latin(text: str) -> bool | None:
    """Whether most words of `text` are in Latin letters; None where it holds no word."""
    words = _WORD.findall(text)
    return _other_script(words) is None if words else None


def _other_script(words: list[str]) -> str | None:
    """The script of most words as Unicode calls it, or None where it is Latin."""
    scripts = Counter(unicodedata.name(word[0], "unknown").split()[0].title() for word in words)
    if 2 * scripts.pop("Latin", 0) > len(words) or not scripts:
        return None
    script = scripts.most_common(1)[0][0]
    return "Chinese" if script == "Cjk" else script


def _nearest(words: list[str], lower: list[str]) -> tuple[str, int]:
    """The language with the most common words in the text, and their number.

    A word that English names hold too ("Los Angeles") counts in lower case, and not by itself.
    """
    best, most = "", 0
    capitals = all(map(str.isupper, words))
    names = set() if capitals else _common("in_names").difference(words)
    for language, common in _others().items():
        hits = [word for word in lower if word in common and word not in names]
        if len(hits) > most and (len(hits) > 1 or hits[0] not in _common("in_names")):
            best, most = language, len(hits)
    return best, most
