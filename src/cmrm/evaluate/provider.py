"""The Inspect model provider `cmrm/<model>`: a defended VLM in process, its concurrent requests answered in batches.

    inspect eval inspect_evals/mmmu --model cmrm/demo -M defense=cmrm_dataset -M fitted=shift.safetensors

`<model>` is a folder, a hub id, or `demo`. Requests of cmrm's own tasks say which batch they belong to (`BATCH_HINT`); those of
any other task are batched as they come in.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import sniffio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentImage,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo
from PIL import Image

from cmrm.prompts.conditions import Request, Turn
from cmrm.defenses import Defense, Reply, respond
from cmrm.demo.vlm import load_named_vlm
from cmrm.errors import InputError
from cmrm.evaluate.defended import built_defense, settings_of
from cmrm.measure.store import ReplyStore, request_key
from cmrm.model.vlm import VLM, config_hash, weights_hash
from cmrm.prompts.sample import open_picture

BATCH_HINT = "cmrm_batch"
"""Key in a user message's metadata: `{"id", "size", "key"}` of the batch that the request belongs to, and its seed."""
WINDOW = 0.2
"""Seconds without a new request after which a batch is run that is not full."""
PATIENCE = 30.0
"""Seconds without a new request after which a batch is run although a member that its hint announces is missing."""

_LOADED: dict[str, VLM] = {}
"""Models that this process holds: Inspect builds a provider anew for every task and retry."""


def shared_vlm(model: str, **options: Any) -> VLM:
    """`model` (folder, hub id or `demo`), loaded once in this process."""
    key = json.dumps([model, options], sort_keys=True, default=str)
    if key not in _LOADED:
        _LOADED[key] = load_named_vlm(model, **options)
    return _LOADED[key]


@dataclass
class _Job:
    """One request that waits for its reply."""

    request: Request
    seed_key: str
    options: dict[str, Any]
    max_new_tokens: int
    batch: tuple[str, int] | None
    future: Future[Reply] = field(default_factory=Future)

    @property
    def kept(self) -> bool:
        """Whether the reply may be stored: what is drawn at random is drawn again."""
        return not self.options.get("do_sample")

    @property
    def group(self) -> str:
        """Requests of one group may share a batch."""
        return json.dumps([self.options, self.max_new_tokens, self.batch], sort_keys=True)


class Batcher:
    """Collects requests from many callers and answers them in batches, on one thread."""

    def __init__(
        self, vlm: VLM, defense: Defense, context: Mapping[str, Any], store: ReplyStore | None, size: int
    ) -> None:
        self.vlm = vlm
        self.defense = defense
        self.context = dict(context)
        self.store = store
        self.size = size
        self._queue: queue.Queue[_Job] = queue.Queue()
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def ask(self, job: _Job) -> Future[Reply]:
        """Hand in a request; the future is done when its batch is, at once where the store has the reply."""
        held = self.store.get(self._key(job)) if self.store is not None and job.kept else None
        if held is not None:
            job.future.set_result(held)
        else:
            self._queue.put(job)
        return job.future

    def _key(self, job: _Job) -> str:
        context = {
            **self.context, "options": job.options, "max_new_tokens": job.max_new_tokens, "batch": job.batch,
        }  # fmt: skip
        return request_key(context, job.request, job.seed_key)

    def _serve(self) -> None:
        waiting: dict[str, list[_Job]] = {}
        while True:
            try:
                job = self._queue.get(timeout=WINDOW if waiting else None)
            except queue.Empty:
                self._flush(waiting)
                continue
            waiting.setdefault(job.group, []).append(job)
            if self._full(waiting[job.group]):
                self._answer(waiting.pop(job.group))
            self._since = time.monotonic()

    def _full(self, jobs: list[_Job]) -> bool:
        return len(jobs) >= (jobs[0].batch[1] if jobs[0].batch else self.size)

    def _flush(self, waiting: dict[str, list[_Job]]) -> None:
        """Run what is not full: at once where nobody announced more, after `PATIENCE` where somebody did."""
        for group in list(waiting):
            if waiting[group][0].batch is None or time.monotonic() - self._since > PATIENCE:
                self._answer(waiting.pop(group))
                return

    def _answer(self, jobs: list[_Job]) -> None:
        live = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        # The same rows in the same order, whoever came first: the same replies.
        live.sort(key=lambda job: (len(job.request.text), job.seed_key))
        for at in range(0, len(live), self.size):
            part = live[at : at + self.size]
            try:
                replies = self._replies(part)
            except (
                Exception
            ) as error:  # whatever it was, the requests of this batch fail with it, and the next are answered
                for job in part:
                    job.future.set_exception(error)
                continue
            for job, reply in zip(part, replies, strict=True):
                job.future.set_result(reply)

    def _replies(self, jobs: Sequence[_Job]) -> list[Reply]:
        replies = respond(
            self.vlm, self.defense, [job.request for job in jobs], max_new_tokens=jobs[0].max_new_tokens,
            keys=[job.seed_key for job in jobs], **jobs[0].options,
        )  # fmt: skip
        if self.store is not None and jobs[0].kept:
            self.store.put({self._key(job): reply for job, reply in zip(jobs, replies, strict=True)})
        return replies


