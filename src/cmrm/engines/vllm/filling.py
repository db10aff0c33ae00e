"""`fill` on vLLM's server: what each image request has as text is recorded before it is answered.

The server's own renderer and chat template render the conversation a second time, without its
images. A request of one token runs that text, and every worker records the coordinates of its last
prompt token, which stay on the device. The image request then names the record.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from cmrm.engines.vllm.patches import wrap
from cmrm.engines.vllm.stepping import REQUEST_KEY

TEXT_PARTS = frozenset(
    {"text", "input_text", "output_text", "refusal", "thinking", "tool_reference"}
)
"""Types of content parts that vLLM reads as text."""
NO_TEXT_PASS = (
    "cmrm: the text of this conversation could not be run alone, which `fill` needs; no answer is "
    "given"
)
SEVERAL_ENGINES = (
    "cmrm: `fill` is not built for data parallelism: the text and its image request could run in "
    "different engines; start several servers instead"
)


def record_texts(serving: Any) -> None:
    """Let a class of vLLM's chat servings record texts before it answers image requests.

    Args:
        serving: `vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat`.
    """
    wrap(serving, "create_chat_completion", _with_text)


async def _with_text(
    original: Callable[..., Awaitable[Any]], serving: Any, request: Any, *args: Any, **more: Any
) -> Any:
    """Around `create_chat_completion`: a request with images names what its text has recorded.

    What a client says under the key of cmrm is dropped.
    """
    messages = in_lists(request.messages)
    extra = {k: v for k, v in (request.vllm_xargs or {}).items() if k != REQUEST_KEY}
    if has_images(messages):
        if serving.engine_client.vllm_config.parallel_config.data_parallel_size > 1:
            return serving.create_error_response(SEVERAL_ENGINES)
        alone = without_images(messages, _placeholder(serving))
        text = request.model_copy(update={"messages": alone, "vllm_xargs": None})
        rendered = await serving.render_chat_request(text)
        if not isinstance(rendered, tuple):  # vLLM's error, which a client may read
            return rendered
        name = f"cmrm-text-{uuid4().hex}"
        if not await _recorded(serving.engine_client, rendered[1][0], name):
            return serving.create_error_response(NO_TEXT_PASS)
        extra[REQUEST_KEY] = {"target": name}
    asked = request.model_copy(update={"messages": messages, "vllm_xargs": extra or None})
    return await original(serving, asked, *args, **more)


async def _recorded(engine: Any, prompt: Any, name: str) -> bool:
    """Run a rendered text for one token under a name; whether it was run to its end."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0.0, max_tokens=1, detokenize=False, extra_args={REQUEST_KEY: {"record": name}}
    )
    finished = False
    async for output in engine.generate(prompt, parameters, name):
        finished = bool(output.finished)
    return finished


def in_lists(messages: Any) -> list[Any]:
    """Messages of a chat request, their content parts in lists: an iterator is read once."""
    return [
        {**message, "content": list(message["content"])} if _has_parts(message) else message
        for message in messages
    ]


def has_images(messages: Sequence[Any]) -> bool:
    """Whether a message (`in_lists`) has a part that is no text."""
    return any(
        not _is_text(part)
        for message in messages
        if _has_parts(message)
        for part in message["content"]
    )


def without_images(messages: Sequence[Any], placeholder: str | None = None) -> list[Any]:
    """Messages (`in_lists`) without the parts that are no text.

    `placeholder`: what stands for an image in a text. Clients may place it by hand; it is dropped
    from the messages that lose an image.
    """
    alone = []
    for message in messages:
        if has_images([message]):
            kept = [part for part in message["content"] if _is_text(part)]
            if placeholder:
                kept = [_without(part, placeholder) for part in kept]
            message = {**message, "content": kept}
        alone.append(message)
    return alone


def _has_parts(message: Any) -> bool:
    """Whether a message's content is a sequence of parts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return content is not None and not isinstance(content, str)


def _is_text(part: Any) -> bool:
    """Whether vLLM reads a content part as text and as nothing else."""
    if isinstance(part, str):
        return True
    return isinstance(part, Mapping) and part.get("uuid") is None and part.get("type") in TEXT_PARTS


def _without(part: Any, placeholder: str) -> Any:
    """A text part without placeholders."""
    if isinstance(part, str):
        return part.replace(placeholder, "")
    return {
        key: value.replace(placeholder, "") if isinstance(value, str) and key != "type" else value
        for key, value in part.items()
    }


def _placeholder(serving: Any) -> str | None:
    """What stands for an image in the model's texts, in vLLM."""
    from vllm.model_executor.model_loader import get_model_cls

    text = get_model_cls(serving.model_config).get_placeholder_str("image", 1)
    return None if text is None else str(text)
