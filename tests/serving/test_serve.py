"""`cmrm serve` on vLLM's own server: the openai client, health, metrics, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own (tools/vllm_env.sh)")

from openai import AuthenticationError, BadRequestError, OpenAI
from PIL import Image

from cmrm import Steering
from serving.models import TOKENS, Model, hooks, requests

KEY = "a key of the tests"
SETTING = Steering(alpha=0.5, gate=True, layers=(2, 3))
GATED = ("--gate", "--layers", "2-3")
EAGER = ("--enforce-eager", "--max-num-batched-tokens", "64")


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    address: str
    client: OpenAI


def start(
    model: Model,
    port: int,
    log: Any,
    setting: Sequence[str] = GATED,
    options: Sequence[str] = EAGER,
) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "cmrm", "serve", str(model.folder), "--shift", str(model.path),
        "--port", str(port), "--name", "tiny", "--api-key", KEY, *setting,
        "--", "--dtype", "float32", "--max-model-len", "1024", *options,
    ]  # fmt: skip
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def health(address: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait(process: subprocess.Popen[bytes], address: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            if health(address)[0] == 200:
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError("the server does not get ready")


@contextmanager
def running(
    model: Model,
    log: Path,
    port: int | None = None,
    setting: Sequence[str] = GATED,
    options: Sequence[str] = EAGER,
) -> Iterator[Server]:
    """A server that is ready; it is ended at the end."""
    port = free_port() if port is None else port
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as handle:
        process = start(model, port, handle, setting, options)
        try:
            wait(process, address)
            yield Server(process, address, OpenAI(base_url=f"{address}/v1", api_key=KEY))
        except AssertionError:
            print(log.read_text()[-4000:])
            raise
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(model, tmp_path_factory.mktemp("serve") / "log.txt") as made:
        yield made


def content(request: dict[str, Any]) -> Any:
    if not request.get("image"):
        return request["text"]
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), request["image"]).save(buffer, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request["text"]},
    ]  # fmt: skip


def ask(server: Server, request: dict[str, Any], **more: Any) -> list[float]:
    """Log-probabilities of the greedy reply."""
    reply = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content(request)}], temperature=0,
        max_tokens=TOKENS, logprobs=True, extra_body={"ignore_eos": True, **more},
    )  # fmt: skip
    steps = reply.choices[0].logprobs
    assert steps is not None
    return [step.logprob for step in steps.content or ()]


def close(one: list[float], other: list[float]) -> bool:
    far = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(far) < 2e-3


def test_image_requests_are_steered_and_text_is_not(server: Server, model: Model) -> None:
    batch = requests()
    wanted = [reply["logprobs"] for reply in hooks(model, batch, SETTING)]
    plain = [reply["logprobs"] for reply in hooks(model, batch)]
    assert not all(close(a, b) for a, b in zip(wanted, plain, strict=True))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: ask(server, request), batch))
    assert all(close(a, b) for a, b in zip(answers, wanted, strict=True))


def test_each_reply_says_what_was_done_to_it(server: Server, model: Model) -> None:
    batch = requests()
    plain, wanted = hooks(model, batch), hooks(model, batch, SETTING)
    for request, one, other in zip(batch, plain, wanted, strict=True):
        messages: Any = [{"role": "user", "content": content(request)}]
        more: dict[str, Any] = {
            "model": "tiny", "messages": messages, "temperature": 0, "max_tokens": TOKENS,
            "extra_body": {"ignore_eos": True}, "extra_headers": {"X-Request-Id": "the same"},
        }  # fmt: skip
        reply = server.client.chat.completions.create(**more)
        told = getattr(reply, "cmrm", None)
        moved = not close(one["logprobs"], other["logprobs"])
        expected: dict[str, Any] = {"steered_tokens": TOKENS, "gate_open": moved}
        if not request["image"]:
            expected = {"steered_tokens": 0, "gate_open": None}
        assert told == expected
        body = {**more, **more["extra_body"], "stream": True}
        del body["extra_body"], body["extra_headers"]
        asked = urllib.request.Request(
            f"{server.address}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )  # fmt: skip
        with urllib.request.urlopen(asked, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        comment = next(line for line in lines if line.startswith(": cmrm "))
        assert json.loads(comment.removeprefix(": cmrm ")) == expected
        assert lines.index("data: [DONE]") > lines.index(comment)
    server_side = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=2, stream=True
    )
    assert len(list(server_side)) >= 2, "OpenAI's client passes over the comment"


def test_a_client_has_no_say_in_it(server: Server, model: Model) -> None:
    request = requests()[0]
    wanted = hooks(model, [request], SETTING)[0]["logprobs"]
    asked: tuple[dict[str, Any], ...] = (
        {"vllm_xargs": {"cmrm": "off"}}, {"cache_salt": "mine"}, {"priority": 0},
        {"mm_processor_kwargs": {}},
    )  # fmt: skip
    for more in asked:
        assert close(ask(server, request, **more), wanted)


def test_health_and_metrics(server: Server) -> None:
    status, body = health(server.address)
    assert status == 200
    assert body["steering"]["armed"] is True
    assert body["steering"]["gated"] is True
    ask(server, {"text": "x", "image": "red"})
    with urllib.request.urlopen(f"{server.address}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    assert "cmrm_armed 1" in text
    count = next(line for line in text.splitlines() if line.startswith("cmrm_masked_total"))
    assert float(count.split()[1]) > 0
    assert "vllm:" in text, "vLLM's own metrics stay"


def test_what_is_refused(server: Server) -> None:
    wrong = OpenAI(base_url=f"{server.address}/v1", api_key="wrong key", max_retries=0)
    with pytest.raises(AuthenticationError):
        wrong.models.list()
    remote = [
        {"type": "image_url", "image_url": {"url": f"{server.address}/health"}},
        {"type": "text", "text": "What is it?"},
    ]
    for bad in (remote, [*content({"text": "x", "image": "red"})[:1]] * 9):
        with pytest.raises(BadRequestError):
            server.client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": bad}],  # type: ignore[misc, list-item]
                max_tokens=2,
            )
    assert health(server.address)[0] == 200


def post(server: Server, path: str, body: dict[str, Any] | None, key: str | None = None) -> int:
    """Status of a request without OpenAI's client."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.address}{path}", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_else_is_reached(server: Server) -> None:
    """vLLM answers on more paths, some of them without the key."""
    chat = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    for path in ("/invocations", "/tokenize", "/generative_scoring", "/pooling", "/v1/responses"):
        assert post(server, path, chat) == 404
        assert post(server, path, chat, KEY) == 404
    for path in ("/collective_rpc", "/sleep", "/reset_prefix_cache"):
        assert post(server, path, {}, KEY) == 404
    assert post(server, "/v1/chat/completions", chat) == 401
    assert post(server, "/v1/chat/completions", chat, KEY) == 200
    for moved in (
        {"use_beam_search": True, "n": 2}, {"continue_final_message": True},
        {"add_generation_prompt": False}, {"chat_template": "{{ messages }}"},
        {"truncate_prompt_tokens": 4}, {"truncation_side": "right"},
    ):  # fmt: skip
        assert post(server, "/v1/chat/completions", {**chat, **moved}, KEY) == 400
    assert post(server, "/live", None) == 200