class CmrmAPI(ModelAPI):
    """See the module."""

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
            fitted: folder with `<defence>.safetensors` of each defence that was fitted, as `cmrm evaluate` writes it.
            shift: artifact for `cmrm_dataset` (file, folder, hub id), with the setting that it recommends.
            alpha: strength of cmrm's own defences, over the setting's.
            store: file that keeps replies.
            batch_size: requests a batch.
            options: `dtype`, `device_map`, `revision`, `trust_remote_code` of `load_vlm`.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it is at least 1")
        self.batch_size = batch_size
        config = GenerateConfig() if config is None else config
        # Inspect begins with 20 requests at a time and takes more where they succeed, as a service wants it: a larger batch would wait
        # for members that are never sent. It reads this very object.
        if config.max_connections is None and not getattr(config, "adaptive_connections", None):
            config.max_connections = self.max_connections()
        super().__init__(model_name, base_url, api_key, [], config)
        self.vlm = shared_vlm(model_name, **options)
        given = settings_of(settings)
        self.defense = built_defense(self.vlm, defense, given, fitted=fitted, shift=shift, alpha=alpha)
        self.context = {
            "model": model_name, "config": config_hash(self.vlm), "weights": weights_hash(self.vlm),
            "dtype": str(self.vlm.model.dtype), "defense": defense, "settings": self.defense.settings,
            "fitted": self.defense.fingerprint(),
        }  # fmt: skip
        held = ReplyStore(Path(store)) if store else None
        self.batcher = Batcher(self.vlm, self.defense, self.context, held, batch_size)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One reply; see `ModelAPI.generate`. Tools are not supported."""
        if tools:
            raise InputError("cmrm's models call no tools; choose a task without")
        hint = ((input[-1].metadata or {}) if input else {}).get(BATCH_HINT)
        request = await anyio.to_thread.run_sync(request_of, input)
        job = _Job(
            request,
            str(hint["key"]) if hint else request.text,
            generate_options(config),
            config.max_tokens or self.max_tokens(),
            (str(hint["id"]), int(hint["size"])) if hint else None,
        )
        start = time.perf_counter()
        future = self.batcher.ask(job)
        try:
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

    def max_tokens(self) -> int:
        """Length limit of a reply where the task sets none."""
        return 256

    async def count_text_tokens(self, text: str) -> int:
        """By the model's own tokenizer; Inspect's default fetches one of OpenAI's."""
        return len(self.vlm.tokenizer(text, add_special_tokens=False)["input_ids"])

    def max_connections(self) -> int:
        """Requests at a time: enough to fill the next batches while one runs."""
        return 4 * self.batch_size

    def connection_key(self) -> str:
        """One queue a process."""
        return "cmrm"


async def _awaited(future: Future[Reply]) -> Reply:
    """The future's reply. Under asyncio the loop sleeps until it is there: many requests that look every few milliseconds would
    take the interpreter from the batch that is being generated."""
    if sniffio.current_async_library() == "asyncio":
        return await asyncio.wrap_future(future)
    while True:
        try:
            return future.result(timeout=0)
        except NotYet:
            await anyio.sleep(0.05)


def generate_options(config: GenerateConfig) -> dict[str, Any]:
    """Inspect's settings as options of transformers' `generate`; greedy unless a temperature above 0 is set.

    Raises:
        InputError: a setting is given that cannot be honoured.
    """
    unsupported = [
        name for name in ("stop_seqs", "logprobs", "num_choices", "logit_bias", "response_schema", "frequency_penalty",
                          "presence_penalty") if getattr(config, name, None) not in (None, 1, False)
    ]  # fmt: skip
    if unsupported:
        raise InputError(f"cmrm's models do not take {', '.join(unsupported)}")
    if not config.temperature:
        return {}
    options: dict[str, Any] = {"do_sample": True, "temperature": config.temperature}
    for name in ("top_p", "top_k"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    return options


def request_of(messages: Sequence[ChatMessage]) -> Request:
    """An Inspect conversation as a `Request`; it has to end with a user's turn.

    Raises:
        InputError: the last turn is not the user's, a turn holds something else than text and images, or an image cannot be
            read.
    """
    if not messages or messages[-1].role != "user":
        raise InputError("a conversation has to end with a user's turn")
    turns = [_turn(message) for message in messages]
    last, content = turns[-1], messages[-1].content
    image_last = (
        not isinstance(content, str) and isinstance(content[-1], ContentImage) and len(content) > len(last.images)
    )
    return Request(last.text, last.images, image_last, tuple(turns[:-1]))


def _turn(message: ChatMessage) -> Turn:
    if message.role == "tool":
        raise InputError("cmrm's models take no tool turns")
    if isinstance(message.content, str):
        return Turn(message.role, message.content)
    texts, images = [], []
    for content in message.content:
        if isinstance(content, ContentText):
            texts.append(content.text)
        elif isinstance(content, ContentImage):
            images.append(opened(content.image))
        else:
            raise InputError(f"cmrm's models take text and images, no {content.type}")
    return Turn(message.role, "\n".join(texts), tuple(images))


def opened(source: str) -> Image.Image:
    """An image from a data URI or a file's path, as RGB.

    Raises:
        InputError: it is neither, or is no image. Nothing is fetched from the network.
    """
    whose = "an image of the conversation"
    if source.startswith("data:"):
        try:
            return open_picture(base64.b64decode(source.partition(",")[2], validate=True), whose)
        except binascii.Error as error:
            raise InputError(f"{whose} cannot be read: {error}") from None
    if "://" in source:
        raise InputError(f"{whose}, {source[:80]}, would have to be fetched; give a file or a data URI")
    return open_picture(source, whose)
