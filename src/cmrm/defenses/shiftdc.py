"""ShiftDC: takes the safety-relevant part of the image's shift away (Zou et al., arXiv
2502.13095)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cmrm.defenses.base import Defense, FitData, typed
from cmrm.defenses.caption import captioned
from cmrm.engines.base import Engine
from cmrm.prompts.conditions import Request
from cmrm.shift.direction import refusal_direction
from cmrm.steering.intervention import Intervention, shift_intervention
from cmrm.steering.setting import Steering


class ShiftDC(Defense):
    """Takes away the part of the image's shift that lies along the safety direction.

    With m = h_image - h_caption at the last prompt token (the caption is the model's own) and s =
    mean of harmful minus mean of benign text states, layer by layer from the middle on:  h <- h -
    (m . s / |s|^2) s  at the last prompt token.
    """

    name = "shiftdc"
    source = "ShiftDC, arXiv 2502.13095"
    needs_fit = True

    def __init__(self, *, first_layer: int | None = None) -> None:
        """`first_layer`: 0-based; None: the middle."""
        super().__init__()
        if first_layer is not None:
            typed("first_layer", first_layer, int, "a decoder layer, counted from 0")
        self.first_layer = first_layer

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where the first layer is none of the model's."""
        if self.first_layer is not None:
            Steering(layers=(self.first_layer,)).chosen_layers(engine.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """The first layer."""
        return {"first_layer": self.first_layer}

    def fit(self, engine: Engine, data: FitData) -> None:
        """The safety direction."""
        direction = refusal_direction(engine.states, data.harmful, data.benign, data.batch_size)
        self.state = {"direction": direction}

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """One generation (the caption) and two passes for each row with an image."""
        safety = self.fitted("direction")
        rows = [k for k, request in enumerate(requests) if request.all_images]
        if not rows:
            return []
        first = engine.n_layers // 2 if self.first_layer is None else self.first_layer
        seen = [requests[k] for k in rows]
        as_text = captioned(engine, seen)
        moved = engine.states(seen, batch_size=len(seen)) - engine.states(
            as_text, batch_size=len(as_text)
        )
        share = (moved * safety).sum(-1, keepdim=True) / safety.square().sum(
            -1, keepdim=True
        ).clamp_min(1e-12)
        vectors = torch.zeros(len(requests), engine.n_layers, engine.hidden_size)
        vectors[rows] = -share * safety
        layers = tuple(range(first, engine.n_layers))
        return [shift_intervention(vectors, Steering(1.0, "per_layer", "last_prompt", layers))]
