"""Caption substitution: the model's own description of the image takes the image's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cmrm.defenses.base import Defense
from cmrm.engines.base import Decoding, Engine
from cmrm.prompts.conditions import Request

DESCRIBE = "Describe the image in one sentence."
CAPTION_TOKENS = 48


def captions(engine: Engine, requests: Sequence[Request], question: str = DESCRIBE) -> list[str]:
    """Answers of the undefended model to `question` about each request's images.

    `{}` in the question stands for the request's text.
    """
    asked = [replace(r, text=question.replace("{}", r.text)) for r in requests]
    replies = engine.answer(asked, (), Decoding(CAPTION_TOKENS), batch_size=len(asked))
    return [reply.text for reply in replies]


def captioned(engine: Engine, requests: Sequence[Request]) -> list[Request]:
    """The requests as text: caption, newline, request."""
    return [
        replace(request.without_images(), text=f"{caption}\n{request.text}")
        for request, caption in zip(requests, captions(engine, requests), strict=True)
    ]


class CaptionSubstitution(Defense):
    """The image is replaced by the model's own description of it, so that the backbone reads text
    alone."""

    name = "caption"
    source = "caption condition of arXiv 2410.09047, the caption by the model itself"

    def rewrite(self, engine: Engine, requests: Sequence[Request]) -> list[Request]:
        """Caption, newline, request: one more generation for each request with an image."""
        rows = [k for k, request in enumerate(requests) if request.all_images]
        rewritten = list(requests)
        if rows:
            as_text = captioned(engine, [requests[k] for k in rows])
            for k, request in zip(rows, as_text, strict=True):
                rewritten[k] = request
        return rewritten
