"""Sets as Inspect tasks."""

from __future__ import annotations

import pytest

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentAudio,
    ContentImage,
    ContentText,
    GenerateConfig,
)

from cmrm import Sample
from cmrm.engines.base import Decoding
from cmrm.errors import InputError
from cmrm.evaluate.conversation import decoding_of, request_of
from cmrm.evaluate.provider import PLACE
from cmrm.evaluate.tasks import content_of, set_task
from cmrm.measure.loop import asks_of, batch_id, ordered
from cmrm.prompts.conditions import Condition, Request
from cmrm.prompts.images import data_uri
from evaluate.plans import picture, small_set


def test_requests_stand_in_the_batches_of_the_loop() -> None:
    loaded = small_set()
    task = set_task(loaded, "original", ["keyword"], batch_size=4)
    asks = asks_of(ordered(loaded.samples), Condition.ORIGINAL, seed=0)
    assert [row.id for row in task.dataset] == [ask.key for ask in asks]
    for k, row in enumerate(task.dataset):
        assert not isinstance(row.input, str)
        (message,) = row.input
        start = k - k % 4
        assert (message.metadata or {})[PLACE] == {
            "batch": batch_id(asks[start : start + 4]),
            "size": min(4, 9 - start),
            "index": k % 4,
            "key": asks[k].key,
        }
        assert request_of([message]) == asks[k].request, "text and pixels are the loop's"


def test_a_task_names_what_a_sample_is_for() -> None:
    task = set_task(small_set(), "query", ["keyword"])
    kinds = {str(row.id)[0]: (row.metadata or {})["kind"] for row in task.dataset}
    assert kinds == {"h": "harmful", "b": "benign", "u": "utility"}


def test_content_keeps_the_order_of_image_and_text() -> None:
    image = picture("red")
    for last in (False, True):
        request = Request("What is it?", (image,), last)
        assert request_of([ChatMessageUser(content=content_of(request))]) == request


def test_conversations_become_requests() -> None:
    uri = data_uri(picture("red"))
    request = request_of([
        ChatMessageSystem(content="Be brief."),
        ChatMessageUser(content=[ContentImage(image=uri), ContentText(text="What is it?")]),
        ChatMessageAssistant(content="A wall."),
        ChatMessageUser(content=[ContentText(text="And this?"), ContentImage(image=uri)]),
    ])  # fmt: skip
    assert [turn.role for turn in request.before] == ["system", "user", "assistant"]
    assert request.before[1].images[0].getpixel((0, 0)) == (255, 0, 0)
    assert request.image_last
    assert len(request.all_images) == 2


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "end with a user's turn"),
        (
            [ChatMessageUser(content="a"), ChatMessageAssistant(content="b")],
            "end with a user's turn",
        ),
        ([ChatMessageTool(content="a"), ChatMessageUser(content="b")], "no tool turns"),
        ([ChatMessageUser(content=[ContentAudio(audio="data:x", format="wav")])], "no audio"),
        (
            [ChatMessageUser(content=[ContentImage(image="https://example.org/a.png")])],
            "would have to be fetched",
        ),
        (
            [ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])],
            "cannot be read",
        ),
        (
            [ChatMessageUser(content=[ContentImage(image="/nowhere/a.png")])],
            "there is no image at /nowhere/a.png",
        ),
    ],
)
def test_bad_conversations(messages: list[ChatMessageUser], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        request_of(messages)


def test_settings_of_inspect_become_a_decoding() -> None:
    greedy = decoding_of(GenerateConfig(temperature=0.0, top_p=0.5, seed=1), max_tokens=9)
    assert greedy == Decoding(9)
    config = GenerateConfig(temperature=0.7, top_p=0.9, top_k=4, max_tokens=5)
    assert decoding_of(config, max_tokens=9) == Decoding(5, 0.7, 0.9, 4)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"stop_seqs": ["x"]}, "stop_seqs"),
        ({"num_choices": 2}, "num_choices"),
        ({"temperature": 0.5, "seed": 1}, "seed"),
    ],
)
def test_settings_that_cannot_be_honoured(settings: dict[str, object], name: str) -> None:
    with pytest.raises(InputError, match=f"do not take {name}"):
        decoding_of(GenerateConfig(**settings), max_tokens=9)  # type: ignore[arg-type]


def test_a_sample_that_cannot_be_put_under_a_condition() -> None:
    from cmrm.prompts import Loaded

    with pytest.raises(InputError, match="has no caption"):
        set_task(Loaded("x", (Sample("s", "How?", label="harmful"),)), "caption", ["keyword"])
