"""Requests as model inputs: chat template, processor, left padding."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jinja2 import TemplateError

from cmrm.errors import InputError
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request

_NEEDS_AN_IMAGE = {"PaliGemmaProcessor"}
"""Processors that refuse text alone: the tokenizer is used, with the newline that ends a PaliGemma
prompt."""

SHOWN_CHARACTERS = 40
"""Characters of a request that an error message shows where the request has no id."""


def encode(vlm: VLM, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
    """Model inputs of a batch of prompts, LEFT-padded, on the model's device.

    Each conversation passes through the model's own chat template with the generation prompt. Rows
    with and without images may be mixed. The shared tokenizer is not changed.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, T]; `pixel_values` in the model's dtype where
        any row has an image; whatever else the model's forward takes.

    Raises:
        InputError: the batch is empty, a text holds the model's image placeholder, the chat
            template or the processor refuses a conversation, or a prompt is longer than the model's
            context.
    """
    if not requests:
        raise InputError("no prompts were given")
    texts = [rendered(vlm.processor, vlm.placeholders, request) for request in requests]
    images = [list(request.all_images) for request in requests]
    tokenizer = vlm.tokenizer
    options: dict[str, Any] = {
        "padding": True,
        "padding_side": "left",
        "return_tensors": "pt",
        "add_special_tokens": adds_special_tokens(tokenizer, texts[0]),
    }
    text_alone = not any(images)
    with vlm.lock:  # a tokenizer pads for one caller at a time
        if text_alone and type(vlm.processor).__name__ in _NEEDS_AN_IMAGE:
            lines = [f"{text}\n" for text in texts]
            batch = tokenizer(lines, return_token_type_ids=True, **options)
        else:
            batch = vlm.processor(text=texts, images=None if text_alone else images, **options)
    width = batch["input_ids"].shape[1]
    limit = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and width > limit:
        raise InputError(f"a prompt has {width} tokens, the model's context is {limit}; shorten it")
    dtype = vlm.model.dtype
    return {
        key: value.to(vlm.device, dtype if value.is_floating_point() else None)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and key != "labels"
    }


def last_logits_alone(vlm: VLM) -> dict[str, Any]:
    """Arguments of the model's forward with which it computes the logits of the last token alone,
    where it can."""
    known = inspect.signature(vlm.model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def last_positions(mask: torch.Tensor) -> torch.Tensor:
    """Position int64 [B] of the last token of each row of an attention mask [B, T], padded on
    either side."""
    return mask.shape[1] - 1 - mask.flip(1).argmax(1)


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether a rendered conversation lacks the tokenizer's special tokens."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def rendered(processor: Any, placeholders: Collection[str], request: Request) -> str:
    """The conversation as the processor's chat template writes it, with the generation prompt.

    Raises:
        InputError: a text holds one of `placeholders`, or the template refuses the conversation.
    """
    for text in (*(turn.text for turn in request.before), request.text):
        _refuse_placeholders(placeholders, request, text)
    turns = [_turn(turn.role, turn.text, len(turn.images)) for turn in request.before]
    turns.append(_turn("user", request.text, len(request.images), image_last=request.image_last))
    try:
        conversation = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError) as error:
        raise InputError(
            f"{_name(request)}: the chat template refuses the conversation: {error}"
        ) from error
    return str(conversation)


def _refuse_placeholders(placeholders: Collection[str], request: Request, text: str) -> None:
    """Refuse a text that the processor would take for an image or a video."""
    for placeholder in sorted(placeholders):
        if placeholder in text:
            raise InputError(
                f"{_name(request)}: its text holds {placeholder!r}, which this model reads as an "
                "image; "
                "remove it from the text (images are passed apart) or write it differently"
            )


def _name(request: Request) -> str:
    if request.id:
        return f"sample {request.id!r}"
    shown = " ".join(request.text.split())
    return f"the request {shown[:SHOWN_CHARACTERS]!r}"


def _turn(role: str, text: str, images: int, *, image_last: bool = False) -> dict[str, Any]:
    pictures: list[dict[str, str]] = [{"type": "image"}] * images
    texts: list[dict[str, str]] = [{"type": "text", "text": text}]
    return {"role": role, "content": texts + pictures if image_last else pictures + texts}
