"""What `cmrm serve --engine transformers` takes in a chat request: what transformers' server does
not honour is refused by name."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cmrm.errors import InputError
from cmrm.prompts.images import decode_data_uri

MOST_TOKENS = 1_000_000
MOST_TEXT = 500_000
"""Bytes of a body without its images: texts are tokenised before their length is known."""
MOST_PIXELS = 40_000_000
"""Of the images of a request together."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _ImageUrl(_Strict):
    url: str = Field(pattern=r"^data:image/[^,]*;base64,")
    detail: Literal["auto"] | None = None


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]] | None = (
        None
    )
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> _Message:
        if self.tool_calls and self.content:
            raise ValueError("content beside tool_calls would be passed over; send one of them")
        return self


class _AsText(_Strict):
    type: Literal["text"]


class Chat(_Strict):
    """A chat request."""

    model: str | None = None
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto"] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: _AsText | None = None
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
        return "the body is not JSON"
    try:
        chat = Chat.model_validate(asked)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        first = max(errors, key=lambda one: len(one["loc"]))  # the form that the body is nearest to
        place = _place(first["loc"]) or "the body"
        if first["type"] == "extra_forbidden":
            return f"{place} is not supported by --engine transformers; ask without it"
        if first["type"] == "string_pattern_mismatch":
            return f"{place}: images come as data URIs (data:image/png;base64,...)"
        if first["type"] == "model_type":
            return f"{place}: an object is expected"
        return f"{place}: {first['msg']}"
    except RecursionError:
        return "the body is nested too deeply"
    images = _urls(chat)
    if len(body) - sum(map(len, images)) > MOST_TEXT:
        return f"the texts have more than {MOST_TEXT} bytes; shorten them"
    if len(images) > most_images:
        raise_to = "--max-images raises it"
        return f"the request has {len(images)} images, the limit is {most_images} ({raise_to})"
    try:
        json.dumps(asked, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "a text holds one half of a surrogate pair, which is no letter; send whole letters"
    pixels = 0
    for url in images:
        try:
            pixels += _pixels(url)
        except InputError as error:
            return str(error)
        except Exception as error:  # a stranger's bytes: Pillow raises whatever it meets
            return f"an image cannot be read: {type(error).__name__}"
    if pixels > MOST_PIXELS:
        return f"the images have {pixels} pixels, the limit is {MOST_PIXELS}; send smaller ones"
    return None


def _urls(chat: Chat) -> list[str]:
    """Addresses of a request's images."""
    return [
        part.image_url.url
        for message in chat.messages
        if isinstance(message.content, list)
        for part in message.content
        if isinstance(part, _ImagePart)
    ]


def _pixels(url: str) -> int:
    """Number of pixels of an image, which is not decoded for it."""
    with Image.open(io.BytesIO(decode_data_uri(url, "the request"))) as image:
        return int(image.width * image.height)


def _place(steps: Sequence[int | str]) -> str:
    """Where in a body an error is; the names of forms are left out."""
    names = [step for step in map(str, steps) if step.isidentifier() or step.isdigit()]
    return ".".join(name for name, _ in groupby(names) if name not in ("str", "list", "text"))
