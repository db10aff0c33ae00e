"""Logits of a second conversation, decoded beside the first one on a KV cache of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cmrm.engines.base import Contrast
from cmrm.model.compat import backbone_of, cache_of, with_cache
from cmrm.model.encode import encode, last_logits_alone
from cmrm.model.vlm import VLM

OFFSETS = "rope_deltas"
"""What models with multi-axis rotary positions keep of the conversation that they ran last."""
CROSS_MASK = "cross_attention_mask"
"""Which image each token sees, of models with cross-attention: a generated token sees the same as
the last prompt token."""


class Contrasted:
    """A logits processor of transformers' `generate`:  scores + weight (second - scores).

    The second conversations of the contrasted rows are run in one batch. Steering that is open
    acts on them too: their KV cache tells them from the first ones (`steering.tracker`).
    """

    def __init__(self, vlm: VLM, contrast: Contrast) -> None:
        self.vlm = vlm
        self.weight = contrast.weight
        self.rows = [row for row, request in enumerate(contrast.requests) if request is not None]
        self.requests = [request for request in contrast.requests if request is not None]
        self._cache: Any = None
        self._offsets: torch.Tensor | None = None
        self._masks: dict[str, torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] of the next token, given the tokens [B, T] so far."""
        rows = torch.tensor(self.rows, device=scores.device)
        with self._own_offsets():
            logits = self._step(input_ids[rows, -1:])
        second = logits.to(scores.device, scores.dtype)
        own = scores[rows]
        return scores.index_copy(0, rows, own + self.weight * (second - own))

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] behind the prompts, or behind the tokens [R, 1] that were chosen."""
        vlm = self.vlm
        options = last_logits_alone(vlm)
        if self._cache is None:
            inputs = encode(vlm, self.requests)
            output = vlm.model(**inputs, use_cache=True, **options)
            names = ("attention_mask", CROSS_MASK)
            self._masks = {name: inputs[name] for name in names if name in inputs}
        else:
            self._masks = {name: _longer(name, mask) for name, mask in self._masks.items()}
            output = vlm.model(
                input_ids=tokens.to(vlm.device),
                **self._masks,
                **self._positions(),
                **with_cache(vlm.model, self._cache),
                **options,
            )
        self._cache = cache_of(output)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _positions(self) -> dict[str, torch.Tensor]:
        """Positions [3, R, 1] of the last tokens, for models that add offsets to them."""
        if self._offsets is None:
            return {}
        mask = self._masks["attention_mask"]
        counted = mask.long().sum(1, keepdim=True) - 1
        positions = counted + self._offsets.to(mask.device).reshape(-1, 1)
        return {"position_ids": positions[None].expand(3, -1, -1)}

    @contextmanager
    def _own_offsets(self) -> Iterator[None]:
        """Inside, the model has the position offsets of the second conversation."""
        backbone = backbone_of(self.vlm.model)
        if not hasattr(backbone, OFFSETS):
            yield
            return
        first = getattr(backbone, OFFSETS)
        setattr(backbone, OFFSETS, self._offsets)
        try:
            yield
            self._offsets = getattr(backbone, OFFSETS)
        finally:
            setattr(backbone, OFFSETS, first)


def _longer(name: str, mask: torch.Tensor) -> torch.Tensor:
    """A mask [R, T, ...] with one more token."""
    new = mask[:, -1:] if name == CROSS_MASK else torch.ones_like(mask[:, :1])
    return torch.cat([mask, new], dim=1)
