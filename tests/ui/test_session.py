"""The playground without a browser: what stands in each column is what the library says."""

from __future__ import annotations

from threading import Event

import pytest
import torch
from PIL import Image

from cmrm import Sample, Steering, generate
from cmrm.engines.generation import generate as generate_with
from cmrm.errors import InputError
from cmrm.model.vlm import VLM
from cmrm.ui.session import COLUMNS, Conversation, Session
from ui.sessions import artifact, session

RED = Image.new("RGB", (20, 16), "red")
SETTING = Steering(alpha=2.0, schedule="per_layer")


def said(play: Session, column: int, conversation: Conversation, query: str) -> str:
    pieces = play.stream(column, conversation, query, SETTING, Event())
    while True:
        try:
            next(pieces)
        except StopIteration as ended:
            return str(ended.value)


def test_every_column_is_what_the_library_says(vlm: VLM) -> None:
    play, query = session(vlm), "How do I open it?"
    conversations = play.start(RED)
    replies = [said(play, k, conversations[k], query) for k in range(4)]
    shift = artifact(vlm)
    ask = [Sample("a", query, RED)]
    wanted = [
        generate(vlm, ask, condition="query", max_new_tokens=12)[0].text,
        generate(vlm, ask, max_new_tokens=12)[0].text,
        generate_with(vlm, ask, shift=shift, steering=SETTING, max_new_tokens=12)[0].text,
        generate_with(vlm, ask, shift=shift, max_new_tokens=12)[0].text,
    ]
    assert replies == wanted
    assert len(set(replies)) > 2
    assert [c.turns for c in conversations] == [[(query, reply)] for reply in replies]


def test_a_second_turn_sees_the_first(vlm: VLM) -> None:
    play = session(vlm)
    conversation = play.start(RED)[1]
    said(play, 1, conversation, "What is it?")
    request = conversation.request("And now?")
    assert [turn.role for turn in request.before] == ["user", "assistant"]
    assert len(request.before[0].images) == 1
    assert not request.images
    assert said(play, 1, conversation, "And now?")
    assert len(conversation.turns) == 2
    assert conversation.request("x").all_images == (conversation.image,)


def test_stop_ends_the_model(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", None)
    play = session(vlm, max_new_tokens=400)
    conversation, cancel = play.start(None)[0], Event()
    pieces = play.stream(0, conversation, "Tell me all.", SETTING, cancel)
    for _ in range(2):
        next(pieces)
    cancel.set()
    count = sum(1 for _ in pieces)
    assert count < 50
    assert len(conversation.turns[0][1]) < 400


def test_an_answer_is_kept_in_all_columns_or_in_none(vlm: VLM) -> None:
    pytest.importorskip("gradio", reason="the playground needs the extra `ui`")
    from cmrm.ui.app import Visit, _answer

    play, seen = session(vlm), Visit()
    values = (1.0, 0, vlm.n_layers - 1, "telescoped", "add", False)
    for turns, query in enumerate(("How do I open it?", "And then?"), 1):
        for _ in _answer(play, seen, RED.copy(), query, values):
            pass
        assert [len(c.turns) for c in seen.conversations] == [turns] * 4
    for step, _ in enumerate(_answer(play, seen, RED.copy(), "Stop here.", values)):
        if step == 1:
            seen.cancel.set()
    assert [len(c.turns) for c in seen.conversations] == [2] * 4
    wrong = (1.0, 2, 1, "telescoped", "add", False)
    said_last = [out[-2] for out in _answer(play, seen, RED.copy(), "x", wrong)][-1]
    assert "the first layer is 2" in said_last
    assert [len(c.turns) for c in seen.conversations] == [2] * 4
    for _ in _answer(play, seen, Image.new("RGB", (20, 16), "blue"), "Another image?", values):
        pass
    assert [len(c.turns) for c in seen.conversations] == [1] * 4, "a new image, a new conversation"


def test_where_the_states_lie(vlm: VLM) -> None:
    play = session(vlm)
    conversations = play.start(RED)
    geometry = play.geometry(conversations, "How do I open it?", SETTING)
    assert list(geometry.distances) == list(COLUMNS[1:])
    assert list(geometry.coordinates) == list(COLUMNS)
    n = vlm.n_layers
    assert all(len(values) == n for values in geometry.distances.values())
    plain = geometry.distances[COLUMNS[1]]
    request = conversations[1].request("How do I open it?")
    image, text = (play.engine.states([r])[0] for r in (request, request.without_images()))
    expected = ((image - text).norm(dim=-1) / text.norm(dim=-1)).tolist()
    assert plain == pytest.approx(expected, rel=1e-3)
    assert geometry.distances[COLUMNS[2]] != plain
    untouched = play.geometry(conversations, "How do I open it?", Steering(alpha=0.0))
    assert untouched.distances[COLUMNS[2]] == pytest.approx(plain, rel=1e-5)
    assert "open" in geometry.gate
    filled, as_text = geometry.coordinates[COLUMNS[3]][-1], geometry.coordinates[COLUMNS[0]][-1]
    assert filled >= as_text - 1e-3, "raised to what the text has, or above it already"
    assert torch.isfinite(torch.tensor(list(geometry.distances.values()))).all()


def test_what_is_refused(vlm: VLM) -> None:
    play = session(vlm)
    conversation = play.start(None)[0]
    for query, message in ((" ", "type a query"), ("x" * 5000, "4000 are the most")):
        with pytest.raises(InputError, match=message):
            said(play, 0, conversation, query)
    assert conversation.turns == []
    with pytest.raises(InputError, match="the first layer is 2"):
        play.setting(1.0, 2, 1, "telescoped", "add", False)
    with pytest.raises(InputError, match="nothing is moved"):
        play.geometry(play.start(None), "x", SETTING)
    with pytest.raises(InputError, match="holds no vectors of the schedule sequential"):
        play.geometry(play.start(RED), "x", play.setting(1, 0, 2, "sequential", "add", False))
    assert play.setting(1.0, 0, vlm.n_layers - 1, "telescoped", "add", False).layers is None
    assert play.setting(0.5, 1, 2, "telescoped", "add", False).layers == (1, 2)


def test_verdicts(vlm: VLM) -> None:
    play = session(vlm)
    refusal = "I'm sorry, but I can't help with that request."
    assert play.verdict("How do I steal it?", refusal).startswith("refused")
    assert play.verdict("x", "").startswith("unscored")
