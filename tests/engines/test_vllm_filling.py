"""What a served image request has as text, on stand-ins for vLLM's chat serving."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmrm.engines.serving.messages import has_images, in_lists, without_images
from cmrm.engines.vllm.filling import record_texts
from cmrm.engines.vllm.patches import salt_requests
from cmrm.errors import ModelError

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "What is it?"}


@dataclass
class Asked:
    """In the place of a chat request."""

    messages: Any
    vllm_xargs: dict[str, Any] | None = None
    n: int | None = 3

    def model_copy(self, update: dict[str, Any]) -> Asked:
        return replace(self, **update)


@dataclass
class Engine:
    """In the place of vLLM's client of its engine; `ends`: how a request does, or None."""

    replicas: int = 1
    ends: str | None = "length"
    run: list[tuple[Any, Any, str]] = field(default_factory=list)

    @property
    def vllm_config(self) -> Any:
        return SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=self.replicas))

    async def generate(self, prompt: Any, parameters: Any, name: str) -> AsyncIterator[Any]:
        self.run.append((prompt, parameters, name))
        yield SimpleNamespace(finished=False)
        if self.ends is not None:
            outputs = [SimpleNamespace(finish_reason=self.ends)]
            yield SimpleNamespace(finished=True, outputs=outputs)


class Serving:
    """In the place of `OpenAIServingChat`."""

    model_config = None

    def __init__(self, engine: Engine, error: Any = None) -> None:
        self.engine_client, self.error = engine, error
        self.answered: list[Asked] = []

    def create_error_response(self, message: str) -> str:
        return message

    async def render_chat_request(self, request: Asked) -> Any:
        return self.error or ([], [request.messages])

    async def create_chat_completion(self, request: Asked, raw: Any = None) -> str:
        assert raw == "raw"
        self.answered.append(request)
        return "an answer"


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module, loader = ModuleType("vllm"), ModuleType("vllm.model_executor.model_loader")
    vars(module)["SamplingParams"] = lambda **values: values
    model = SimpleNamespace(get_placeholder_str=lambda modality, place: "<image>")
    vars(loader)["get_model_cls"] = lambda config: model
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.model_loader", loader)


def answered(serving: Serving, request: Asked) -> str:
    class Patched(Serving):
        pass

    record_texts(Patched)
    serving.__class__ = Patched
    return asyncio.run(serving.create_chat_completion(request, "raw"))


def test_an_image_request_names_what_its_text_has_recorded() -> None:
    engine = Engine()
    serving = Serving(engine)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": iter([IMAGE, {"type": "text", "text": "<image>\nWhat?"}])},
    ]
    assert answered(serving, Asked(messages, {"cmrm": "mine", "other": 1})) == "an answer"
    ((prompt, parameters, name),) = engine.run
    assert prompt == [
        messages[0],
        {"role": "user", "content": [{"type": "text", "text": "What?"}]},
    ]
    assert parameters["max_tokens"] == 1
    assert parameters["extra_args"] == {"cmrm": {"record": name}}
    (request,) = serving.answered
    assert request.messages[1]["content"][0] is IMAGE
    assert len(request.messages[1]["content"]) == 2, "an iterator of parts is read once"
    assert request.vllm_xargs == {"cmrm": {"target": name, "uses": 3}, "other": 1}


def test_a_text_request_runs_once_and_names_nothing() -> None:
    engine = Engine()
    for content in ("x", [TEXT], iter([TEXT, "and"]), None, []):
        serving = Serving(engine)
        messages = [{"role": "user", "content": content}]
        assert answered(serving, Asked(messages, {"cmrm": {"target": "x"}})) == "an answer"
        assert serving.answered[0].vllm_xargs is None
    assert engine.run == []


def test_two_requests_have_two_records() -> None:
    engine = Engine()
    for _ in range(2):
        answered(Serving(engine), Asked([{"role": "user", "content": [IMAGE, TEXT]}]))
    assert engine.run[0][2] != engine.run[1][2]


@pytest.mark.parametrize(
    ("engine", "error", "message"),
    [
        (Engine(), "too long", "too long"),
        (Engine(ends=None), None, "no answer is given"),
        (Engine(ends="abort"), None, "no answer is given"),
        (Engine(replicas=2), None, "data parallelism"),
    ],
)
def test_without_its_text_there_is_no_answer(engine: Engine, error: Any, message: str) -> None:
    serving = Serving(engine, error)
    reply = answered(serving, Asked([{"role": "user", "content": [IMAGE, TEXT]}]))
    assert message in reply
    assert serving.answered == []


PARTS = st.lists(
    st.one_of(
        st.just(TEXT), st.just("a string"), st.just(IMAGE),
        st.just({"image_url": "data:..."}), st.just({"type": "input_image", "image_url": "x"}),
        st.just({"type": "image_pil", "image_pil": None, "uuid": "cached"}),
        st.just({"type": "text", "text": "x", "uuid": "cached", "image_url": "x"}),
        st.just({"type": "refusal", "refusal": "no"}), st.just({"type": 3}),
        st.just({"type": {"a": 1}}), st.just(None),
    ),
    max_size=4,
)  # fmt: skip


@given(st.lists(st.one_of(PARTS, st.text(), st.none()), max_size=4))
def test_nothing_but_text_is_left_and_all_of_it(contents: list[Any]) -> None:
    messages = in_lists([{"role": "user", "content": content} for content in contents])
    alone = without_images(messages)
    assert not has_images(alone)
    assert has_images(messages) == (alone != messages)
    kinds = ("text", "refusal")
    for message, kept in zip(messages, alone, strict=True):
        if isinstance(message["content"], list):
            assert kept["content"] == [
                part for part in message["content"]
                if isinstance(part, str)
                or (isinstance(part, dict) and part.get("type") in kinds and "uuid" not in part)
            ]  # fmt: skip
        else:
            assert kept is message


def test_messages_of_another_form_stay() -> None:
    message = SimpleNamespace(content="x")
    assert without_images(in_lists([message])) == [message]


def test_an_image_request_without_a_record_fails_alone() -> None:
    class Request:
        @classmethod
        def from_engine_core_request(cls, made: Any) -> str:
            return "a request"

    salt_requests(Request, None, fills=True)
    image, text = [SimpleNamespace(modality="image")], None

    def made(features: Any, extra: Any) -> Any:
        return SimpleNamespace(
            mm_features=features, prompt_embeds=None, request_id="r",
            sampling_params=SimpleNamespace(extra_args=extra),
        )  # fmt: skip

    for extra in (None, {}, {"cmrm": "off"}, {"cmrm": {"record": "x"}}):
        with pytest.raises(ModelError, match="no coordinates"):
            Request.from_engine_core_request(made(image, extra))
        assert Request.from_engine_core_request(made(text, extra)) == "a request"
    right = made(image, {"cmrm": {"target": "x"}})
    assert Request.from_engine_core_request(right) == "a request"
