"""`cmrm serve` with `fill`: an image request is taken to what its own text has, as under hooks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own (tools/vllm_env.sh)")

from openai import BadRequestError, NotFoundError

from cmrm import Steering
from serving.models import TOKENS, Model, hooks, requests
from serving.test_serve import Server, ask, close, content, health, post, running

FILL = Steering(operator="fill", alpha=1.0)
SETTING = ("--operator", "fill", "--alpha", "1")


@pytest.fixture(scope="module", params=["eager", "compiled"])
def server(
    request: pytest.FixtureRequest, model: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    options = ["--max-num-batched-tokens", "64"]
    if request.param == "eager":
        options.append("--enforce-eager")
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with running(model, log, setting=SETTING, options=options) as made:
        yield made


def said(server: Server, messages: Any, **more: Any) -> list[float]:
    """Log-probabilities of the greedy reply to a conversation."""
    reply = server.client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=TOKENS, logprobs=True,
        extra_body={"ignore_eos": True}, **more,
    )  # fmt: skip
    steps = reply.choices[0].logprobs
    assert steps is not None
    return [step.logprob for step in steps.content or ()]


def test_image_requests_are_filled_and_text_is_not(server: Server, model: Model) -> None:
    batch = requests()
    wanted = [reply["logprobs"] for reply in hooks(model, batch, FILL)]
    plain = [reply["logprobs"] for reply in hooks(model, batch)]
    moved = [not close(a, b) for a, b in zip(wanted, plain, strict=True)]
    assert any(moved)
    assert not any(m for m, request in zip(moved, batch, strict=True) if not request["image"])
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            answers = list(pool.map(lambda request: ask(server, request), batch))
            assert all(close(a, b) for a, b in zip(answers, wanted, strict=True))


def test_conversations(server: Server, model: Model) -> None:
    """The image stands in the first of the turns; the next ones are taken to what they have as
    text too."""
    turns = [
        {"role": "user", "content": "Which colour is it?"},
        {"role": "assistant", "content": "Red, I think."},
        {"role": "user", "content": "How do I open this door without a key?"},
    ]
    moved = []
    for image in ("red", "blue", "green", "white"):
        asked = {"messages": turns, "image": image}
        first = {**turns[0], "content": content({"text": turns[0]["content"], "image": image})}
        wanted = hooks(model, [asked], FILL)[0]["logprobs"]
        moved.append(not close(wanted, hooks(model, [asked])[0]["logprobs"]))
        assert close(said(server, [first, *turns[1:]]), wanted)
    assert any(moved), "fill moves only a request whose coordinates are below those of its text"


def test_a_placeholder_set_by_hand(server: Server, model: Model) -> None:
    request = {"text": "What is it?", "image": "red"}
    parts = content(request)
    parts[1] = {"type": "text", "text": "<image>\nWhat is it?"}
    answer = said(server, [{"role": "user", "content": parts}])
    assert len(answer) == TOKENS, "what stands for the image is no text"


def test_each_reply_says_what_was_done_to_it(server: Server) -> None:
    for request in requests():
        messages: Any = [{"role": "user", "content": content(request)}]
        reply = server.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, n=2, temperature=0.8
        )
        told = getattr(reply, "cmrm", None)
        assert told == {"steered_tokens": 2 if request["image"] else 0, "gate_open": None}
        assert len(reply.choices) == 2
        chunks = server.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, stream=True
        )
        assert len(list(chunks)) >= 2


def test_a_client_has_no_say_in_it(server: Server, model: Model) -> None:
    request = requests()[0]
    wanted = hooks(model, [request], FILL)[0]["logprobs"]
    asked: tuple[dict[str, Any], ...] = (
        {"vllm_xargs": {"cmrm": "off"}}, {"vllm_xargs": {"cmrm": ["target"], "other": 1}},
        {"cache_salt": "mine"}, {"request_id": "the same"},
    )  # fmt: skip
    for more in asked:
        assert close(ask(server, request, **more), wanted)
    chat = {
        "model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}],
        "vllm_xargs": {"cmrm": {"target": [9.0] * 4}},
    }  # fmt: skip
    assert post(server, "/v1/chat/completions", chat, "wrong key") == 401
    assert post(server, "/v1/chat/completions", chat, server.client.api_key) == 400


def test_what_cannot_be_answered_is_an_error_of_its_own(server: Server) -> None:
    parts = content({"text": "x", "image": "red"})
    with pytest.raises(NotFoundError):
        server.client.chat.completions.create(
            model="another", messages=[{"role": "user", "content": parts}]
        )
    for text, image in (("long " * 3000, parts[0]), ("x", {"type": "image_url"})):
        bad: Any = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
        with pytest.raises(BadRequestError):
            server.client.chat.completions.create(model="tiny", messages=bad, max_tokens=2)
    alone: Any = [{"role": "user", "content": parts[:1]}]
    assert len(said(server, alone)) == TOKENS, "a message may be an image alone"
    assert health(server.address)[0] == 200
