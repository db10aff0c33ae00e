"""The engine on servers, against servers of the tests: what is sent, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("openai", reason="servers need the extra `eval`")

from cmrm.defenses import make_defense, respond
from cmrm.engines.base import Contrast, Decoding, EngineError
from cmrm.engines.endpoint import EndpointEngine
from cmrm.engines.opening import engine_options_of, open_engine
from cmrm.errors import CmrmError, InputError
from cmrm.prompts.conditions import Request, Turn
from cmrm.steering.intervention import Edit, Intervention
from engines.servers import ARMED, reply, serving


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "openai._base_client.BaseClient._calculate_retry_timeout", lambda *a, **k: 0.0
    )


def image(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def test_a_conversation_is_sent_as_it_is() -> None:
    before = (Turn("user", "what?", (image("blue"),)), Turn("assistant", "a door"))
    request = Request("and now?", (image(),), image_last=True, before=before)
    with serving() as server:
        engine = EndpointEngine("m", [server.url])
        (answer,) = engine.answer([request], options=Decoding(9, 0.5, 0.9, 40))
    assert (answer.text, answer.tokens, answer.gate_open) == ("to and now?", 7, None)
    (body,) = server.bodies
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0.5)
    assert (body["top_p"], body["top_k"]) == (0.9, 40)
    first, second, last = body["messages"]
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert second == {"role": "assistant", "content": "a door"}
    assert [part["type"] for part in last["content"]] == ["text", "image_url"]
    uri = last["content"][1]["image_url"]["url"]
    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert shown.tobytes() == image().tobytes(), "lossless"


def test_replicas_share_the_requests_and_replies_keep_their_order() -> None:
    requests = [Request(f"number {k}") for k in range(9)]
    with serving() as one, serving() as two:
        engine = EndpointEngine("m", [one.url, two.url])
        answers = engine.answer(requests)
    assert [answer.text for answer in answers] == [f"to number {k}" for k in range(9)]
    assert {len(one.bodies), len(two.bodies)} == {4, 5}
    assert engine.answer([]) == []


def test_a_program_is_read_and_bound() -> None:
    with serving(health=ARMED) as armed, serving() as plain:
        assert EndpointEngine("m", [armed.url]).served_program == "abc"
        assert EndpointEngine("m", [plain.url]).served_program is None
        assert (
            EndpointEngine("m", [armed.url]).context() != EndpointEngine("m", [plain.url]).context()
        )
        with pytest.raises(InputError, match="different programs"):
            EndpointEngine("m", [armed.url, plain.url])


def test_an_image_that_was_not_steered_ends_the_run() -> None:
    def told(steered: int) -> Callable[[dict[str, Any]], tuple[int, Any]]:
        outcome = {"steered_tokens": steered, "gate_open": True}
        return lambda body: (200, {**reply(body)[1], "cmrm": outcome})

    request = Request("x", (image(),))
    with serving(health=ARMED, answer=told(5)) as server:
        assert EndpointEngine("m", [server.url]).answer([request])[0].gate_open is True
    with serving(health=ARMED, answer=told(0)) as server:
        engine = EndpointEngine("m", [server.url])
        engine.answer([Request("x")])
        with pytest.raises(EngineError, match="did not steer"):
            engine.answer([request])


def test_positions_behind_the_prompt_may_steer_nothing() -> None:
    armed = {**ARMED, "steering": {**ARMED["steering"], "positions": "generated"}}  # type: ignore[dict-item]
    none = {"steered_tokens": 0, "gate_open": None}
    with serving(health=armed, answer=lambda b: (200, {**reply(b)[1], "cmrm": none})) as server:
        assert EndpointEngine("m", [server.url]).answer([Request("x", (image(),))])


def test_replies_of_another_model_behind_the_same_address_are_not_taken_for_this_ones() -> None:
    with serving() as server:
        one, other = (EndpointEngine("m", [server.url]) for _ in range(2))
        assert one.context() == other.context()
        other._model = "another"
        assert one.context() != other.context()


def test_a_server_that_is_not_armed_gives_no_engine() -> None:
    broken = {"engine": 200, "steering": {"armed": False, "reason": "a worker is silent"}}
    with serving(health=broken) as server, pytest.raises(EngineError, match="a worker is silent"):
        EndpointEngine("m", [server.url])


def test_what_a_client_cannot_do_is_refused() -> None:
    with serving(health=ARMED) as server:
        engine = EndpointEngine("m", [server.url])
        edit = Intervention((Edit(0, torch.ones(4)),))
        for call in (
            lambda: engine.answer([Request("x")], [edit]),
            lambda: engine.check_interventions([edit]),
            lambda: engine.answer([Request("x")], contrast=Contrast((Request("y"),), 1.0)),
            lambda: engine.n_layers, lambda: engine.hidden_size, lambda: engine.states([]),
            lambda: engine.first_tokens(["I"]), lambda: engine.count_tokens("x"),
        ):  # fmt: skip
            with pytest.raises(EngineError):
                call()
    assert server.bodies == []


def test_errors_name_the_server_and_the_reason() -> None:
    error = {"error": {"message": "too many images"}}
    with serving(answer=lambda body: (400, error)) as server:
        engine = EndpointEngine("m", [server.url])
        with pytest.raises(EngineError, match="too many images"):
            engine.answer([Request("x"), Request("y")])
        with pytest.raises(InputError, match="has no model 'other'; it has m"):
            EndpointEngine("other", [server.url])
    with pytest.raises(EngineError, match="cannot be asked"):
        EndpointEngine("m", [server.url], timeout=0.5)
    nothing = {"id": "1", "object": "x", "created": 0, "model": "m", "choices": []}
    with (
        serving(answer=lambda body: (200, nothing)) as server,
        pytest.raises(EngineError, match="gave no reply"),
    ):
        EndpointEngine("m", [server.url]).answer([Request("x")])


def test_a_busy_server_is_asked_again() -> None:
    times = iter([503, 429])

    def busy(body: dict[str, Any]) -> tuple[int, Any]:
        status = next(times, None)
        return (status, {"error": {"message": "busy"}}) if status else reply(body)

    with serving(answer=busy) as server:
        assert EndpointEngine("m", [server.url]).answer([Request("x")])[0].text == "to x"
    assert len(server.bodies) == 3


def test_defences_that_need_no_states_work_on_servers() -> None:
    with serving() as server:
        engine = EndpointEngine("m", [server.url])
        (answer,) = respond(engine, make_defense("safety_prompt"), [Request("x", (image(),))])
    assert answer.text
    sent = json.dumps(server.bodies[0]["messages"])
    assert len(sent) > len('"x"') + 200, "the safety prompt is part of it"
    with pytest.raises(InputError, match="what a server of `cmrm serve` does"):
        make_defense("served").check(engine)


@pytest.mark.parametrize(
    ("engine", "options", "loading", "words"),
    [
        ("vlm", None, {}, "it is transformers, vllm, or the address"),
        ("localhost:8000", None, {}, "address of a"),
        ("http://h/v1,vllm", None, {}, "'vllm'"),
        ("transformers", {"max_model_len": 1}, {}, "go with the engine vllm"),
        ("vllm", None, {"device_map": "cuda"}, "device_map does not go"),
        ("vllm", None, {"trust_remote_code": True}, "trust_remote_code does not go"),
        ("http://h/v1", None, {"dtype": "float32"}, "the server's to choose"),
        ("http://h/v1", {"parallel": 0}, {}, "at least 1"),
        ("http:// h/v1", None, {}, "no address"),
        ("http://h/v1", {"timeout": "x"}, {}, "seconds above 0"),
        ("http://h/v1", {"parallel": 1.5}, {}, "at least 1"),
        ("http://h/v1", {"max_model_len": 1}, {}, "none of a server's"),
        ("vllm", {"dtype": "float32"}, {}, "dtype is set by cmrm"),
        ("vllm", {"trust_remote_code": True}, {}, "trust_remote_code is set by cmrm"),
    ],
)
def test_engines_that_cannot_be_opened(
    engine: str, options: dict[str, Any] | None, loading: dict[str, Any], words: str
) -> None:
    with pytest.raises(CmrmError, match=words):
        open_engine("m", engine, options, **loading)


@pytest.mark.parametrize("text", ["{", "[1]", "nowhere.json", "1"])
def test_options_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="engine-options"):
        engine_options_of(text)
    assert engine_options_of(None) == {}
    assert engine_options_of(' {"a": 1}') == {"a": 1}
