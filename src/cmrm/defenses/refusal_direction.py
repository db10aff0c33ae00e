"""Refusal-direction addition at one layer (Arditi et al., arXiv 2406.11717)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmrm.defenses.base import Defense, FitData, typed
from cmrm.defenses.space import Real, Space, Whole
from cmrm.engines.base import Engine
from cmrm.prompts.conditions import Request
from cmrm.shift.direction import refusal_direction
from cmrm.steering.intervention import Intervention, shift_intervention
from cmrm.steering.setting import Steering


class RefusalDirection(Defense):
    """Adds the difference in means of harmful and benign text states at one layer, at every
    position."""

    name = "refusal_direction"
    source = "refusal-direction addition, arXiv 2406.11717"
    needs_fit = True

    def __init__(self, *, layer: int | None = None, alpha: float = 1.0) -> None:
        """`layer`: 0-based, None: at 60 % of the depth; `alpha`: strength, >= 0 (never taken
        away)."""
        super().__init__()
        if layer is not None:
            typed("layer", layer, int, "a decoder layer, counted from 0")
        typed("alpha", alpha, float, "a number, 0 or above")
        self.layer = layer
        self.alpha = Steering(alpha=alpha).alpha

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where the layer is none of the model's."""
        if self.layer is not None:
            Steering(layers=(self.layer,)).chosen_layers(engine.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Layer and strength."""
        return {"layer": self.layer, "alpha": self.alpha}

    def space(self, engine: Engine) -> Space:
        """Layer and strength."""
        return (Whole("layer", 0, engine.n_layers - 1), Real("alpha", 0.1, 4.0, log=True))

    @property
    def fitted_by(self) -> tuple[object, ...]:
        """Nothing: every layer's direction is fitted."""
        return ()

    def fit(self, engine: Engine, data: FitData) -> None:
        """The refusal direction of every layer."""
        direction = refusal_direction(engine.states, data.harmful, data.benign, data.batch_size)
        self.state = {"direction": direction}

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """The addition, in rows with an image."""
        layer = round(0.6 * (engine.n_layers - 1)) if self.layer is None else self.layer
        steering = Steering(self.alpha, "per_layer", "all", (layer,))
        return [shift_intervention(self.fitted("direction"), steering)]