@pytest.mark.parametrize(
    "option",
    ["--trust-remote", "--hos=0.0.0.0", "--allowed-media=evil.example", "--enable-sleep",
     "--limit-mm-per-prompt.image=99", "--ubatch-size=2"],
)  # fmt: skip
def test_no_option_undoes_a_safe_default(model: Model, option: str) -> None:
    """Abbreviated and dotted options are known to vLLM's own parser."""
    done = subprocess.run(
        [sys.executable, "-m", "cmrm", "serve", str(model.folder), "--shift", str(model.path),
         "--gate", "--layers", "2-3", "--", option],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is set by `cmrm serve`" in done.stderr


def test_a_client_that_goes_away(server: Server) -> None:
    stream = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Tell me all."}], max_tokens=400,
        stream=True, extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    assert ask(server, {"text": "And now?", "image": "blue"})
    assert health(server.address)[0] == 200


def test_it_ends_on_sigterm_with_requests_in_flight(server: Server) -> None:
    """The last test: the server is gone after it."""
    with ThreadPoolExecutor(4) as pool:
        flying = [pool.submit(ask, server, request) for request in requests()[:4]]
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) is not None
        for future in flying:
            error = future.exception()
            assert error is None or "nnection" in str(error) or "abort" in str(error).lower()
