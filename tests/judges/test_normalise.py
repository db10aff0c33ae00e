"""The text that judges read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmrm.judges.normalise import normalise, strip_thinking

SORRY = "I'm sorry, but I can't help."


@pytest.mark.parametrize(
    "reply",
    [
        "**I'm sorry**, but I can't help.",
        "# I'm sorry, but I can't help.",
        "> *I'm sorry, but I can't help.*",
        "- I'm sorry, but __I can't__ help.",
        "\"I'm sorry, but I can't help.\"",
        "\u201cI\u2019m sorry, but I can\u2019t help.\u201d",
        "\"I'm sorry, but I can't help.",
        "'I'm sorry, but I can't help.'",
        "I\u00b4m sorry, but I can`t help.",
        "\ufeffI\u200b'm sorry, but\u00a0I can\u00adn't help.".replace(
            "can\u00adn't", "c\u00adan't"
        ),
        "Assistant: I'm sorry, but I can't help.",
        "**Answer:** I'm sorry, but I can't help.",
        "### Response:\n\nI'm sorry, but I can't help.",
        "AI: Assistant: I'm sorry, but I can't help.",
        "<|im_start|>assistant\nI'm sorry, but I can't help.<|im_end|>",
        "<answer>I&#39;m sorry, but I can&#39;t help.</answer>",
        "<p>I'm sorry, but I can't help.</p>",
        "```\nI'm sorry, but I can't help.\n```",
        "[I'm sorry](https://example.org), but I can't help.",
        "I'm sorry,\tbut \x07 I can't help.\r\n\r\n---\n",
        "<think>hm</think>I'm sorry, but I can't help.",
        "\uff29'm sorry, but I can't help.",
    ],
)
def test_dress_is_taken_off(reply: str) -> None:
    assert normalise(reply) == SORRY


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("1. Mix.\n\n2. Bake.", "1. Mix.\n2. Bake."),
        ("snake_case and 2 < 3", "snake_case and 2 < 3"),
        ("Two\u2028lines", "Two\nlines"),
        ('She said "no" and left.', 'She said "no" and left.'),
        ("First line.<br>Second line.", "First line.\nSecond line."),
        ("The answer is blue.", "The answer is blue."),
        ("", ""),
        ("** **", ""),
    ],
)
def test_words_stay(reply: str, text: str) -> None:
    assert normalise(reply) == text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>b", "b"),
        ("<THINKING>a</THINKING>b", "b"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("a</think>b", "b"),
        ("<think>a", ""),
        ("  <think>a", "  "),
        ("Put <think> into the prompt.", "Put <think> into the prompt."),
        ("\u25c1think\u25b7a\u25c1/think\u25b7b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("<|channel|>analysis<|message|>a<|end|>b", "b"),
        ("b<|end|>", "b<|end|>"),
        ("no thinking", "no thinking"),
    ],
)
def test_thinking_is_no_answer(text: str, answer: str) -> None:
    assert strip_thinking(text).strip() == answer.strip()


@given(st.text())
def test_any_text_is_normalised(text: str) -> None:
    lines = normalise(text).split("\n")
    assert all(line == " ".join(line.split()) for line in lines)


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "_ ", "[a](", "> ", "- ", "'", "&", "<b", "*"]
)
def test_long_replies_of_marks_are_read(piece: str) -> None:
    assert len(normalise(piece * 20_000)) <= len(piece) * 20_000
