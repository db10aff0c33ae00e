"""What `cmrm serve --engine transformers` takes in a chat request: what transformers' server does
not honour is refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_STOPS = 16
MOST_TOKENS = 1_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _ImageUrl(_Strict):
    url: str = Field(pattern=r"^data:image/[^,]*,")
    detail: str | None = None


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _Message(_Strict):
    role: str = Field(min_length=1)
    content: str | list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]] | None = (
        None
    )
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class _Body(_Strict):
    model: str | None = None
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=0, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto"] | None = None
    n: Literal[1] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None


def refused_chat(body: bytes, most_images: int) -> str | None:
    """Why a chat request is not taken; None where it is.

    Args:
        body: JSON.
        most_images: images that a request may have, over all its messages.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return "the body is no JSON"
    try:
        chat = _Body.model_validate(asked)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        first = max(errors, key=lambda one: len(one["loc"]))  # of several forms, the nearest one
        place = _place(first["loc"]) or "the body"
        if first["type"] == "extra_forbidden":
            return f"{place} is not supported by --engine transformers; ask without it"
        if first["type"] == "string_pattern_mismatch":
            return f"{place}: images come as data URIs (data:image/png;base64,...)"
        return f"{place}: {first['msg']}"
    except RecursionError:
        return "the body is nested too deeply"
    images = sum(
        isinstance(part, _ImagePart)
        for message in chat.messages
        if isinstance(message.content, list)
        for part in message.content
    )
    if images > most_images:
        raise_to = "--max-images raises it"
        return f"the request has {images} images, the limit is {most_images} ({raise_to})"
    return None


def _place(steps: Sequence[int | str]) -> str:
    """Where in a body an error is; the names of forms are left out."""
    names = [step for step in map(str, steps) if step.isidentifier() or step.isdigit()]
    return ".".join(name for name, _ in groupby(names) if name not in ("str", "list", "text"))
