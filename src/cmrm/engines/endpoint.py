"""The engine on servers that speak OpenAI's protocol: `cmrm serve`, `vllm serve`, or any other.

A client has no say in steering. A server of `cmrm serve` steers by itself every request that
carries an image, and `/health` says with which program; the defence `served` measures it. On any
server the defences that rewrite the request or revise the reply can be made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import openai

from cmrm.engines.base import Contrast, Decoding, Engine, EngineError, Reply
from cmrm.errors import InputError
from cmrm.prompts.conditions import Request
from cmrm.prompts.images import data_uri
from cmrm.shift.artifact import library_versions
from cmrm.steering.intervention import Intervention

PARALLEL = 16
"""Requests at a time, for each server."""
TRIES = 4
"""Of a request that a busy server refuses, or whose connection is lost."""
TIMEOUT = 300.0
"""Seconds that a reply may take."""
KEY = "CMRM_API_KEY"
"""Environment variable with the servers' key."""


class EndpointEngine(Engine):
    """One model behind one or several servers, asked in turn; see the module."""

    name = "endpoint"

    def __init__(
        self, model: str, urls: Sequence[str], *, parallel: int = PARALLEL, timeout: float = TIMEOUT
    ) -> None:
        """Look at every server.

        Args:
            model: the name under which the servers have the model.
            urls: addresses that end with `/v1`; replicas of one model.
            parallel: requests at a time, for each server.
            timeout: seconds that a reply may take.

        Raises:
            InputError: an address cannot be used, a server has no such model, or servers differ.
            EngineError: a server cannot be reached, or says that its steering is not armed.
        """
        for url in urls:
            if re.fullmatch(r"https?://[!-~]+", url) is None:
                raise InputError(
                    f"{url!r} is no address of a server; such as http://127.0.0.1:8000/v1"
                )
        whole = isinstance(parallel, int) and not isinstance(parallel, bool)
        number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not whole or parallel < 1 or not number or not 0 < timeout < float("inf"):
            raise InputError(
                f"parallel is {parallel!r} and timeout {timeout!r}; a whole number of at least 1, "
                "and seconds above 0"
            )
        self._model, self.parallel = model, parallel
        self.urls = [url.rstrip("/") for url in urls]
        key = os.environ.get(KEY) or os.environ.get("OPENAI_API_KEY") or "none"
        self._clients = [
            openai.OpenAI(api_key=key, base_url=url, timeout=timeout, max_retries=TRIES - 1)
            for url in self.urls
        ]
        states = [self._steering(client) for client in self._clients]
        if len(set(states)) > 1:
            raise InputError("the servers are armed with different programs; name replicas of one")
        self.program, self._positions = states[0]

    def _steering(self, client: openai.OpenAI) -> tuple[str | None, str]:
        """Key of the program that a server is armed with, and the positions that it steers; None
        for a server that is not cmrm's."""
        url = str(client.base_url).rstrip("/")
        try:
            names = [model.id for model in client.models.list().data]
        except openai.OpenAIError as error:
            raise EngineError(f"{url} cannot be asked: {_line(error)}") from None
        if self._model not in names:
            raise InputError(f"{url} has no model {self._model!r}; it has {', '.join(names)}")
        try:
            answer = client._client.get(url.removesuffix("/v1") + "/health")
            steering = json.loads(answer.text).get("steering")
        except (ValueError, AttributeError, OSError):  # another server's health is no JSON object
            return None, ""
        if not isinstance(steering, dict):
            return None, ""
        if not steering.get("armed"):
            reason = str(steering.get("reason", ""))[:200]
            raise EngineError(f"{url} says that its steering is not armed: {reason}")
        return str(steering.get("program")), str(steering.get("positions"))

    @property
    def served_program(self) -> str | None:
        """Key of the program with which the servers steer; None where they do not."""
        return self.program

    @property
    def n_layers(self) -> int:
        """Not known of a server.

        Raises:
            EngineError: always.
        """
        raise EngineError(_NO_STATES)

    @property
    def hidden_size(self) -> int:
        """Not known of a server.

        Raises:
            EngineError: always.
        """
        raise EngineError(_NO_STATES)

    @property
    def model_id(self) -> str:
        """The model's name on the servers."""
        return self._model

    def context(self) -> dict[str, Any]:
        """Addresses, model and program: a server does not say more of its weights."""
        return {
            "engine": self.name, "identity": f"{self._model} {self.program or 'unarmed'}",
            "servers": sorted(self.urls), "dtype": "unknown",
            "versions": {"cmrm": library_versions()["cmrm"]},
        }  # fmt: skip

    def check_interventions(self, interventions: Sequence[Intervention]) -> None:
        """Refuse every intervention; see `Engine.check_interventions`."""
        if interventions:
            raise EngineError(
                "a client cannot steer a server: measure what the server does (--defenses served), "
                "or use --engine vllm"
            )

    def answer(
        self,
        requests: Sequence[Request],
        interventions: Sequence[Intervention] = (),
        options: Decoding | None = None,
        *,
        batch_size: int = 16,
        on_batch: Callable[[int], None] | None = None,
        contrast: Contrast | None = None,
    ) -> list[Reply]:
        """Replies to conversations, in the order given; see `Engine.answer`.

        Raises:
            EngineError: a server refuses a request, or cannot be reached; the reason is named.
        """
        self.check_interventions(interventions)
        if contrast is not None:
            raise EngineError("a server cannot decode two conversations side by side")
        if not requests:
            return []
        options = options or Decoding()
        clients = [self._clients[k % len(self._clients)] for k in range(len(requests))]
        with ThreadPoolExecutor(min(len(requests), self.parallel * len(self._clients))) as pool:
            jobs = zip(clients, requests, strict=True)
            try:
                replies = list(pool.map(lambda job: self._ask(job[0], job[1], options), jobs))
            except BaseException:  # what was not asked yet is dropped
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if on_batch is not None:
            on_batch(len(requests))
        return replies

    def _ask(self, client: openai.OpenAI, request: Request, options: Decoding) -> Reply:
        values: dict[str, Any] = {"temperature": options.temperature}
        if options.top_p is not None:
            values["top_p"] = options.top_p
        if options.top_k is not None:
            values["extra_body"] = {"top_k": options.top_k}
        messages = [
            *(
                _message(turn.role, turn.text, turn.images, image_last=False)
                for turn in request.before
            ),
            _message("user", request.text, request.images, image_last=request.image_last),
        ]
        try:
            answer = client.chat.completions.create(
                model=self._model, messages=messages, max_tokens=options.max_new_tokens, **values
            )
        except openai.OpenAIError as error:
            raise EngineError(f"{client.base_url} gave no reply: {_line(error)}") from None
        if not answer.choices:
            raise EngineError(f"{client.base_url} gave no reply")
        text = str(answer.choices[0].message.content or "")
        tokens = 0 if answer.usage is None else answer.usage.completion_tokens
        outcome = getattr(answer, "cmrm", None) or {}
        # Behind the prompt there is nothing to steer in a reply of one token.
        wanted = self.program is not None and request.all_images and self._positions != "generated"
        if wanted and outcome.get("steered_tokens") == 0:
            raise EngineError(f"{client.base_url} did not steer a request with an image")
        return Reply(text.strip(), tokens, outcome.get("gate_open"))

    def stream(
        self,
        request: Request,
        interventions: Sequence[Intervention] = (),
        options: Decoding | None = None,
        *,
        cancel: Event | None = None,
    ) -> Generator[str | Reply, None, None]:
        """The whole reply as one piece, then the reply."""
        reply = self.answer([request], interventions, options)[0]
        if cancel is None or not cancel.is_set():
            yield reply.text
        yield reply


_NO_STATES = (
    "a server shows no decoder layers; defences that steer need --engine transformers or vllm"
)


def _message(role: str, text: str, images: Sequence[Any], *, image_last: bool) -> Any:
    """A turn in OpenAI's form, images as lossless data URIs."""
    if not images:
        return {"role": role, "content": text}
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    texts = [{"type": "text", "text": text}]
    return {"role": role, "content": texts + pictures if image_last else pictures + texts}


def _line(error: BaseException) -> str:
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return " ".join(f"{error}{cause}".split())[:300] or type(error).__name__
