"""`cmrm serve --engine transformers`: transformers' own OpenAI-compatible server, for machines
without vLLM, with cmrm's engine behind it.

Its handlers read requests, render them and write replies; nothing of it is changed. Its parts are
put together here with a model that stands under an artifact (`serving.steered`). It runs one
request at a time.
"""

from __future__ import annotations

import logging
import socket
from typing import Any

import transformers
import uvicorn
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    GenerateManager,
    GenerationState,
    Modality,
    _GenerationCancelled,
)

from cmrm.engines.serving.body import refused_chat
from cmrm.engines.serving.front import Front, Scope, shows_key
from cmrm.engines.serving.messages import has_images, texts_of, without_images
from cmrm.engines.serving.steered import Expected, Steered
from cmrm.engines.transformers import GREEDY
from cmrm.errors import CmrmError, InputError

TESTED = ("5.24",)
"""Versions of transformers, major and minor, whose server was tested."""
MOST_WAITING = 64
"""Requests that run, or wait for it; the next ones are asked to come again later."""
PLAIN: dict[str, Any] = {
    **{name: value for name, value in GREEDY.items() if name != "do_sample"},
    "prompt_lookup_num_tokens": None, "guidance_scale": None, "penalty_alpha": None,
    "dola_layers": None, "assistant_early_exit": None, "max_length": None, "min_length": None,
    "min_new_tokens": None,
}  # fmt: skip
"""One row that is decoded token by token, whatever the checkpoint's own settings say."""
_log = logging.getLogger("cmrm.serve")


class _Failed(Exception):
    """A request that was read, and could not be answered."""


def check_version() -> None:
    """Refuse a version of transformers whose server was not tested.

    Raises:
        InputError: it is such a version.
    """
    version = str(transformers.__version__)
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise InputError(
            f"the server of transformers {version} is not tested with cmrm (tested: "
            f"{', '.join(TESTED)}): its requests could go unsteered; install a tested version"
        )


def application(steered: Steered, name: str, *, key: str | None, most_images: int) -> Front:
    """The ASGI application.

    Args:
        steered: the model.
        name: of the model, for clients.
        key: that clients have to send, or None.
        most_images: images that a request may have.

    Raises:
        InputError: the version of transformers is not tested.
    """
    check_version()
    manager = _Pinned(steered, name)
    state = _State(steered)
    chat = _Chat(steered, manager, state)
    nowhere: Any = None  # handlers of paths that clients do not reach
    app = build_server(manager, chat, nowhere, nowhere, nowhere, nowhere, state)

    async def as_openai(request: Any, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    app.add_exception_handler(HTTPException, as_openai)
    return _Front(app, steered, key, most_images)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        InputError: the address cannot be used.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(
            f"{host}:{port} cannot be used ({error.strerror or error}); name another --port"
        ) from None
    return listener


def run(app: Front, listener: socket.socket, drain: int) -> None:
    """Serve until a signal ends it; requests in flight have `drain` seconds then."""
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=drain, server_header=False
    )
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


class _Front(Front):
    """What stands before transformers' application, which has no key and no limits."""

    counters = ("masked", "tokens")
    completes = True

    def __init__(self, app: Any, steered: Steered, key: str | None, most_images: int) -> None:
        super().__init__(app)
        self.steered, self.key, self.most_images = steered, key, most_images

    async def workers(self, scope: Scope) -> list[dict[str, Any]]:
        return [self.steered.status()]

    async def outcome(self, scope: Scope, name: str) -> dict[str, Any] | None:
        return await self.steered.outcome(name)

    def abandoned(self, name: str) -> None:
        self.steered.abandon(name)

    def admits(self, scope: Scope) -> bool:
        return shows_key(scope, self.key)

    def refusal(self, path: str, body: bytes) -> str | None:
        return refused_chat(body, self.most_images)


class _Pinned(ModelManager):
    """The one model of the server."""

    def __init__(self, steered: Steered, name: str) -> None:
        self.steered = steered
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        return Modality.VLM

    def load_model_and_processor(self, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        return self.steered.vlm.model, self.steered.vlm.processor

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "cmrm"}]


class _State(GenerationState):
    """Gives every request to the thread of the one model."""

    def __init__(self, steered: Steered) -> None:
        super().__init__()
        self.manager = _Manager(steered)

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        return False

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.manager


