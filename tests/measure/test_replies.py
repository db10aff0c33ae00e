"""Rows of any table as replies: columns, labels, cells that cannot be used."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmrm.errors import InputError
from cmrm.measure.replies import FIELDS, NAMES, NO_ANSWER, Reading, ReplyFile, Source, replies_of

ROWS: list[dict[str, Any]] = [
    {"prompt": "Bake?", "response": "Flour.", "label": "harmful"},
    {"prompt": "Cut?", "response": "A knife.", "label": "benign"},
]


def read(rows: list[dict[str, Any]], **settings: Any) -> ReplyFile:
    return replies_of(Source("mine.csv", rows, "mine"), Reading(**settings))


def message_of(rows: list[dict[str, Any]], **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(rows, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_a_row_is_a_reply() -> None:
    first, second = read(ROWS).replies
    assert (first.request, first.reply, first.kind, first.model) == (
        "Bake?", "Flour.", "harmful", "mine",
    )  # fmt: skip
    assert (first.number, second.number, second.kind) == (1, 2, "benign")
    assert first.missing is None


@pytest.mark.parametrize(
    ("field", "name"), [(field, name) for field in ("request", "reply") for name in NAMES[field]]
)
def test_every_name_in_the_list_is_recognised(field: str, name: str) -> None:
    other = "reply" if field == "request" else "request"
    row: dict[str, Any] = {other: "Other.", "label": "harmful"}
    outer, dot, inner = name.partition(".")
    row[outer] = {inner: "Flour."} if dot else "Flour."
    (reply,) = read([row]).replies
    assert getattr(reply, field) == "Flour."


@pytest.mark.parametrize("name", ["Model Response", "model-response", " MODEL_RESPONSE "])
def test_case_blanks_and_hyphens_of_names_do_not_matter(name: str) -> None:
    file = read([{"Prompt": "Bake?", name: "Flour.", "Label": "Harmful"}])
    assert file.replies[0].reply == "Flour."
    assert file.columns == {"request": "Prompt", "reply": name, "label": "Label"}


def test_a_column_without_values_is_passed_over() -> None:
    file = read([{**row, "reply": None} for row in ROWS])
    assert file.columns["reply"] == "response"


def test_the_first_name_in_the_list_wins() -> None:
    rows = [{"question": "Bake?", "prediction": "Flour.", "answer": "B", "label": "harmful"}]
    assert read(rows).replies[0].reply == "Flour."


def test_columns_that_the_user_names() -> None:
    rows = [{"a": {"b": ["Bake?"]}, "c": "Flour.", "d": "bad", "e": 3, "f": "M", "g": "DE"}]
    columns = {
        "request": "a.b", "reply": "c", "label": "d", "category": "e", "model": "f",
        "language": "g",
    }  # fmt: skip
    file = read(rows, columns=columns, harmful=("BAD",))
    (reply,) = file.replies
    assert (reply.request, reply.kind, reply.category, reply.model, reply.language) == (
        "Bake?", "harmful", "3", "M", "de",
    )  # fmt: skip
    assert file.columns == columns


def test_chats_that_a_spreadsheet_holds_as_text() -> None:
    chat = '[{"role": "user", "content": "Bake?"}, {"role": "assistant", "content": "Flour."}]'
    (reply,) = read([{"messages": chat, "label": "harmful"}]).replies
    assert (reply.request, reply.reply) == ("Bake?", "Flour.")


def test_a_reply_that_looks_like_a_list_beside_plain_ones_stays() -> None:
    rows = [{**ROWS[0], "response": '["Flour."]'}, ROWS[1]]
    assert read(rows).replies[0].reply == '["Flour."]'


@pytest.mark.parametrize("cell", ["", "  \n", None, float("nan"), []])
def test_an_empty_reply_is_missing(cell: Any) -> None:
    file = read([{**ROWS[0], "response": cell}, ROWS[1]])
    assert file.replies[0].missing == "the reply is empty"
    assert "replies without a text to judge: 1, the reply is empty" in file.notes


def test_an_error_message_is_no_reply() -> None:
    text = "Failed to obtain answer via API."
    rows = [{"question": "Bake?", "prediction": text}, {"question": "Cut?", "prediction": "So."}]
    file = read(rows, label="harmful")
    assert [reply.missing for reply in file.replies] == [NO_ANSWER, None]
    for error in (text, "ERROR: rate limit exceeded", "[API error] 500", "Error: no route"):
        assert read([{**ROWS[0], "response": error}]).replies[0].missing == NO_ANSWER
    for reply in ("Errors happen when you knead.", "An error: the oven is cold."):
        assert read([{**ROWS[0], "response": reply}]).replies[0].missing is None


def test_repeated_rows_and_empty_requests_are_counted() -> None:
    rows = [*ROWS, ROWS[0], ROWS[0], {**ROWS[0], "prompt": ""}]
    notes = read(rows).notes
    assert "rows that repeat the request and reply of a model: 2; each counts" in notes
    assert "rows with an empty request: 1; their replies are judged without it" in notes


@pytest.mark.parametrize("word", ["harmful", " Unsafe ", "HARMFUL"])
def test_words_for_harmful(word: str) -> None:
    assert read([{**ROWS[0], "label": word}]).replies[0].kind == "harmful"


@pytest.mark.parametrize("word", ["benign", "safe", "Harmless"])
def test_words_for_benign(word: str) -> None:
    assert read([{**ROWS[0], "label": word}]).replies[0].kind == "benign"


def test_safe_and_unsafe_are_said_to_speak_of_the_request() -> None:
    rows = [{**ROWS[0], "label": "unsafe"}, {**ROWS[1], "label": "safe"}]
    note = "the labels safe and unsafe are taken to speak of the request, not of the reply"
    assert note in read(rows).notes
    assert note not in read(ROWS).notes


def test_a_constant_label_is_for_rows_without_one() -> None:
    rows = [*ROWS, {**ROWS[0], "label": None}, {**ROWS[0], "label": "?"}]
    file = read(rows, label="benign")
    assert [reply.kind for reply in file.replies] == ["harmful", "benign", "benign", "benign"]
    assert any(note.startswith("2 of 4 rows") and "--label" in note for note in file.notes)


def test_a_constant_label_needs_no_note_where_there_is_no_column() -> None:
    rows = [{"prompt": "Bake?", "response": "Flour."}]
    file = read(rows, label="Unsafe")
    assert file.replies[0].kind == "harmful"
    assert file.notes == ()


def test_words_that_the_user_names_leave_others_out() -> None:
    rows = [{**ROWS[0], "label": word} for word in ("1", "0", "2", "")]
    file = read(rows, harmful=("1",), benign=("0",))
    assert [reply.kind for reply in file.replies] == ["harmful", "benign", "other", "other"]
    assert any(note.startswith("2 of 4 rows") and "in no rate" in note for note in file.notes)


def test_words_that_the_user_names_go_before_the_vocabulary() -> None:
    rows = [{**ROWS[0], "label": "safe"}, {**ROWS[0], "label": "unsafe"}]
    file = read(rows, harmful=("safe", "unsafe"))
    assert [reply.kind for reply in file.replies] == ["harmful", "harmful"]


def test_no_labels() -> None:
    message = message_of([{"prompt": "Bake?", "response": "Flour."}])
    assert "--label harmful" in message
    assert "prompt, response" in message


def test_labels_that_nobody_mapped() -> None:
    message = message_of([{**ROWS[0], "label": "7"}, ROWS[1]])
    assert "neither harmful nor benign: 7" in message
    assert "--harmful WORDS" in message


@pytest.mark.parametrize("label", [None, "harmful"])
def test_two_vocabularies(label: str | None) -> None:
    message = message_of([*ROWS, {**ROWS[0], "label": "safe"}], label=label)
    assert "two vocabularies" in message


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "Bake?", "label": "harmful"}], "no column for the reply"),
        ([{"response": "Flour.", "label": "harmful"}], "no column for the request"),
        ([{**ROWS[0], "response": {"x": 1}}], "its response is dict"),
        ([{**ROWS[0], "response": ["a", "b"]}], "such as response.0"),
        ([{**ROWS[0], "response": "\ud800"}], "surrogate"),
    ],
)
def test_rows_that_cannot_be_used(rows: list[dict[str, Any]], words: str) -> None:
    assert words in message_of(rows)


def test_a_category_may_be_a_list() -> None:
    assert read([{**ROWS[0], "category": ["a", "b"]}]).replies[0].category == '["a", "b"]'


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": {"answer": "response"}}, "no field answer"),
        ({"columns": {"reply": "nowhere"}}, "no column 'nowhere' for reply"),
        ({"label": "bad"}, "label is 'bad'"),
        ({"harmful": ("x",), "benign": ("X",)}, "both harmful and benign"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], words: str) -> None:
    assert words in message_of(ROWS, **settings)


def test_fields_and_names_belong_together() -> None:
    assert set(FIELDS) == set(NAMES)


CELLS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "text", "x"]), inner)
    ),
    max_leaves=8,
)


@given(st.lists(st.fixed_dictionaries({"messages": CELLS, "response": CELLS, "label": CELLS})))
@settings(max_examples=300, deadline=None)
def test_any_cells_are_read_or_refused(rows: list[dict[str, Any]]) -> None:
    for label in (None, "harmful"):
        with suppress(InputError):
            file = read(rows, label=label)
            assert len(file.replies) == len(rows)
            assert all(reply.reply.strip() or reply.missing for reply in file.replies)
