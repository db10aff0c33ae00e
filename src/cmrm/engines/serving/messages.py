"""Messages of OpenAI's protocol: which carry images, and what they are without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEXT_PARTS = frozenset(
    {"text", "input_text", "output_text", "refusal", "thinking", "tool_reference"}
)
"""Types of content parts that servers read as text."""


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


def texts_of(messages: Sequence[Any]) -> list[str]:
    """Every text of messages whose parts are of the type `text`."""
    texts = []
    for message in messages:
        content = message.get("content") or ()
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [str(part["text"]) for part in parts if part["type"] == "text"]
    return texts


def _has_parts(message: Any) -> bool:
    """Whether a message's content is a sequence of parts."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return content is not None and not isinstance(content, str)


def _is_text(part: Any) -> bool:
    """Whether servers read a content part as text and as nothing else."""
    if isinstance(part, str):
        return True
    if not isinstance(part, Mapping) or part.get("uuid") is not None:
        return False
    kind = part.get("type")
    return isinstance(kind, str) and kind in TEXT_PARTS


def _without(part: Any, placeholder: str) -> Any:
    """A text part without placeholders."""
    if isinstance(part, str):
        return part.replace(f"{placeholder}\n", "").replace(placeholder, "")
    return {
        key: _without(value, placeholder) if isinstance(value, str) and key != "type" else value
        for key, value in part.items()
    }