class _Manager(GenerateManager):
    """transformers' queue and thread, whose `generate` is that of `Steered`."""

    def __init__(self, steered: Steered) -> None:
        super().__init__()
        self.steered = steered

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> Any:
        self._limit(inputs, gen_config, request_id)
        named = _Named(self.steered, request_id)
        return super().generate_streaming(
            named, processor, inputs, gen_config, request_id, response_parser
        )

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        self._limit(inputs, gen_config, request_id)
        named = _Named(self.steered, request_id)
        return await super().generate_non_streaming(
            named, processor, inputs, gen_config, request_id
        )

    def _limit(self, inputs: Any, gen_config: Any, request_id: str) -> None:
        """A reply ends where the model's context does."""
        room = self.steered.room(request_id, inputs["input_ids"])
        gen_config.max_new_tokens = min(int(gen_config.max_new_tokens), room)


class _Named:
    """The model as one request sees it."""

    def __init__(self, steered: Steered, name: str) -> None:
        self.steered, self.name = steered, name

    def generate(self, **arguments: Any) -> Any:
        """Of transformers; `tokenizer` finds where a reply stops.

        Raises:
            _Failed: it cannot be answered; the message is one that a client may read.
        """
        tokenizer = self.steered.vlm.tokenizer
        try:
            return self.steered.generate(self.name, {**arguments, "tokenizer": tokenizer})
        except _GenerationCancelled:
            raise
        except CmrmError as error:
            raise _Failed(_one_line(error)) from error
        except Exception as error:  # whatever the model raises: the request has no answer
            _log.exception("a request failed")
            raise _Failed(f"the model failed ({type(error).__name__})") from error


class _Chat(ChatCompletionHandler):
    """transformers' handler of chats, which is told first what each request carries."""

    def __init__(self, steered: Steered, manager: ModelManager, state: GenerationState) -> None:
        super().__init__(manager, state)
        self.steered = steered

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        steered = self.steered
        if steered.waiting >= MOST_WAITING:
            return _error(503, f"{MOST_WAITING} requests wait already; come again later")
        try:
            steered.expected[request_id] = self._expected(body)
            return await super().handle_request(body, request_id)
        except HTTPException:
            steered.expected.pop(request_id, None)
            raise
        except _Failed as error:
            return _error(500, str(error))
        except Exception as error:  # whatever a stranger's request makes transformers raise
            steered.expected.pop(request_id, None)
            return _error(400, f"the request cannot be read: {_one_line(error)}")

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        """Decoding as the client asks for it; the seed is set where the request runs."""
        unseeded = {name: value for name, value in body.items() if name != "seed"}
        config = super()._build_generation_config(unseeded, model_generation_config, use_cb)
        config.update(**PLAIN)
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if temperature == 0:
            config.do_sample = False
        elif temperature is not None or top_p is not None:
            config.do_sample = True
        return config

    def _expected(self, body: dict[str, Any]) -> Expected:
        """What a request carries.

        Raises:
            InputError: a text holds what the processor would take for an image.
        """
        messages = body["messages"]
        texts = texts_of(messages)
        for placeholder in sorted(self.steered.vlm.placeholders):
            if any(placeholder in text for text in texts):
                raise InputError(f"a text holds {placeholder!r}, which the model reads as an image")
        seed = body.get("seed")
        if not has_images(messages):
            return Expected(has_image=False, seed=seed)
        if not self.steered.needs_text:
            return Expected(has_image=True, seed=seed)
        inputs = self.steered.vlm.processor.apply_chat_template(
            self.get_processor_inputs_from_messages(without_images(messages), Modality.VLM),
            add_generation_prompt=True, tools=body.get("tools"), return_tensors="pt",
            return_dict=True, tokenize=True,
        )  # fmt: skip
        return Expected(has_image=True, text=dict(inputs), seed=seed)


def _one_line(error: Exception) -> str:
    """A message on one line that can stand in a JSON string as it is."""
    line = " ".join(str(error).replace('"', "'").replace("\\", "/").split())
    return line[:300] or type(error).__name__


def _error(status: int, message: str) -> JSONResponse:
    """An error in the form of OpenAI's protocol."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"message": f"cmrm: {message}", "type": kind, "code": status}
    return JSONResponse({"error": content}, status_code=status)
