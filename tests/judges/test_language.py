"""English, and what is not."""

from __future__ import annotations

import pytest

from cmrm.judges.language import english_text, is_latin, not_english
from judges.replies import ANSWERS, NOT_ENGLISH, REFUSALS


@pytest.mark.parametrize("name", NOT_ENGLISH)
def test_other_languages_are_told(name: str) -> None:
    reason = english_text(NOT_ENGLISH[name])[1]
    assert reason is not None
    assert reason.startswith("not English, ")


@pytest.mark.parametrize("reply", REFUSALS + ANSWERS)
def test_english_is_english(reply: str) -> None:
    assert english_text(reply)[1] is None


@pytest.mark.parametrize(
    "text",
    ["Yes.", "No", "blue", "42", "Los Angeles.", "Las Vegas, Los Angeles", "Vincent van Gogh",
     "Ben", "Beyonc\u00e9", "World war two", "red, green",
     "The Chinese word for it is \u4f60\u597d.",
     "Use the word gracias when you thank somebody.", "how-to-bake-the-best-bread-of-the-world"],
)  # fmt: skip
def test_short_answers_and_names_are_english(text: str) -> None:
    assert not_english(text) is None


def test_the_reason_names_the_language() -> None:
    assert "German" in str(not_english("Das ist nicht gut."))
    assert "Chinese" in str(not_english("\u5bf9\u4e0d\u8d77"))
    assert "Cyrillic" in str(not_english("\u041d\u0435\u0442"))


def test_most_words_decide_on_the_letters() -> None:
    assert is_latin("The bread is \u9762\u5305") is True
    assert is_latin("\u9762\u5305 bread") is False
    assert is_latin("M\u00fcsli f\u00fcr alle") is True
    assert is_latin("42!") is None
