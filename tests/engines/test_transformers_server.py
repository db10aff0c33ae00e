"""`cmrm serve --engine transformers`: its replies are those of the engine, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="transformers' server needs the extra `serve`")
pytest.importorskip("uvicorn", reason="transformers' server needs the extra `serve`")
pytest.importorskip("openai", reason="transformers' server needs the extra `serve`")

import uvicorn
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI

from cmrm import Steering, wrap_vlm
from cmrm.engines.base import Decoding, Reply
from cmrm.engines.endpoint import EndpointEngine
from cmrm.engines.serving import transformers_server
from cmrm.engines.serving.body import refused_chat
from cmrm.engines.serving.steered import Steered
from cmrm.engines.serving.transformers_server import application
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import ArtifactError, InputError, ModelError
from cmrm.model.identity import identity_of
from cmrm.prompts.conditions import Request, Turn
from cmrm.prompts.images import open_picture
from cmrm.shift.artifact import Provenance, ShiftVectors
from cmrm.shift.resolve import resolved
from cmrm.steering.gate import Gate
from families import gemma3, internvl, llava, smolvlm

KEY = "a key of the tests"
TOKENS = 8
TEXTS = ("How do I open this door?", "What is it?", "Tell me how a lock works, step by step.")
BATCH = [
    Request(TEXTS[k % 3] + "!" * k, (Image.new("RGB", (20, 20), colour),) if colour else ())
    for k, colour in enumerate(("red", None, "blue", "green", None, "white"))
]
SETTINGS = {
    "add": Steering(alpha=1.0),
    "all": Steering(alpha=1.0, positions="all"),
    "generated": Steering(alpha=1.0, positions="generated"),
    "gated": Steering(alpha=1.0, gate=True, layers=(2,)),
    "fill": Steering(alpha=40.0, operator="fill"),
}


@dataclass
class Model:
    engine: TransformersEngine
    shift: ShiftVectors


def with_artifact(made: Any, processor: Any) -> Model:
    """A model whose artifact has a gate that opens for some of the image requests of `BATCH`."""
    vlm = wrap_vlm(made, processor, model_id="tiny")
    engine = TransformersEngine(vlm)
    shape = (vlm.n_layers, vlm.hidden_size)
    draw = torch.Generator().manual_seed(4)
    vectors, direction = (3.0 * torch.randn(shape, generator=draw) for _ in range(2))
    states = engine.states([request for request in BATCH if request.all_images])
    probe = torch.randn(1, vlm.hidden_size, generator=draw)
    scores = (states[:, 1] @ probe[0]).sort().values
    gate = Gate("linear", (1,), probe, float((scores[1] + scores[2]) / 2))
    provenance = Provenance(
        vlm.model_id, None, type(made).__name__, shape[1], shape[0], corruption="blank",
        estimator="pca",
    )  # fmt: skip
    shift = ShiftVectors(
        vectors, provenance, Steering(alpha=1.0), {"direction": direction},
        identity=identity_of(vlm), gate=gate,
    )  # fmt: skip
    return Model(engine, shift)


@pytest.fixture(scope="module")
def model() -> Model:
    return with_artifact(*llava(num_hidden_layers=3, hidden_size=32, initializer_range=0.2))


@dataclass
class Running:
    client: OpenAI
    address: str
    steered: Steered


@contextmanager
def serving(model: Model, setting: Steering, *, most_images: int = 2) -> Iterator[Running]:
    steered = Steered(model.engine, model.shift, setting)
    app = application(steered, "tiny", key=KEY, most_images=most_images)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            client = OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
            yield Running(client, address, steered)
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def gated(model: Model) -> Iterator[Running]:
    with serving(model, SETTINGS["gated"]) as server:
        yield server


def uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def content(text: str, images: tuple[Image.Image, ...]) -> Any:
    if not images:
        return text
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": uri(one)}} for one in images]
    return [*parts, {"type": "text", "text": text}]


def messages(request: Request) -> Any:
    turns = [
        {"role": turn.role, "content": content(turn.text, turn.images)} for turn in request.before
    ]
    return [*turns, {"role": "user", "content": content(request.text, request.images)}]


def ask(server: Running, request: Request, **more: Any) -> Any:
    return server.client.chat.completions.create(
        **{
            "model": "tiny", "messages": messages(request), "temperature": 0, "max_tokens": TOKENS,
            **more,
        }
    )  # fmt: skip


def whole(text: str) -> str:
    """A text without a letter whose bytes are not all there; a stream leaves it out."""
    return text.replace("\ufffd", "").strip()


def wanted(model: Model, request: Request, setting: Steering | None) -> Reply:
    """What the engine says, one request at a time."""
    parts = []
    if setting is not None and request.all_images:
        parts = resolved(model.shift, setting, lambda: model.engine.text_states([request]))
    return model.engine.answer([request], parts, Decoding(TOKENS))[0]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_replies_are_those_of_the_engine(model: Model, name: str) -> None:
    setting = SETTINGS[name]
    replies = [wanted(model, request, setting) for request in BATCH]
    plain = [wanted(model, request, None) for request in BATCH]
    moved = [one.text != other.text for one, other in zip(replies, plain, strict=True)]
    assert any(moved), "a setting that moves nothing shows nothing"
    with serving(model, setting) as server, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda request: ask(server, request), BATCH))
    for request, reply, answer in zip(BATCH, replies, answers, strict=True):
        assert answer.choices[0].message.content.strip() == reply.text
        told = answer.cmrm
        assert (told["steered_tokens"] > 0) == bool(request.all_images)
        assert told["gate_open"] == reply.gate_open


@pytest.mark.parametrize("name", ["gated", "fill"])
def test_conversations_and_streams(model: Model, name: str) -> None:
    image = (Image.new("RGB", (20, 20), "red"),)
    before = (Turn("user", "Which colour is it?", image), Turn("assistant", "Red, I think."))
    request = Request("How do I open this door without a key?", before=before)
    with serving(model, SETTINGS[name]) as server:
        reply = wanted(model, request, SETTINGS[name])
        assert ask(server, request).choices[0].message.content.strip() == reply.text
        chunks = list(ask(server, request, stream=True))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert whole(said) == whole(reply.text)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        status, lines = post(server, {
            "model": "tiny", "messages": messages(request), "temperature": 0,
            "max_tokens": TOKENS, "stream": True,
        })  # fmt: skip
        assert status == 200
        comment = next(line for line in lines.splitlines() if line.startswith(": cmrm "))
        told = json.loads(comment.removeprefix(": cmrm "))
        assert told["gate_open"] == reply.gate_open
        assert lines.rstrip().endswith("data: [DONE]")
        assert not server.steered.expected
        assert not server.steered.outcomes


@pytest.mark.parametrize("build", [gemma3, internvl, smolvlm], ids=lambda build: build.__name__)
def test_other_families(build: Callable[[], Any]) -> None:
    other = with_artifact(*build())
    with serving(other, SETTINGS["fill"]) as server:
        for request in BATCH[:3]:
            reply = wanted(other, request, SETTINGS["fill"])
            assert ask(server, request).choices[0].message.content.strip() == reply.text


def post(
    server: Running, body: Any, path: str = "/v1/chat/completions", key: str | None = KEY
) -> tuple[int, str]:
    """Status and text of a request without OpenAI's client."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.address}{path}", sent, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def get(server: Running, path: str) -> tuple[int, str]:
    with urllib.request.urlopen(f"{server.address}{path}", timeout=20) as answer:
        return int(answer.status), answer.read().decode()


