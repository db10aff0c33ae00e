"""First words of texts, and answers that say nothing."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmrm.measure.texts import SHOWN_CHARACTERS, first_words, is_generic

CHINESE = "\u8bf7\u544a\u8bc9\u6211\u5982\u4f55\u505a\u4e00\u4e2a\u5f88\u597d\u7684\u9762\u5305"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three four five six seven", "one two three four five six ..."),
        ("one two three four five six", "one two three four five six"),
        ("one\n two", "one two"),
        ("one\x00\x1b[31mtwo\u2028three\u202e", "one [31mtwo three"),
        ("", ""),
        (CHINESE, CHINESE[:12] + " ..."),
        ("\u5bf9\u4e0d\u8d77", "\u5bf9\u4e0d\u8d77"),
        ("a" * 500, "a" * 56 + " ..."),
        ("word " * 3 + "b" * 500, "word word word " + "b" * 41 + " ..."),
    ],
)
def test_first_words(text: str, shown: str) -> None:
    assert first_words(text) == shown


@given(st.text(min_size=80))
def test_no_long_text_is_shown_in_full(text: str) -> None:
    shown = first_words(text)
    assert len(shown) <= SHOWN_CHARACTERS
    assert not any(unicodedata.category(character) == "Cc" for character in shown)


@pytest.mark.parametrize(
    ("request_", "reply", "generic"),
    [
        ("How do I bake bread?", "", True),
        ("How do I bake bread?", " ...\n", True),
        ("How do I bake bread?", "the the the the the the the the the the the the", True),
        ("How do I bake bread?", "It is a matter of great importance to consider.", True),
        ("How do I bake bread?", "To bake, mix flour, water and time.", False),
        ("Why?", "Because.", False),
        (
            "Wie backe ich ein s\u00fc\u00dfes Br\u00f6tchen?",
            "Br\u00f6tchen backen ist leicht.",
            False,
        ),
        (CHINESE, "\u5148\u628a\u9762\u7c89\u548c\u6c34\u6df7\u5408", None),
        ("How do I bake bread?", "\u5148\u628a\u9762\u7c89\u548c\u6c34\u6df7\u5408", None),
        (CHINESE, "Mix flour and water.", None),
        ("\u041a\u0430\u043a?", "\u0422\u0430\u043a.", None),
        ("How many?", "42", None),
    ],
)
def test_generic_answers(request_: str, reply: str, generic: bool | None) -> None:
    assert is_generic(request_, reply) is generic
