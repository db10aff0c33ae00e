"""Load and faults: 2,000 mixed requests, bodies of every kind, and a server that is killed."""

from __future__ import annotations

import json
import random
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own (tools/vllm_env.sh)")

import psutil

from serving.models import Model, hooks, requests
from serving.test_serve import KEY, SETTING, Server, ask, close, free_port, health, running

REQUESTS, AT_ONCE = 2000, 16
BODIES = 150


@pytest.fixture(scope="module")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(model, tmp_path_factory.mktemp("load") / "log.txt") as made:
        yield made


def memory(server: Server) -> int:
    """Bytes that the server and its children hold."""
    whole = psutil.Process(server.process.pid)
    return sum(part.memory_info().rss for part in (whole, *whole.children(recursive=True)))


def test_a_mixed_load(server: Server, model: Model) -> None:
    """No image request goes unsteered, no text request is steered, and memory stays flat."""
    batch = requests()
    wanted = [reply["logprobs"] for reply in hooks(model, batch, SETTING)]
    order = [random.Random(0).randrange(len(batch)) for _ in range(REQUESTS)]

    def one(k: int) -> bool:
        return close(ask(server, batch[k]), wanted[k])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert all(pool.map(one, order[:200]))
        before = memory(server)
        assert all(pool.map(one, order[200:]))
    assert memory(server) < 1.1 * before
    assert health(server.address)[0] == 200


def body(rng: random.Random) -> Any:
    """A request body with one thing wrong, or many."""
    odd: list[Any] = [
        None, -1, 0, 1e308, "", "x" * 5000, [], {}, True, [[]], {"a": None}, "\x00", "\ud7ff",
        [None], "data:image/png;base64,AAAA", "file:///etc/passwd", "http://127.0.0.1/x.png",
    ]  # fmt: skip
    whole: dict[str, Any] = {
        "model": "tiny", "max_tokens": 2, "temperature": 0, "n": 1, "stream": False,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    }  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        place = rng.choice([
            "model", "max_tokens", "temperature", "n", "messages", "logprobs", "stop", "tools",
            "response_format", "vllm_xargs", "cache_salt", "priority", "seed", "role", "content",
            "image_url", "top_logprobs",
        ])  # fmt: skip
        value = rng.choice(odd)
        if place == "role":
            whole["messages"] = [{"role": value, "content": "x"}]
        elif place == "content":
            whole["messages"] = [{"role": "user", "content": value}]
        elif place == "image_url":
            part = {"type": "image_url", "image_url": {"url": value}}
            whole["messages"] = [{"role": "user", "content": [part]}]
        else:
            whole[place] = value
    return whole


def post(server: Server, content: bytes) -> int:
    request = urllib.request.Request(
        f"{server.address}/v1/chat/completions", content,
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_bodies_of_every_kind(server: Server, model: Model) -> None:
    """No request ends the server, hangs, or changes what others get."""
    rng = random.Random(1)
    contents = [json.dumps(body(rng)).encode() for _ in range(BODIES)]
    contents += [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": ' + b"[" * 500]
    codes = [post(server, content) for content in contents]
    assert set(codes) <= {200, 400, 401, 404, 422}, sorted(set(codes))
    assert codes.count(400) + codes.count(422) > 50
    request = requests()[0]
    assert close(ask(server, request), hooks(model, [request], SETTING)[0]["logprobs"])
    assert health(server.address)[0] == 200


def test_a_restart_after_kill_9(model: Model, tmp_path: Path) -> None:
    """Nothing that a killed server leaves behind stands in the way of the next one."""
    port = free_port()
    with running(model, tmp_path / "one.txt", port) as first:
        tree = [*psutil.Process(first.process.pid).children(recursive=True)]
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(30)
        for child in tree:
            child.kill() if child.is_running() else None
    with running(model, tmp_path / "two.txt", port) as second:
        request = requests()[0]
        assert close(ask(second, request), hooks(model, [request], SETTING)[0]["logprobs"])
