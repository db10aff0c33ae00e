"""Bodies drawn from vLLM's own schema: no 5xx, no hang, and others get what they got before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own (tools/vllm_env.sh)")
pytest.importorskip("schemathesis", reason="tools/vllm_env.sh installs it")

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from cmrm import Steering
from cmrm.engines.vllm.http import REFUSED
from fuzzing import show, statuses
from serving.models import Model, hooks, requests
from serving.test_serve import KEY, Server, ask, close, content, health, running

FILL = Steering(operator="fill", alpha=1.0)
ALLOWED = {200, 400, 401, 404, 413, 422}


@pytest.fixture(scope="module")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("fuzz") / "log.txt"
    with running(model, log, setting=("--operator", "fill", "--alpha", "1")) as made:
        yield made


def passable(body: dict[str, Any]) -> None:
    """The model that is there, and nothing that is refused at once."""
    body["model"] = "tiny"
    show(body, content({"text": "", "image": "red"})[0]["image_url"]["url"])
    for name in (*REFUSED, "kv_transfer_params", "prompt_embeds", "structured_outputs"):
        body.pop(name, None)
    if "messages" not in body and not body.get("prompt"):
        body["prompt"] = "What is it?"
        for name in ("response_format", "logprobs"):
            body.pop(name, None)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", ChatCompletionRequest), ("/v1/completions", CompletionRequest)],
)
def test_bodies_of_the_schema(
    server: Server, model: Model, path: str, body: type[ChatCompletionRequest]
) -> None:
    codes = statuses(server.address, path, body, KEY, changed=passable)
    assert set(codes) <= ALLOWED, sorted(set(codes))
    assert codes.count(200) > 5
    request = requests()[0]
    assert close(ask(server, request), hooks(model, [request], FILL)[0]["logprobs"])
    assert health(server.address)[0] == 200
