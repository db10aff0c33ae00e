"""`fill` on vLLM's server: what each image request has as text is recorded before it is answered.

The server's own renderer and chat template render the conversation a second time, without its
images. A request of one token runs that text, and every worker records the coordinates of its last
prompt token, which stay on the device. The image request then names the record.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from cmrm.engines.serving.messages import has_images, in_lists, without_images
from cmrm.engines.vllm.patches import wrap
from cmrm.engines.vllm.stepping import REQUEST_KEY

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
        extra[REQUEST_KEY] = {"target": name, "uses": request.n or 1}
    asked = request.model_copy(update={"messages": messages, "vllm_xargs": extra or None})
    return await original(serving, asked, *args, **more)


async def _recorded(engine: Any, prompt: Any, name: str) -> bool:
    """Run a rendered text for one token under a name; whether it was run to its end."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0.0, max_tokens=1, detokenize=False, extra_args={REQUEST_KEY: {"record": name}}
    )
    reasons = None
    async for output in engine.generate(prompt, parameters, name):
        if output.finished:
            reasons = [one.finish_reason for one in output.outputs]
    return reasons in (["stop"], ["length"])


def _placeholder(serving: Any) -> str | None:
    """What stands for an image in the model's texts, in vLLM."""
    from vllm.model_executor.model_loader import get_model_cls

    text = get_model_cls(serving.model_config).get_placeholder_str("image", 1)
    return None if text is None else str(text)
