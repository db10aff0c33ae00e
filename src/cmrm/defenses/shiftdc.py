"""ShiftDC: takes the safety-relevant part of the image's shift away (Zou et al., arXiv
2502.13095)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cmrm.defenses.anchors import scaled_layers
from cmrm.defenses.base import Defense, FitData, typed
from cmrm.defenses.caption import captioned
from cmrm.defenses.space import Choice, Space, Whole
from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.prompts.conditions import Request
from cmrm.shift.direction import refusal_direction
from cmrm.steering.intervention import Intervention, shift_intervention
from cmrm.steering.setting import Positions, Steering


class ShiftDC(Defense):
    """Takes away the part of the image's shift that lies along the safety direction.

    With m = h_image - h_caption at the last prompt token (the caption is the model's own) and s =
    mean of harmful minus mean of benign text states, layer by layer:  h <- h - (m . s / |s|^2) s
    at the last prompt token, once.

    The released code was read. Its example steers from layer 10 of 32 on, the default here, scaled
    to the depth (without options the code begins in the middle). Its hook acts on each generated
    token as well, which the paper does not say: `positions` "last" does that. The fixed sentence
    about safety that it adds to the request is left out here.
    """

    name = "shiftdc"
    source = "ShiftDC, arXiv 2502.13095"
    needs_fit = True

    def __init__(
        self, *, first_layer: int | None = None, positions: Positions = "last_prompt"
    ) -> None:
        """`first_layer`: 0-based; None: 10 of 32, scaled to the depth; `positions`: `last_prompt`,
        or `last` for every generated token too."""
        super().__init__()
        if first_layer is not None:
            typed("first_layer", first_layer, int, "a decoder layer, counted from 0")
        if positions not in ("last_prompt", "last"):
            raise InputError(f"positions is {positions!r}; one of last_prompt, last")
        self.first_layer = first_layer
        self.positions: Positions = positions

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where the first layer is none of the model's."""
        if self.first_layer is not None:
            Steering(layers=(self.first_layer,)).chosen_layers(engine.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """First layer and positions."""
        return {"first_layer": self.first_layer, "positions": self.positions}

    def space(self, engine: Engine) -> Space:
        """First layer and positions."""
        layers = Whole("first_layer", 0, engine.n_layers - 1)
        return (layers, Choice("positions", ("last_prompt", "last")))

    @property
    def fitted_by(self) -> tuple[object, ...]:
        """Nothing: every layer's direction is fitted."""
        return ()

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
        first = self.first_layer
        if first is None:
            first = scaled_layers((10,), 32, engine.n_layers)[0]
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
        return [shift_intervention(vectors, Steering(1.0, "per_layer", self.positions, layers))]
