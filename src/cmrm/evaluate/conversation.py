"""Inspect's conversations and settings as a `Request` and a `Decoding`."""

from __future__ import annotations

from collections.abc import Sequence

from inspect_ai.model import ChatMessage, ContentImage, ContentText, GenerateConfig

from cmrm.engines.base import Decoding
from cmrm.errors import InputError
from cmrm.prompts.conditions import Request, Turn
from cmrm.prompts.images import open_picture

OWNER = "an image of the conversation"
"""Whose image it is, in messages."""
_UNSUPPORTED = (
    "stop_seqs", "logprobs", "num_choices", "logit_bias", "response_schema", "frequency_penalty",
    "presence_penalty",
)  # fmt: skip


def decoding_of(config: GenerateConfig, *, max_tokens: int) -> Decoding:
    """Inspect's settings as a decoding: greedy unless a temperature above 0 is set.

    `max_tokens` is the length limit where the settings have none.

    Raises:
        InputError: a setting cannot be honoured.
    """
    refused = [name for name in _UNSUPPORTED if getattr(config, name, None) not in (None, 1, False)]
    if config.temperature and config.seed is not None:
        refused.append("seed")
    if refused:
        raise InputError(f"cmrm's models do not take {', '.join(refused)}")
    limit = config.max_tokens or max_tokens
    if not config.temperature:
        return Decoding(limit)
    return Decoding(limit, config.temperature, config.top_p, config.top_k)


def request_of(messages: Sequence[ChatMessage]) -> Request:
    """An Inspect conversation as a request; it ends with a user's turn.

    Raises:
        InputError: the last turn is not the user's, a turn holds something else than text and
            images, or an image cannot be read. Nothing is fetched from the network.
    """
    if not messages or messages[-1].role != "user":
        raise InputError("a conversation has to end with a user's turn")
    *before, last = (_turn(message) for message in messages)
    content = messages[-1].content
    image_last = (
        not isinstance(content, str)
        and isinstance(content[-1], ContentImage)
        and len(content) > len(last.images)
    )
    return Request(last.text, last.images, image_last, tuple(before))


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
            images.append(open_picture(content.image, OWNER))
        else:
            raise InputError(f"cmrm's models take text and images, no {content.type}")
    return Turn(message.role, "\n".join(texts), tuple(images))