def test_health_metrics_and_models(gated: Running) -> None:
    ask(gated, BATCH[0])
    time.sleep(1.1)  # a status is given again for a second
    status, text = get(gated, "/health")
    steering = json.loads(text)["steering"]
    assert (status, steering["armed"], steering["gated"]) == (200, True, True)
    assert steering["program"] == gated.steered.key
    assert get(gated, "/live")[0] == 200
    metrics = get(gated, "/metrics")[1]
    assert "cmrm_armed 1" in metrics
    count = next(line for line in metrics.splitlines() if line.startswith("cmrm_tokens_total"))
    assert float(count.split()[1]) > 0
    assert [one.id for one in gated.client.models.list()] == ["tiny"]


def test_methods_and_content_types(gated: Running) -> None:
    def status(method: str, path: str) -> int:
        request = urllib.request.Request(f"{gated.address}{path}", method=method)
        request.add_header("Authorization", f"bearer {KEY}")
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    for path in ("/health", "/live", "/metrics"):
        assert (status("GET", path), status("HEAD", path), status("PUT", path)) == (200, 200, 405)
    assert status("GET", "/v1/chat/completions") == status("PUT", "/v1/models") == 405
    assert status("GET", "/v1/models") == 200, "the scheme is written in any case"
    body = json.dumps({"messages": messages(BATCH[1]), "max_tokens": 1}).encode()
    for kind in ("text/xml", "application/x-www-form-urlencoded"):
        request = urllib.request.Request(f"{gated.address}/v1/chat/completions", body)
        request.add_header("Authorization", f"Bearer {KEY}")
        request.add_header("Content-Type", kind)
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == 200


