"""How probable it is that a reply begins with one of some tokens: one forward pass, no decoding."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from cmrm.engines.base import Contrast
from cmrm.engines.contrast import Contrasted
from cmrm.model.encode import encode, last_logits_alone
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.steering.hooks import intervene
from cmrm.steering.intervention import Intervention


def first_tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens that the texts begin with, ascending; unknown ones are left out.

    Each text counts as it is and behind a space, since some tokenizers begin a reply with one.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    tokens = set()
    for text in (*texts, *(f" {text}" for text in texts)):
        ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        words = [token for token in ids if tokenizer.decode([token]).strip()]
        if words and words[0] != unknown:
            tokens.add(words[0])
    return tuple(sorted(tokens))


def first_token_log_odds(
    vlm: VLM,
    requests: Sequence[Request],
    tokens: Sequence[int],
    interventions: Sequence[Intervention] = (),
    contrast: Contrast | None = None,
) -> torch.Tensor:
    """Log-odds float32 [N] that the first token of each reply is one of `tokens`.

    The requests are one batch, all with an image or all without; interventions and contrast are
    those of `Engine.answer`.

    Raises:
        InputError, SteeringError: as `Engine.answer`.
    """
    vlm.check_eval()
    options = last_logits_alone(vlm)
    steering: AbstractContextManager[Any] = nullcontext()
    if interventions:
        steering = intervene(vlm, *interventions)
    with vlm.lock, torch.inference_mode():
        inputs = encode(vlm, requests)
        with steering:
            output = vlm.model(**inputs, use_cache=True, **options)
            scores = output.logits[:, -1].float()
            if contrast is not None:
                scores = Contrasted(vlm, contrast)(inputs["input_ids"], scores)
        chosen = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        chosen[list(tokens)] = True
        inside = scores.masked_fill(~chosen, -torch.inf).logsumexp(-1)
        outside = scores.masked_fill(chosen, -torch.inf).logsumexp(-1)
        return (inside - outside).cpu()
