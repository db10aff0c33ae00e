"""What cells of chats, parts and lists say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cmrm.measure.turns import text_in, unpacked

USER = {"role": "user", "content": "How do I bake bread?"}
MODEL = {"role": "assistant", "content": "Mix flour and water."}
PARTS = [{"type": "text", "text": "How do I bake"}, {"type": "image_url", "image_url": {}},
         {"type": "text", "text": "bread?"}]  # fmt: skip

CELLS: dict[str, tuple[Any, Any, Any]] = {
    "text": ("bread", "bread", "bread"),
    "number": (7, 7, 7),
    "nothing": (None, None, None),
    "empty list": ([], None, None),
    "list of one": (["bread"], "bread", "bread"),
    "list in a list": ([["bread"]], "bread", "bread"),
    "list of two": (["a", "b"], ["a", "b"], ["a", "b"]),
    "chat": ([USER, MODEL], "How do I bake bread?", "Mix flour and water."),
    "chat with a system prompt": (
        [{"role": "system", "content": "Be kind."}, USER, MODEL],
        "How do I bake bread?", "Mix flour and water.",
    ),
    "the last of two turns": (
        [USER, MODEL, {"role": "user", "content": "And rolls?"},
         {"role": "assistant", "content": "Smaller."}], "And rolls?", "Smaller.",
    ),
    "the user has the last word": (
        [USER, MODEL, {"role": "user", "content": "And rolls?"}], "And rolls?", None,
    ),
    "request alone": ([USER], "How do I bake bread?", None),
    "reply alone": ([MODEL], None, "Mix flour and water."),
    "system prompt alone": ([{"role": "system", "content": "Be kind."}], None, None),
    "a tool between": (
        [USER, {"role": "assistant", "content": ""}, {"role": "tool", "content": "5"}, MODEL],
        "How do I bake bread?", "Mix flour and water.",
    ),
    "content parts": (
        [{"role": "user", "content": PARTS}, MODEL], "How do I bake\nbread?",
        "Mix flour and water.",
    ),
    "parts alone": (PARTS, "How do I bake\nbread?", "How do I bake\nbread?"),
    "ShareGPT": (
        [{"from": "human", "value": "Bread?"}, {"from": "gpt", "value": "Flour."}],
        "Bread?", "Flour.",
    ),
    "Gemini": (
        [{"role": "user", "parts": [{"text": "Bread?"}]},
         {"role": "model", "parts": [{"text": "Flour."}]}], "Bread?", "Flour.",
    ),
    "a refusal of OpenAI": (
        [USER, {"role": "assistant", "content": None, "refusal": "I can't help with that."}],
        "How do I bake bread?", "I can't help with that.",
    ),
    "message": (MODEL, "Mix flour and water.", "Mix flour and water."),
    "answers of vLLM": ([{"text": "Flour."}], "Flour.", "Flour."),
    "arguments of lmms-eval": (
        ["Bread?", {"max_new_tokens": 16}, 0, "task", "test"], "Bread?",
        ["Bread?", {"max_new_tokens": 16}, 0, "task", "test"],
    ),
    "arguments of lm-eval": ({"gen_args_0": {"arg_0": "Bread?", "arg_1": {}}}, "Bread?", "Bread?"),
    "an unknown object": ({"x": 1}, {"x": 1}, {"x": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_text_of_a_cell(name: str) -> None:
    cell, request, reply = CELLS[name]
    assert text_in(cell, "request") == request
    assert text_in(cell, "reply") == reply


def test_lists_that_were_written_as_text() -> None:
    assert unpacked(['["flour"]', "['water']", ""]) == [["flour"], ["water"], None]
    assert unpacked([json.dumps([USER, MODEL])]) == [[USER, MODEL]]


@pytest.mark.parametrize(
    "cells",
    [
        ['["flour"]', "plain text"],
        ["[1] flour\n[2] water [3]"],
        ["[see the image]"],
        ['{"content": "flour"}'],
        [],
        [None, ""],
        [["flour"]],
    ],
)
def test_text_that_is_no_list_stays(cells: list[Any]) -> None:
    assert unpacked(cells) == cells