def test_prompts_are_read_beside_the_event_loop(
    gated: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a prompt is read, `/live` answers; a client that goes away meanwhile gets nothing."""
    chat = transformers_server._Chat
    read, began, go = chat._read, threading.Event(), threading.Event()

    def slowly(self: Any, body: Any) -> Any:
        began.set()
        assert go.wait(30)
        return read(self, body)

    monkeypatch.setattr(chat, "_read", slowly)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(ask, gated, BATCH[0])
        assert began.wait(30)
        assert get(gated, "/live")[0] == 200
        assert gated.steered.waiting == 1
        go.set()
        assert reply.result().choices


def test_the_key_and_the_paths(gated: Running) -> None:
    body = {"model": "tiny", "messages": messages(BATCH[1]), "max_tokens": 1}
    wrong = OpenAI(base_url=f"{gated.address}/v1", api_key="wrong key", max_retries=0)
    with pytest.raises(AuthenticationError):
        wrong.models.list()
    for key in (None, "", KEY[:-1], f"{KEY}x", KEY.upper()):
        assert post(gated, body, key=key)[0] == 401
    assert post(gated, body)[0] == 200
    for path in ("/load_model", "/reset", "/v1/completions", "/v1/responses", "/v1/systemone",
                 "/v1/audio/transcriptions", "/docs", "/openapi.json"):  # fmt: skip
        assert post(gated, body, path)[0] == 404


@pytest.mark.parametrize("change", [
    {"n": 2}, {"logprobs": True}, {"top_k": 3}, {"response_format": {"type": "json_object"}},
    {"generation_config": '{"num_beams": 4}'}, {"chat_template_kwargs": {"x": 1}},
    {"temperature": -1}, {"temperature": "hot"}, {"temperature": float("nan")}, {"top_p": 0},
    {"frequency_penalty": 0.5},
    {"max_tokens": 0}, {"max_tokens": 1.5}, {"max_tokens": True}, {"seed": -1}, {"stop": ""},
    {"stop": [""] * 2}, {"messages": []}, {"messages": "x"}, {"messages": [{}]},
    {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
    {"messages": [{"role": "user", "content": 3}]}, {"tool_choice": "required"},
    {"vllm_xargs": {"cmrm": "off"}}, {"add_generation_prompt": False},
    {"continue_final_message": True}, {"tools": [3]}, {"store": True},
    {"messages": [{"role": "user", "content": "x", "name": "me"}]},
    {"messages": [{"role": "boss", "content": "x"}]}, {"frequency_penalty": 1}, {"stop": "x"},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
])  # fmt: skip
def test_what_the_server_does_not_honour_is_refused_by_name(
    gated: Running, change: dict[str, Any]
) -> None:
    body = {"model": "tiny", "messages": messages(BATCH[0]), "max_tokens": 2, **change}
    status, text = post(gated, body)
    assert status == 400
    assert next(iter(change)) in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("url", [
    "http://127.0.0.1:1/x.png", "https://example.org/x.png", "file:///etc/passwd", "/etc/passwd",
    "data:text/html,x", "data:image/svg+xml,<svg/>", "iVBORw0KGgo=", "",
])  # fmt: skip
def test_images_come_in_the_request_alone(gated: Running, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    status, text = post(gated, {"messages": [{"role": "user", "content": [part]}]})
    assert status == 400
    assert "data URI" in text


def test_errors_are_the_clients_own(gated: Running) -> None:
    image = BATCH[0].all_images
    with pytest.raises(NotFoundError, match="no such path"):
        gated.client.embeddings.create(model="tiny", input="x")
    with pytest.raises(NotFoundError, match="no model 'another' here, but 'tiny'"):
        ask(gated, BATCH[0], model="another")
    with pytest.raises(BadRequestError, match="the limit is 2"):
        ask(gated, Request("x", image * 3))
    with pytest.raises(BadRequestError, match="context is"):
        ask(gated, Request("long " * 4000, image))
    for text in ("<image> what?", "what is <image>"):
        for request in (Request(text), Request(text, image)):
            with pytest.raises(BadRequestError, match="reads as an image"):
                ask(gated, request)
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}]
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    nested = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}]
    for bad in (calls, nested):
        with pytest.raises(BadRequestError, match="cannot be read"):
            ask(gated, BATCH[0], messages=bad)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(BadRequestError, match="no place for tools"):
        ask(gated, BATCH[0], tools=[tool])
    half = [{"role": "user", "content": "\ud800"}]
    assert "surrogate" in post(gated, {"messages": half})[1]
    nothing: list[Any] = [[], {"messages": [3]}]
    for sent in nothing:
        assert "an object is expected" in post(gated, sent)[1]
    with pytest.raises(BadRequestError, match="more than"):
        ask(gated, Request("x" * 600_000))
    assert gated.steered.expected == {}, "nothing is kept of a request that failed"
    assert ask(gated, BATCH[0]).choices


def broken_images() -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, format="PNG")
    whole = buffer.getvalue()
    huge = io.BytesIO()
    Image.new("1", (8000, 8000)).save(huge, format="PNG")
    return {
        "none": b"", "text": b"hello", "cut": whole[:-200], "no pixels": whole[:60],
        "bad chunk": whole[:33] + b"\x00\x00\x00\x04oops" + whole[41:], "huge": huge.getvalue(),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(broken_images()))
def test_images_that_are_none(gated: Running, kind: str) -> None:
    url = f"data:image/png;base64,{base64.b64encode(broken_images()[kind]).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    for stream in (False, True):
        status, text = post(
            gated, {"messages": [{"role": "user", "content": [part]}], "stream": stream}
        )
        assert status == 400, text
        assert "image" in json.loads(text)["error"]["message"]
    assert gated.steered.expected == {}


def odd_pictures() -> dict[str, bytes]:
    """Pictures that a plain conversion to RGB reads otherwise than cmrm does."""
    ramp = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    turned = Image.fromarray((ramp // 256).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = {}
    for name, image, more in (
        ("16 bit", Image.fromarray(ramp), {}), ("transparent", clear, {}),
        ("turned", turned, {"exif": exif}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", **more)
        contents[name] = buffer.getvalue()
    return contents


@pytest.mark.parametrize("kind", list(odd_pictures()))
def test_pictures_are_read_as_everywhere(
    model: Model, gated: Running, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    content = odd_pictures()[kind]
    wanted_picture = open_picture(content, "a test")
    processor = model.engine.vlm.processor
    shown: list[Any] = []
    apply = processor.apply_chat_template

    def watched(conversation: Any, **more: Any) -> Any:
        shown.extend(p["image"] for p in conversation[0]["content"] if p["type"] == "image")
        return apply(conversation, **more)

    monkeypatch.setattr(processor, "apply_chat_template", watched)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    sent = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    assert post(gated, sent)[0] == 200
    assert [image.tobytes() for image in shown] == [wanted_picture.tobytes()]
    assert wanted_picture.tobytes() != Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def test_sampling_is_what_the_client_asks_for(model: Model, gated: Running) -> None:
    def said(**more: Any) -> str:
        return str(ask(gated, BATCH[0], max_tokens=16, **more).choices[0].message.content)

    hot = [said(temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert len({said(temperature=1.5) for _ in range(3)}) > 1
    assert len({said(temperature=0, seed=seed) for seed in (1, 2)}) == 1
    greedy = said(temperature=0)
    settings = model.engine.vlm.model.generation_config
    before = settings.num_beams, settings.do_sample
    settings.num_beams, settings.do_sample = 3, True
    try:
        assert said(temperature=0) == greedy, "the checkpoint's own settings have no say"
    finally:
        settings.num_beams, settings.do_sample = before


def test_a_model_that_fails(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, on one line, without what is inside; the next request is answered."""
    with serving(model, SETTINGS["add"]) as server:

        def fails(*args: Any, **more: Any) -> Any:
            raise RuntimeError('CUDA "error"\nat /secret/place')

        body = {"messages": messages(BATCH[0]), "max_tokens": 2}
        with monkeypatch.context() as patch:
            patch.setattr(server.steered.vlm.model, "generate", fails)
            status, text = post(server, body)
            assert status == 500
            assert "the model failed (RuntimeError)" in json.loads(text)["error"]["message"]
            status, text = post(server, {**body, "stream": True})
            lines = [line for line in text.splitlines() if line.startswith("data: {")]
            assert "the model failed" in json.loads(lines[-1].removeprefix("data: "))["error"]
            assert "secret" not in text
        assert ask(server, BATCH[0]).choices
        assert server.steered.waiting == 0


def test_a_full_queue_asks_to_come_again(gated: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_server, "MOST_WAITING", 0)
    assert post(gated, {"messages": messages(BATCH[1]), "max_tokens": 1})[0] == 503


def test_bodies_that_are_none(gated: Running) -> None:
    for body in (b"", b"{", b"[]", b"null", b"3", b"[" * 100_000, b"\xff\xfe", b'{"messages": 1}'):
        assert post(gated, body)[0] == 400
    assert refused_chat(b'{"messages": [{"role": "user", "content": "x"}]}', 1) is None
    neutral = {"frequency_penalty": 0, "logprobs": False, "response_format": {"type": "text"}}
    assert post(gated, {"messages": messages(BATCH[1]), "max_tokens": 1, **neutral})[0] == 200


def test_bodies_of_the_schema(gated: Running) -> None:
    """No 5xx and no hang, whatever the schema allows."""
    pytest.importorskip("schemathesis", reason="the extra `dev` installs it")
    from cmrm.engines.serving import body
    from fuzzing import show, statuses

    picture = uri(BATCH[0].all_images[0])

    def passable(sent: dict[str, Any]) -> None:
        sent["model"] = "tiny"
        show(sent, picture)

    steered = gated.steered.counts["masked"]
    codes = statuses(gated.address, "/v1/chat/completions", body.Chat, KEY, changed=passable)
    assert gated.steered.counts["masked"] > steered, "some of them have an image and a reply"
    assert set(codes) <= {200, 400}
    assert min(codes.count(200), codes.count(400)) > 5
    assert ask(gated, BATCH[0]).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(model: Model, stream: bool) -> None:
    """Its generation ends, and the next request is answered."""
    passes = threading.Semaphore(0)
    count = 0

    def counted(*args: Any) -> None:
        nonlocal count
        count += 1
        passes.release()
        time.sleep(0.01)

    with serving(model, SETTINGS["gated"]) as server:
        handle = model.engine.vlm.model.register_forward_hook(counted)
        try:
            text = Request("Tell me all.")
            body = {"messages": messages(text), "max_tokens": 1500, "stream": stream}
            sent = json.dumps({**body, "temperature": 0}).encode()
            port = int(server.address.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as link:
                link.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
                    b"application/json\r\nAuthorization: Bearer "
                    + KEY.encode()
                    + b"\r\nContent-Length: "
                    + str(len(sent)).encode()
                    + b"\r\n\r\n"
                    + sent
                )
                assert passes.acquire(timeout=30)
            end = time.monotonic() + 60
            while server.steered.waiting and time.monotonic() < end:
                time.sleep(0.02)
            assert server.steered.waiting == 0
            assert count < 1000
        finally:
            handle.remove()
        assert ask(server, BATCH[0]).choices
        assert not server.steered.abandoned


def test_a_reply_ends_where_the_context_does(gated: Running) -> None:
    limit = gated.steered.vlm.model.config.get_text_config().max_position_embeddings
    reply = ask(gated, Request("word " * 40), max_tokens=100_000)
    assert reply.usage.total_tokens <= limit


def test_cmrm_measures_it(model: Model, gated: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMRM_API_KEY", KEY)
    engine = EndpointEngine("tiny", [f"{gated.address}/v1"])
    assert engine.served_program == gated.steered.key
    replies = engine.answer(BATCH, options=Decoding(TOKENS))
    for request, reply in zip(BATCH, replies, strict=True):
        known = wanted(model, request, SETTINGS["gated"])
        assert (reply.text, reply.gate_open) == (known.text, known.gate_open)


def test_it_does_not_start_where_steering_is_not_shown(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_artifact(*llava(num_hidden_layers=3, hidden_size=32, initializer_range=0.1))
    with pytest.raises(ArtifactError):
        Steered(model.engine, other.shift)
    still = replace(model.shift, vectors=torch.zeros_like(model.shift.vectors))
    with pytest.raises(ModelError, match="an image request was not steered"):
        Steered(model.engine, still)
    steered = Steered(model.engine, model.shift)
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    with pytest.raises(InputError, match=r"5\.99\.0 is not tested"):
        application(steered, "tiny", key=None, most_images=1)


def test_the_program_has_a_key_of_its_own(model: Model) -> None:
    keys = {name: Steered(model.engine, model.shift, s).key for name, s in SETTINGS.items()}
    assert len(set(keys.values())) == len(keys)
    moved = replace(model.shift, vectors=model.shift.vectors * 1.01)
    assert Steered(model.engine, moved, SETTINGS["add"]).key != keys["add"]
    assert Steered(model.engine, model.shift, SETTINGS["add"]).key == keys["add"]
