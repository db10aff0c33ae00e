"""`cmrm serve --engine transformers`: transformers' own OpenAI-compatible server, for machines
without vLLM, with cmrm's engine behind it.

Its handlers read requests, render them and write replies; nothing of it is changed. Its parts are
put together here with a model that stands under an artifact (`serving.steered`). It runs one
request at a time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
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
from cmrm.engines.serving.front import Front, Scope, error_body, shows_key
from cmrm.engines.serving.messages import has_images, texts_of, without_images
from cmrm.engines.serving.steered import Expected, Steered
from cmrm.engines.transformers import GREEDY
from cmrm.errors import CmrmError, InputError
from cmrm.prompts.images import open_picture

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
_INPUTS: ContextVar[Any] = ContextVar("inputs")
"""Model inputs of the request that this task handles."""
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


class _Rendered:
    """The processor as one request sees it: its prompt is rendered already."""

    def __init__(self, processor: Any, inputs: Any) -> None:
        self._processor, self._inputs = processor, inputs

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        """The prompt's model inputs."""
        return self._inputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


class _Chat(ChatCompletionHandler):
    """transformers' handler of chats, which is told first what each request carries."""

    def __init__(self, steered: Steered, manager: ModelManager, state: GenerationState) -> None:
        super().__init__(manager, state)
        self.steered = steered
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="cmrm-prompts")

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        steered, name = self.steered, self.model_manager.force_model
        if body.get("model") not in (None, name):
            return _error(404, f"there is no model {body['model']!r} here, but {name!r}")
        if steered.waiting >= MOST_WAITING:
            return _error(503, f"{MOST_WAITING} requests wait already; come again later")
        try:
            with steered.prepared(request_id):
                loop = asyncio.get_running_loop()
                expected, inputs = await loop.run_in_executor(self.worker, self._read, body)
            steered.expected[request_id] = expected
            _INPUTS.set(inputs)
            return await super().handle_request(body, request_id)
        except HTTPException:
            steered.expected.pop(request_id, None)
            raise
        except _Failed as error:
            return _error(500, str(error))
        except Exception as error:  # whatever a stranger's request makes transformers raise
            steered.expected.pop(request_id, None)
            return _error(400, f"the request cannot be read: {_one_line(error)}")

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        """The model, and the processor with the prompt that is rendered already."""
        name, model, processor = super()._resolve_model(body)
        return name, model, _Rendered(processor, _INPUTS.get())

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

    def _read(self, body: dict[str, Any]) -> tuple[Expected, Any]:
        """What a request carries, and its prompt as model inputs.

        Raises:
            InputError: a text holds what the processor would take for an image, or the model has no
                place for tools.
        """
        messages, tools = body["messages"], body.get("tools")
        texts = texts_of(messages)
        for placeholder in sorted(self.steered.vlm.placeholders):
            if any(placeholder in text for text in texts):
                raise InputError(f"a text holds {placeholder!r}, which the model reads as an image")
        alone = self._conversation(without_images(messages))
        if tools and self._text(alone, tools) == self._text(alone, None):
            raise InputError("the model's chat template has no place for tools; ask without them")
        shown, seed = has_images(messages), body.get("seed")
        inputs = self._inputs(self._conversation(messages), tools)
        if shown and self.steered.needs_text:
            return Expected(True, dict(self._inputs(alone, tools)), seed), inputs
        return Expected(shown, None, seed), inputs

    def _conversation(self, messages: list[Any]) -> list[Any]:
        """Messages as the processor takes them, their images opened as everywhere in cmrm."""
        conversation = list(self.get_processor_inputs_from_messages(messages, Modality.VLM))
        for message in conversation:
            message["content"] = [
                {"type": "image", "image": open_picture(part["url"], "the request")}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ]
        return conversation

    def _text(self, conversation: list[Any], tools: Any) -> str:
        """A conversation without images as the chat template writes it."""
        processor = self.steered.vlm.processor
        return str(
            processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False, tools=tools
            )
        )

    def _inputs(self, conversation: list[Any], tools: Any) -> Any:
        return self.steered.vlm.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tools=tools, return_tensors="pt",
            return_dict=True, tokenize=True,
        )  # fmt: skip


def _one_line(error: Exception) -> str:
    """A message on one line that can stand in a JSON string as it is."""
    line = " ".join(str(error).replace('"', "'").replace("\\", "/").split())
    return line[:300] or type(error).__name__


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(status, message), status_code=status)
