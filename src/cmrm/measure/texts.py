"""Texts of requests and replies: their first words, and answers that say nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from cmrm.judges import DEFAULT_JUDGE, assessed_all, make_judge
from cmrm.judges.language import UNSPACED, is_latin

SHOWN_WORDS = 6
"""Words that are shown at most; in a script without blanks two letters count as a word."""
SHOWN_CHARACTERS = 60
"""Characters that are shown at most, the ellipsis among them."""
ELLIPSIS = " ..."
"""Behind a text that was cut."""

_WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\s{UNSPACED}]+")
_LETTERS = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_STOP_WORDS = (
    "about", "after", "again", "also", "because", "been", "before", "being", "could", "does",
    "doing", "from", "have", "here", "into", "just", "like", "make", "more", "most", "much",
    "only", "other", "over", "some", "such", "than", "that", "their", "them", "then", "there",
    "these", "they", "this", "those", "through", "want", "were", "what", "when", "where",
    "which", "while", "with", "would", "your", "yours", "best", "advice", "explain", "guide",
    "help", "short", "should", "steps", "tell", "write", "good", "give",
)  # fmt: skip


def first_words(text: str) -> str:
    """The first words of `text` on one line, with an ellipsis where it was cut.

    Control and invisible characters are left out. No long text is shown in full, in any script.
    """
    line = " ".join("".join(map(_shown, text)).split())
    words = list(_WORD.finditer(line))
    if len(words) <= SHOWN_WORDS and len(line) <= SHOWN_CHARACTERS:
        return line
    end = words[min(len(words), SHOWN_WORDS) - 1].end()
    return line[: min(end, SHOWN_CHARACTERS - len(ELLIPSIS))].rstrip() + ELLIPSIS


def _shown(character: str) -> str:
    """The character, a blank for a break, nothing for an invisible one."""
    kind = unicodedata.category(character)
    if kind in ("Cc", "Zl", "Zp"):
        return " "
    return "" if kind.startswith("C") else character


def is_generic(request: str, reply: str) -> bool | None:
    """Whether `reply` says nothing of what `request` asks for.

    It is generic where it is empty, repeats itself (less than a third of at least 12 words are
    distinct), or shares no word of four or more letters with the request; words with the same first
    five letters are the same. None where request or reply are not in Latin letters.
    """
    if not any(map(str.isalnum, reply)):
        return True
    if not (is_latin(request) and is_latin(reply)):
        return None
    words = _words(reply)
    if len(words) >= 12 and len(set(words)) / len(words) < 1 / 3:
        return True
    subjects = _stems(_words(request))
    return bool(subjects) and not subjects & _stems(words)


def _words(text: str) -> list[str]:
    return _LETTERS.findall(text.lower())


def _stems(words: list[str]) -> set[str]:
    """First five letters of the words that say something."""
    return {word[:5] for word in words if len(word) >= 4 and word not in _STOP_WORDS}


def refuses(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether each reply of (request, reply) is a refusal by the default judge.

    False where it leaves that open.
    """
    judge = make_judge(DEFAULT_JUDGE)
    return [judgement.verdict.is_refusal is True for judgement in assessed_all(judge, pairs)]
