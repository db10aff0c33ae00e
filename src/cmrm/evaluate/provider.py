"""The Inspect model provider `cmrm/<model>`: a defended VLM in this process, answering in batches.

    inspect eval inspect_evals/mmmu_multiple_choice --model cmrm/demo -M defense=ecso
    inspect eval inspect_evals/mmmu_multiple_choice --model cmrm/demo \\
        -M defense=cmrm_dataset -M shift=FILE
    inspect eval inspect_evals/mmmu_multiple_choice --model cmrm/demo \\
        -M defense=shiftdc -M fitted=DIR

`<model>` is a folder, a hub id, or `demo`. FILE is what `cmrm extract -o FILE` writes, DIR the
folder `OUT/fitted` of `cmrm evaluate --out OUT`. Requests of cmrm's own tasks name the batch that
they belong to (`PLACE`); those of other tasks are batched as they come in.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

import anyio
import sniffio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from cmrm.engines.base import Decoding, Engine, Reply
from cmrm.engines.opening import open_engine
from cmrm.errors import InputError
from cmrm.evaluate.batcher import Batcher, Job, Place
from cmrm.evaluate.conversation import decoding_of, request_of
from cmrm.evaluate.defended import built_defense, settings_of
from cmrm.measure.loop import Answering, Ask
from cmrm.measure.store import ReplyStore

PLACE = "cmrm_place"
"""Key in a user message's metadata: the fields of `Place`, and `key`, the request's seed."""

_ENGINES: dict[str, Engine] = {}
"""Engines of this process by model and options: Inspect builds a provider for every task."""
_LOADING = threading.Lock()


def shared_engine(model: str, **options: Any) -> Engine:
    """The engine on `model` (folder, hub id or `demo`), loaded once in this process.

    `options` are those of `open_engine`.
    """
    key = json.dumps([model, options], sort_keys=True, default=str)
    with _LOADING:
        if key not in _ENGINES:
            _ENGINES[key] = open_engine(model, **options)
        return _ENGINES[key]


class CmrmAPI(ModelAPI):
    """A defended model behind Inspect's interface; see the module."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        defense: str = "none",
        settings: dict[str, Any] | str | None = None,
        fitted: str | None = None,
        shift: str | None = None,
        alpha: float | None = None,
        store: str | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        """Arguments that `-M` takes.

        Args:
            model_name: folder, hub id, or `demo`.
            base_url: not used.
            api_key: not used.
            config: Inspect's defaults for generation.
            defense: name of a defence, or several with `+` (`cmrm.defenses.defense_names`).
            settings: settings by the name of the defence, as a mapping or as JSON.
            fitted: folder with `<defence>.safetensors` of each defence that was fitted.
            shift: artifact for `cmrm_dataset`, `cmrm_fill` or `cmrm_gated` (file, folder, hub
                id), used with the setting that it recommends.
            alpha: strength of cmrm's own defences, in place of the setting's.
            store: file that keeps replies.
            batch_size: requests a batch.
            options: of `open_engine`: `engine`, `engine_options`, `dtype`, `device_map`,
                `revision`, `trust_remote_code`.

        Raises:
            InputError: an argument cannot be used, or a defence is not fitted.
            ArtifactError: what was fitted belongs to another model.
            ModelError: the model cannot be loaded.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it is at least 1")
        self.batch_size = batch_size
        config = GenerateConfig() if config is None else config
        # Inspect begins with 20 requests at a time and reads this very object: a larger batch
        # would wait for requests that are never sent.
        if config.max_connections is None and not getattr(config, "adaptive_connections", None):
            config.max_connections = self.max_connections()
        super().__init__(model_name, base_url, api_key, [], config)
        self.engine = shared_engine(model_name, **options)
        self.defense = built_defense(
            self.engine, defense, settings_of(settings), fitted=fitted, shift=shift, alpha=alpha
        )
        replies = ReplyStore(Path(store)) if store else None
        self.answering = Answering(self.engine, self.defense, Decoding(self.max_tokens()), replies)
        _ = self.answering.context  # reads every weight once, here instead of in the event loop
        self.batcher = Batcher(self.answering, batch_size)

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """One reply; see `ModelAPI.generate`. Tools are not supported."""
        if tools:
            raise InputError("cmrm's models call no tools; choose a task without")
        options = decoding_of(config, max_tokens=self.max_tokens())
        start = time.perf_counter()
        future: Future[Reply] = Future()
        try:
            await anyio.to_thread.run_sync(self._ask, input, options, future)
            reply = await _awaited(future)
        finally:
            future.cancel()
        message = ChatMessageAssistant(content=reply.text, model=self.model_name, source="generate")
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message)],
            usage=ModelUsage(output_tokens=reply.tokens, total_tokens=reply.tokens),
            time=time.perf_counter() - start,
        )

    def _ask(
        self, messages: Sequence[ChatMessage], options: Decoding, future: Future[Reply]
    ) -> None:
        """Hand in a conversation: images are decoded and hashed here, beside the event loop."""
        request = request_of(messages)
        hint = dict((messages[-1].metadata or {}).get(PLACE) or {})
        ask = Ask(request, str(hint.pop("key", request.text)))
        self.batcher.ask(Job(ask, options, Place(**hint) if hint else None, future))

    def max_tokens(self) -> int:
        """Length limit of a reply where the task sets none."""
        return 256

    async def count_text_tokens(self, text: str) -> int:
        """By the model's own tokenizer; Inspect's default fetches one of OpenAI's."""
        return self.engine.count_tokens(text)

    def max_connections(self) -> int:
        """Requests at a time: enough to fill the next batches while one runs."""
        return 4 * self.batch_size

    def connection_key(self) -> str:
        """One queue a process."""
        return "cmrm"

    def close(self) -> None:
        """End the provider's thread; the model stays loaded for others."""
        self.batcher.close()


async def _awaited(future: Future[Reply]) -> Reply:
    """The future's reply.

    Under asyncio the loop sleeps until it is there: many requests that look every few milliseconds
    would take the interpreter from the batch that is being generated.
    """
    if sniffio.current_async_library() == "asyncio":
        return await asyncio.wrap_future(future)
    while True:
        try:
            return future.result(timeout=0)
        except NotYet:
            await anyio.sleep(0.05)
